"""Building a TD through KVM's ioctls: the errno of each misuse, and that nothing is lost wherever a build ends."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from td_build_steps import PAGES, Build

from softtdx.abi.kvm import (
    KVM_X86_DEFAULT_VM,
    KVM_X86_TDX_VM,
    MEMORY_ATTRIBUTE_PRIVATE,
    KvmCap,
    MemorySlotFlag,
    TdxCommand,
)
from softtdx.abi.status import Status
from softtdx.abi.structs import Attributes
from softtdx.hw import Platform, Registers, preset
from softtdx.kvm import Host, Kvm, KvmError
from softtdx.kvm import seamcalls as sc
from softtdx.kvm.memory import PAGE
from softtdx.kvm.uapi import CpuidEntry, Regs, Sregs, TdxCapabilities, TdxInitMemRegion, TdxInitVm
from softtdx.vmm.boot import boot_host

EIO, ENOMEM, EEXIST, EINVAL, ENOSPC, ENOTTY = 5, 12, 17, 22, 28, 25


def fails(code, call, *args):
    with pytest.raises(KvmError) as error:
        call(*args)
    assert error.value.errno == code, error.value
    return error.value


def test_a_host_without_tdx_has_no_tds():
    kvm = Kvm(Host(Platform(preset("spr"))))
    fails(EINVAL, kvm.create_vm, KVM_X86_TDX_VM)
    fails(EINVAL, kvm.create_vm, 99)
    fails(EINVAL, kvm.create_vm, -1)


def test_capabilities_name_what_may_be_configured(host):
    with Build(host) as build:
        caps = build.vm.memory_encrypt_op(TdxCommand.CAPABILITIES)
        assert isinstance(caps, TdxCapabilities)
        assert caps.supported_attrs & Attributes.SEPT_VE_DISABLE
        assert caps.supported_xfam & 3 == 3
        assert len(caps.cpuid) == len(host.tdx.sysinfo.cpuid_config) > 0


@pytest.mark.parametrize("steps", range(len(Build.steps) + 1))
def test_a_td_whose_build_ends_anywhere_leaves_nothing_behind(host, steps):
    with Build(host) as build:
        build.do(steps)


@pytest.mark.parametrize(
    "init",
    [
        TdxInitVm(attributes=1 << 1),
        TdxInitVm(attributes=1 << 63 | 1 << 40),
        TdxInitVm(xfam=3 | 1 << 19),
        TdxInitVm(mrconfigid=bytes(47)),
        TdxInitVm(mrowner=b""),
        TdxInitVm(cpuid=(CpuidEntry(0x8000_0008, None, 40 << 16),)),
        TdxInitVm(cpuid=(CpuidEntry(0x4000_0000, None),)),
        TdxInitVm(cpuid=(CpuidEntry(7, 0, ebx=1 << 11),)),
    ],
)
def test_bad_td_parameters_are_einval_and_cost_nothing(host, init):
    with Build(host, init) as build:
        fails(EINVAL, build.init_vm)
        build.init = TdxInitVm(attributes=Attributes.SEPT_VE_DISABLE)
        build.init_vm()


def test_steps_out_of_order_are_refused(host):
    with Build(host) as build:
        fails(EIO, build.create_vcpu)
        fails(EINVAL, build.finalize)
        build.init_vm()
        fails(EINVAL, build.init_vm)
        fails(EIO, build.finalize)  # the module wants a vCPU first
        build.create_vcpu()
        fails(EEXIST, build.vm.create_vcpu, 0)
        fails(EINVAL, build.vm.create_vcpu, 1 << 20)
        fails(EINVAL, build.vcpus[0].run)
        fails(EINVAL, build.add_memory)
        build.init_vcpu()
        fails(EINVAL, build.init_vcpu)
        fails(EINVAL, build.add_memory)
        build.add_slot()
        fails(EINVAL, build.add_memory)
        build.make_private()
        build.add_memory()
        fails(EEXIST, build.add_memory)
        build.finalize()
        fails(EINVAL, build.finalize)
        fails(EINVAL, build.add_memory)
        build.create_vcpu()
        fails(EINVAL, build.init_vcpu)


def test_unknown_commands_and_wrong_arguments_are_refused(host):
    with Build(host) as build:
        for command, argument in ((99, None), (TdxCommand.INIT_VM, None), (TdxCommand.INIT_VM, 7)):
            fails(EINVAL, build.vm.memory_encrypt_op, command, argument)
        build.do(5)
        vcpu = build.vcpus[0]
        for command, argument in ((99, None), (TdxCommand.INIT_VCPU, "x"), (TdxCommand.INIT_MEM_REGION, None)):
            fails(EINVAL, vcpu.memory_encrypt_op, command, argument)
    kvm = Kvm(host)
    vm = kvm.create_vm(KVM_X86_DEFAULT_VM)
    fails(ENOTTY, vm.memory_encrypt_op, TdxCommand.CAPABILITIES)
    fails(ENOTTY, vm.create_vcpu(0).memory_encrypt_op, TdxCommand.INIT_VCPU, 0)
    fails(EINVAL, vm.create_guest_memfd, PAGE)
    fails(EINVAL, vm.set_memory_attributes, 0, PAGE, MEMORY_ATTRIBUTE_PRIVATE)
    vm.close()
    fails(EIO, vm.create_vcpu, 1)


def test_the_state_of_a_tds_vcpu_is_not_for_user_space(host):
    with Build(host) as build:
        build.do(5)
        vcpu = build.vcpus[0]
        fails(EINVAL, vcpu.get_regs)
        fails(EINVAL, vcpu.set_regs, Regs())
        fails(EINVAL, vcpu.set_sregs, Sregs())


def test_memory_slots_follow_the_kernels_rules(host):
    with Build(host) as build:
        build.do(3)
        vm, mm = build.vm, build.kvm.mm
        hva = mm.mmap(4 * PAGE)
        region = vm.set_user_memory_region2
        fails(EINVAL, region, 1, 1 << 47, PAGE, hva)  # the shared bit is no part of a slot's address
        fails(EEXIST, region, 1, (PAGES - 1) * PAGE, 2 * PAGE, hva)
        fails(EINVAL, region, 0, 0, 2 * PAGE, hva)
        fails(14, region, 1, 1 << 30, 8 * PAGE, hva)
        fails(EINVAL, region, 1, 1 << 30, PAGE, hva, MemorySlotFlag.GUEST_MEMFD)
        fails(EINVAL, region, 1, 1 << 30, PAGE, hva, 0, build.file)
        fails(EEXIST, region, 1, 1 << 30, PAGE, hva, MemorySlotFlag.GUEST_MEMFD, build.file)
        fails(EINVAL, region, 1, 1 << 30, PAGE, hva, MemorySlotFlag.GUEST_MEMFD, vm.create_guest_memfd(PAGE), PAGE)
        fails(EINVAL, region, 9, 0, 0, 0)
        fails(EINVAL, vm.create_guest_memfd, 100)
        fails(EINVAL, vm.create_guest_memfd, 0)
        fails(EINVAL, vm.create_guest_memfd, PAGE, 1)
        for args in ((1, PAGE, 8), (0, 1, 8), (0, 0, 8), (0, PAGE, 1), (0, 1 << 60, 8), (-PAGE, PAGE, 8)):
            fails(EINVAL, vm.set_memory_attributes, *args)
        region(1, 1 << 30, 4 * PAGE, hva)
        region(1, 0, 0, 0)
        region(1, 1 << 30, 4 * PAGE, hva)


@pytest.mark.parametrize(
    "region",
    [
        TdxInitMemRegion(0, 0, 1),
        TdxInitMemRegion(0, 1, 1),
        TdxInitMemRegion(8, 0, 1),
        TdxInitMemRegion(0, 0, 0),
        TdxInitMemRegion(0, 0, -1),
        TdxInitMemRegion(0, PAGES * PAGE, 1),
        TdxInitMemRegion(0, 0, PAGES + 1),
        TdxInitMemRegion(0, 1 << 47, 1),
    ],
)
def test_a_bad_initial_region_is_refused_and_the_td_can_still_be_closed(host, region):
    with Build(host) as build:
        build.do(5)
        with pytest.raises(KvmError) as error:
            build.vcpus[0].memory_encrypt_op(TdxCommand.INIT_MEM_REGION, region)
        assert error.value.errno in (EINVAL, 14)


def test_when_every_keyid_is_taken_the_next_td_is_enospc(host):
    builds = [Build(host) for _ in range(host.tdx.free_keyids)]
    for build in builds:
        build.init_vm()
    with Build(host) as one_too_many:
        fails(ENOSPC, one_too_many.init_vm)
        builds[3].close()
        one_too_many.init_vm()
    for build in builds:
        build.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 70), status=st.sampled_from([Status.OPERAND_INVALID, Status.PAGE_METADATA_INCORRECT]))
def test_whatever_seamcall_of_a_build_fails_nothing_is_lost(host, at, status):
    real, count = sc.seamcall, 0

    def failing(lp, leaf, version=0, **operands):
        nonlocal count
        count += 1
        if count == at + 1:
            return Registers(rax=status | 1)
        return real(lp, leaf, version, **operands)

    build = Build(host)
    sc.seamcall = failing
    caught = []
    try:
        build.do()
    except KvmError as error:
        caught.append(error)
    finally:
        sc.seamcall = real
        build.close()
    assert len(caught) == (at < count)
    assert all(error.errno in (EIO, EINVAL) and error.hw_error == status | 1 for error in caught)


def test_two_tds_never_share_a_page(host):
    with Build(host).do() as one, Build(host).do() as other:
        pages = [
            {mapping.hpa for _, mapping in build.vm.ops.secure.mappings()}
            | {build.vm.ops.tdr, *build.vm.ops.tdcs, build.vcpus[0].ops.tdvpr, *build.vcpus[0].ops.tdcx}
            for build in (one, other)
        ]
        assert not pages[0] & pages[1]
        assert len(pages[0]) == len(pages[1]) > 2


def test_the_same_build_measures_the_same(host):
    digests = []
    for _ in range(2):
        with Build(host).do() as build:
            digests.append([build.vm.ops.read_td_field("MRTD", i) for i in range(6)])
    assert digests[0] == digests[1]
    assert any(digests[0])


def test_when_the_module_dies_the_vm_still_closes_and_what_it_held_is_never_used_again():
    host = boot_host()
    build = Build(host).do()
    held = set(host.memory.leaked())
    host.platform.seam.unbreakable_shutdown(to_loader=False)
    fails(19, build.vcpus[0].run)
    fails(19, build.vm.close)
    build.kvm.mm.close()
    assert set(host.memory.leaked()) == held
    assert host.tdx.free_keyids == len(host.platform.description.private_keyids) - 2
    fails(19, Build(host).init_vm)
    everything = {host.memory.alloc() for _ in range(host.memory.free_pages)}
    assert not everything & held


def test_get_cpuid_tells_what_the_td_will_see(host):
    with Build(host) as build:
        build.do(5)
        entries = build.vcpus[0].memory_encrypt_op(TdxCommand.GET_CPUID)
        told = {(e.function, e.index): e for e in entries}
        assert len(told) == len(entries)
        assert told[0, None].eax >= 0x21  # the leaf that says "IntelTDX"
        assert {row.leaf for row in host.tdx.sysinfo.cpuid_config} <= {leaf for leaf, _ in told}
        assert told[1, None].edx & 1 << 9  # APIC: a TD always has it
        assert told[0x8000_0008, None].eax >> 16 & 0xFF == 48
        build.finalize()
        fails(EINVAL, build.vcpus[0].memory_encrypt_op, TdxCommand.GET_CPUID)


def test_pre_faulting_follows_the_rules_and_maps_large_pages(host):
    mib = 1 << 20
    with Build(host) as build:
        build.do(3)
        file = build.vm.create_guest_memfd(4 * mib)
        hva = build.kvm.mm.mmap(4 * mib)
        build.vm.set_user_memory_region2(1, 1 << 30, 4 * mib, hva, MemorySlotFlag.GUEST_MEMFD, file)
        build.vm.set_memory_attributes(1 << 30, 3 * mib, MEMORY_ATTRIBUTE_PRIVATE)
        build.create_vcpu()
        build.init_vcpu()
        vcpu, secure = build.vcpus[0], build.vm.ops.secure
        fails(95, vcpu.pre_fault_memory, 1 << 30, PAGE)
        build.finalize()
        for bad in ((1, PAGE), (0, 1), (0, 0), (-PAGE, PAGE)):
            fails(EINVAL, vcpu.pre_fault_memory, *bad)
        fails(2, vcpu.pre_fault_memory, 1 << 31, PAGE)
        assert vcpu.pre_fault_memory(1 << 30, 4 * mib) == 3 * mib  # as far as it is private
        assert (secure.huge_pages, secure.mapped_pages) == (1, 3 * mib // PAGE)
        vcpu.pre_fault_memory(1 << 30, 3 * mib)
        assert secure.mapped_pages == 3 * mib // PAGE
        fails(2, vcpu.pre_fault_memory, (1 << 30) + 3 * mib, PAGE)
        file.punch_hole(mib, mib)
        assert (secure.huge_pages, secure.mapped_pages) == (0, 2 * mib // PAGE)
        for bad in ((1, PAGE), (0, 1), (0, 0), (4 * mib, PAGE), (-PAGE, PAGE)):
            fails(EINVAL, file.punch_hole, *bad)
        build.vm.set_user_memory_region2(1, 0, 0, 0)
        assert secure.mapped_pages == 0


def test_extensions_depend_on_the_type_of_vm(host):
    kvm = Kvm(host)
    assert kvm.get_api_version() == 12
    assert kvm.check_extension(KvmCap.VM_TYPES) == 1 << KVM_X86_DEFAULT_VM | 1 << KVM_X86_TDX_VM
    assert kvm.check_extension(0xFFFF) == 0
    vm = kvm.create_vm()
    assert vm.check_extension(KvmCap.MEMORY_ATTRIBUTES) == vm.check_extension(KvmCap.GUEST_MEMFD) == 0
    vm.close()
    vm.close()
    with Build(host) as build:
        assert build.vm.check_extension(KvmCap.MEMORY_ATTRIBUTES) == MEMORY_ATTRIBUTE_PRIVATE
        assert build.vm.check_extension(KvmCap.GUEST_MEMFD) == 1
