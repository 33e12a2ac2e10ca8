"""What a hostile host can do to the hardware: dirty lines held back, stores between two loads, the wrong modes."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softtdx.hw import Mode, Platform, preset
from softtdx.hw.faults import BusFault, GeneralProtection, MachineCheck, UndefinedOpcode

AT, LINE = 0x100_0000, 64
TD, OTHER_TD = 40, 41
OLD, NEW = b"o" * LINE, b"n" * LINE


@pytest.fixture
def platform():
    platform = Platform(replace(preset("spr"), lps=4, packages=2))
    for keyid in (TD, OTHER_TD):
        platform.memory.set_key(keyid)
    return platform


def under(platform, keyid, at=AT):
    return platform.description.keyed(at, keyid)


def test_a_line_that_is_evicted_late_lies_over_the_next_owners_data(platform):
    platform.memory.write(under(platform, TD), OLD, seam=True)
    platform.caches.hold(under(platform, TD))
    platform.memory.write(under(platform, OTHER_TD), NEW, seam=True)
    assert platform.caches.evict() == 1
    with pytest.raises(MachineCheck):
        platform.memory.read(under(platform, OTHER_TD), LINE, seam=True)


def test_an_evicted_line_is_encrypted_with_the_key_that_its_keyid_has_by_then(platform):
    platform.memory.write(under(platform, TD), OLD, seam=True)
    platform.caches.hold(under(platform, TD))
    platform.memory.set_key(TD)
    platform.caches.evict()
    assert platform.memory.read(under(platform, TD), LINE, seam=True) == OLD


def test_a_keyid_that_lost_its_key_loses_its_dirty_lines(platform):
    platform.memory.write(under(platform, TD), OLD, seam=True)
    platform.caches.hold(under(platform, TD))
    platform.memory.clear_key(TD)
    assert platform.caches.evict() == 1
    with pytest.raises(BusFault):
        platform.memory.read(under(platform, TD), LINE, seam=True)


@settings(max_examples=30, deadline=None)
@given(lines=st.lists(st.tuples(st.integers(0, 63), st.integers(0, 1)), max_size=20), package=st.integers(0, 1))
def test_a_write_back_empties_one_packages_cache_and_no_others(lines, package):
    platform = Platform(replace(preset("spr"), lps=2, packages=2))
    platform.memory.write(AT, bytes(4096))
    for line, where in lines:
        platform.caches.hold(AT + line * LINE, package=where)
    last = dict(lines)  # a line is dirty in the cache of who wrote it last
    platform.write_back_caches(package)
    assert {(d.pa, d.package) for d in platform.caches.dirty} == {
        (AT + line * LINE, where) for line, where in last.items() if where != package
    }


def test_flushing_a_page_takes_its_lines_and_no_others(platform):
    platform.memory.write(AT, bytes(8192))
    platform.caches.hold(AT, 8192)
    assert platform.caches.flush(AT, 4096) == 64
    assert len(platform.caches.dirty) == 64


@pytest.mark.parametrize(("pa", "size"), [(AT + 1, LINE), (AT, 63), (AT + 32, 32)])
def test_only_whole_lines_are_dirty(platform, pa, size):
    with pytest.raises(ValueError, match="whole lines"):
        platform.caches.hold(pa, size)


# --- stores between loads
def test_a_store_lands_behind_the_load_that_is_asked_for(platform):
    lp, seen = platform.lps[0], []
    lp.write(AT, bytes(64))
    with platform.after_load(AT + 8, 8, lambda: platform.memory.write(AT + 8, b"changed!"), skip=1):
        seen += [lp.read(AT, 8), lp.read(AT, 64)[8:16], lp.read(AT + 8, 8), lp.rd64(AT + 8).to_bytes(8, "little")]
    assert seen == [bytes(8), bytes(8), bytes(8), b"changed!"]


def test_the_address_is_that_of_dram_whatever_keyid_loads_it(platform):
    hits = []
    platform.memory.write(under(platform, 3), NEW)
    with platform.after_load(AT, 1, lambda: hits.append(1)):
        platform.lps[1].rd8(under(platform, 3))
        platform.lps[1].rd8(under(platform, 3))
    assert hits == [1]


def test_nothing_is_watched_afterwards(platform):
    lp = platform.lps[0]
    before = [lp.read, lp.rd64, lp._seam_cpu.read, lp._seam_cpu.copy_page]
    with platform.after_load(AT, 8, lambda: None):
        assert lp.read != before[0]
    assert [lp.read, lp.rd64, lp._seam_cpu.read, lp._seam_cpu.copy_page] == before


# --- modes
@pytest.mark.parametrize("mode", [Mode.OUTSIDE_VMX, Mode.SMM, Mode.USER])
def test_seam_instructions_and_vm_entry_need_vmx_root_mode_at_cpl_0(platform, mode):
    lp = platform.lps[0]
    with lp.executing_in(mode):
        wanted = GeneralProtection if mode is Mode.USER else UndefinedOpcode
        for instruction in (lambda: lp.seamcall(rax=33), lambda: lp.vmenter(True)):
            with pytest.raises(wanted):
                instruction()
        for instruction in (lp.seamret, lp.seamops, lp.tdcall):
            with pytest.raises(UndefinedOpcode):
                instruction()
        with pytest.raises(ValueError, match="to"), lp.executing_in(Mode.USER):
            pass
    assert lp.mode is Mode.VMX_ROOT


@pytest.mark.parametrize("mode", [Mode.SEAM_ROOT, Mode.VMX_NON_ROOT, Mode.VMX_ROOT])
def test_software_cannot_put_itself_into_other_modes(platform, mode):
    with pytest.raises(ValueError, match=r"to .* mode"), platform.lps[0].executing_in(mode):
        pass
