"""Bringing TDX up on a host."""

from dataclasses import dataclass

import pytest
from td_build_steps import Build

from softtdx.abi.kvm import KVM_X86_TDX_VM
from softtdx.hw import Platform, preset
from softtdx.kvm import Host, Kvm, KvmError, TdxUnavailableError
from softtdx.kvm.memory import PAGE
from softtdx.seamldr import development_release


@dataclass
class Altered:
    image: bytes
    sigstruct: bytes


def test_all_memory_is_in_tdmrs_and_only_holes_and_pamts_are_reserved(booted_host):
    tdmrs, memory = booted_host.tdx.tdmrs, booted_host.memory
    usable = sum(t.size - sum(end - start for start, end in t.reserved) for t in tdmrs)
    pamt = sum(size for t in tdmrs for _, size in t.pamt)
    assert usable == memory.total_pages * PAGE - pamt
    assert memory.tdx_pages()["PAMT"] == pamt // PAGE
    for tdmr in tdmrs:
        assert tdmr.base % (1 << 30) == tdmr.size % (1 << 30) == 0
        assert all(a[1] < b[0] for a, b in zip(tdmr.reserved, tdmr.reserved[1:], strict=False))


def test_one_private_keyid_is_the_modules_own(booted_host):
    private = booted_host.platform.description.private_keyids
    assert booted_host.tdx.global_keyid == private[0]
    assert booted_host.tdx.free_keyids == len(private) - 1


def test_enabling_twice_is_one_enabling(booted_host):
    assert booted_host.enable_tdx(development_release()) is booted_host.tdx


@pytest.mark.parametrize("what", ["image", "sigstruct"])
def test_a_module_with_one_byte_changed_is_refused_and_nothing_stays_allocated(what):
    good = development_release()
    parts = {"image": bytearray(good.image), "sigstruct": bytearray(good.sigstruct)}
    parts[what][1000] ^= 1
    host = Host(Platform(preset("spr")))
    before = host.memory.free_pages
    with pytest.raises(TdxUnavailableError, match=r"SEAMLDR\.INSTALL failed.*EBAD"):
        host.enable_tdx(Altered(bytes(parts["image"]), bytes(parts["sigstruct"])))
    assert host.tdx is None
    assert host.memory.free_pages == before


def test_an_image_of_no_or_too_many_pages_is_refused():
    host = Host(Platform(preset("spr")))
    for image in (b"", bytes(497 * PAGE)):
        with pytest.raises(TdxUnavailableError, match="1984 KiB"):
            host.enable_tdx(Altered(image, development_release().sigstruct))


def test_a_host_can_take_tdx_down_and_bring_it_up_again():
    host = Host(Platform(preset("spr")))
    before = host.memory.free_pages
    for _ in range(2):
        host.enable_tdx(development_release())
        with Build(host).do():
            with pytest.raises(KvmError, match="while a TD has a KeyID"):
                host.disable_tdx()
            assert host.tdx is not None
        pamts = [(base, size) for tdmr in host.tdx.tdmrs for base, size in tdmr.pamt]
        host.disable_tdx()
        assert host.tdx is None
        assert not host.memory.tdx_pages()
        assert host.memory.free_pages == before
        for base, size in pamts:
            assert host.memory.read(base, size) == bytes(size)  # with KeyID 0, and without a machine check
        assert not any(host.platform.memory.raw_line(base)[2] for base, _ in pamts)  # the TD-owner bits are clear
        with pytest.raises(KvmError):
            Kvm(host).create_vm(KVM_X86_TDX_VM)
