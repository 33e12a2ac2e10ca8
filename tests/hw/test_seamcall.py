"""SEAMCALL and its relatives: modes, faults, events, and what a dying SEAM software leaves."""

import pytest

from softtdx.hw import Mode, Platform, Registers
from softtdx.hw.faults import BusFault, GeneralProtection, MachineCheck, UndefinedOpcode, VmFail
from softtdx.hw.isa import SeamCpu


class Echo:
    """SEAM software that records what it sees and answers with RCX + 1."""

    def __init__(self):
        self.seen = []

    def seam_entry(self, cpu: SeamCpu, regs: Registers) -> None:
        self.seen.append((cpu.index, regs.rax))
        regs.rcx += 1
        regs.rax = 0


@pytest.fixture
def platform():
    return Platform()


def test_seamcall_without_a_module_is_vmfail_invalid(platform):
    with pytest.raises(VmFail):
        platform.lps[0].seamcall(Registers(rax=33))


def test_seamcall_before_seamrr_is_enabled_is_a_general_protection_fault(platform):
    platform.seam.enabled = False
    with pytest.raises(GeneralProtection):
        platform.lps[0].seamcall(Registers(rax=33))


def test_bit_63_of_rax_chooses_the_loader(platform):
    platform.seam.loader, platform.seam.module = loader, module = Echo(), Echo()
    platform.lps[1].seamcall(Registers(rax=1 << 63))
    regs = platform.lps[0].seamcall(Registers(rax=7, rcx=41))
    assert loader.seen == [(1, 1 << 63)]
    assert module.seen == [(0, 7)]
    assert regs.rcx == 42


def test_registers_may_be_given_by_name(platform):
    platform.seam.module = Echo()
    assert platform.lps[0].seamcall(rax=7, rcx=(1 << 64) - 2).rcx == (1 << 64) - 1
    with pytest.raises(ValueError, match="64 bits"):
        platform.lps[0].seamcall(rax=-1)


def test_a_seamcall_from_inside_seam_mode_is_undefined(platform):
    lp = platform.lps[0]
    failures = []

    class Recursive:
        def seam_entry(self, cpu, regs):
            assert lp.mode is Mode.SEAM_ROOT
            for instruction in (lambda: lp.seamcall(Registers()), lambda: lp.vmenter(launch=True)):
                with pytest.raises(UndefinedOpcode):
                    instruction()
                failures.append(1)

    platform.seam.module = Recursive()
    lp.seamcall(Registers())
    assert len(failures) == 2
    assert lp.mode is Mode.VMX_ROOT


@pytest.mark.parametrize("instruction", ["seamret", "seamops", "tdcall"])
def test_seam_instructions_do_not_exist_for_the_host(platform, instruction):
    with pytest.raises(UndefinedOpcode):
        getattr(platform.lps[0], instruction)()


def test_only_seam_mode_may_name_a_private_keyid(platform):
    lp = platform.lps[0]
    d = platform.description
    platform.memory.set_key(d.first_private_keyid)
    private = d.keyed(0x200000, d.first_private_keyid)
    with pytest.raises(BusFault):
        lp.rd64(private)

    class Toucher:
        def seam_entry(self, cpu, regs):
            cpu.zero_page(private)
            cpu.wr64(private, 0x1234)
            regs.rcx = cpu.rd64(private)

    platform.seam.module = Toucher()
    assert lp.seamcall(Registers()).rcx == 0x1234
    with pytest.raises(BusFault):
        lp.rd64(private)


def test_the_host_cannot_read_or_write_seamrr(platform):
    base = platform.description.seamrr[0]

    class Writer:
        def seam_entry(self, cpu, regs):
            cpu.wr64(base, 0xC0FFEE)
            regs.rcx = cpu.rd64(base)

    platform.seam.module = Writer()
    lp = platform.lps[0]
    assert lp.seamcall(Registers()).rcx == 0xC0FFEE
    assert lp.rd64(base) == (1 << 64) - 1
    lp.wr64(base, 0)
    assert platform.memory.read(base, 8, seam=True) == (0xC0FFEE).to_bytes(8, "little")


def test_poison_consumed_in_seam_mode_ends_the_module(platform):
    lp = platform.lps[0]
    d = platform.description
    platform.memory.set_key(d.first_private_keyid)
    private = d.keyed(0x300000, d.first_private_keyid)

    class Victim:
        def seam_entry(self, cpu, regs):
            if regs.rcx == 0:
                cpu.zero_page(private)
            else:
                cpu.rd64(private)

    platform.seam.module = Victim()
    lp.seamcall(Registers())
    lp.write(0x300000, bytes(64))
    with pytest.raises(MachineCheck):
        lp.seamcall(Registers(rcx=1))
    assert lp.mode is Mode.VMX_ROOT
    with pytest.raises(VmFail):
        lp.seamcall(Registers())


def test_events_are_published_only_while_somebody_listens(platform):
    platform.seam.module = Echo()
    lp = platform.lps[0]
    lp.seamcall(Registers(rax=5))
    with platform.events.collect("seamcall") as events:
        lp.seamcall(Registers(rax=6, rcx=1))
    lp.seamcall(Registers(rax=7))
    assert [e.data["leaf"] for e in events] == [6]
    assert platform.events.counts["seamcall"] == 3


def test_a_reports_mac_verifies_here_and_nowhere_else(platform):
    from softtdx.hw.seamops import SeamIdentity, SeamOpsStatus

    platform.seamops.seamextend(SeamIdentity(bytes(16), bytes(48), bytes(48), 0))
    status, report = platform.seamops.report(b"\x81\0\0\0", bytes(64), bytes(48))
    assert status is SeamOpsStatus.SUCCESS
    mac = report[:256]
    assert platform.seamops.verify(mac) is SeamOpsStatus.SUCCESS
    for bit in range(0, 256 * 8, 13):
        forged = bytearray(mac)
        forged[bit // 8] ^= 1 << bit % 8
        assert platform.seamops.verify(bytes(forged)) is not SeamOpsStatus.SUCCESS
    from dataclasses import replace

    other = Platform(replace(platform.description, seed=1))
    assert other.seamops.verify(mac) is SeamOpsStatus.REPORTMACSTRUCT_ERROR


def test_the_same_seed_gives_the_same_entropy():
    first, second = Platform(), Platform()
    assert [first.entropy.u64() for _ in range(4)] == [second.entropy.u64() for _ in range(4)]


def test_a_register_value_must_fit():
    with pytest.raises(ValueError, match="64 bits"):
        Registers(rax=1 << 64)
    with pytest.raises(ValueError, match="named"):
        Registers(eip=1)


@pytest.mark.parametrize(
    ("xcr0", "xss", "standard", "compacted"),
    [(1, 0, 576, 576), (3, 0, 576, 576), (7, 0, 0x340, 0x340), (0xE7, 0, 0xA80, 576 + 0x100 + 0x40 + 0x200 + 0x400),
     (0x6_0003, 0, 0x2B00, 576 + 0x40 + 0x2000)],
)  # fmt: skip
def test_cpuid_0d_tells_the_size_of_the_area_for_what_is_enabled_now(platform, xcr0, xss, standard, compacted):
    lp = platform.lps[0]
    lp.core.xcr0 = xcr0
    lp.core.wrmsr(0xDA0, xss)
    assert (lp.cpuid(0xD, 0)[1], lp.cpuid(0xD, 1)[1]) == (standard, compacted)


def test_the_hosts_vmcs_is_current_again_after_a_seamcall(platform):
    lp = platform.lps[0]
    revision = (lp.rdmsr(0x480) & 0x7FFF_FFFF).to_bytes(4, "little")
    d = platform.description
    platform.memory.set_key(d.first_private_keyid)
    private = d.keyed(0x400000, d.first_private_keyid)

    class Leaver:
        def seam_entry(self, cpu, regs):
            cpu.zero_page(private)
            cpu.write(private, revision + bytes(60))
            cpu.vmclear(private)
            cpu.vmptrld(private)

    platform.seam.module = Leaver()
    for host_vmcs in ((1 << 64) - 1, 0x500000):
        if host_vmcs == 0x500000:
            lp.write(host_vmcs, revision)
            lp.core.vmclear(host_vmcs)
            lp.core.vmptrld(host_vmcs)
        lp.seamcall(Registers())
        assert lp.core.vmptrst() == host_vmcs
