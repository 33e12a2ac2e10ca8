"""KVM_MEMORY_ENCRYPT_OP of a TD and of its vCPUs: struct kvm_tdx_cmd (arch/x86/kvm/vmx/tdx.c, tdx_vm_ioctl)."""

import errno

from softtdx.abi import kvm_structs as wire
from softtdx.abi.kvm import INIT_MEM_REGION_MEASURE, TdxCommand
from softtdx.kvm import ioctl_structs as structs
from softtdx.kvm.errors import KvmError
from softtdx.kvm.tdx import TdState, TdxVm
from softtdx.kvm.uapi import TdxCapabilities, TdxInitMemRegion
from softtdx.kvm.user_memory import Argument
from softtdx.kvm.vcpu import Vcpu
from softtdx.kvm.vm import Vm

__all__ = ["vcpu_command", "vm_command"]


def vm_command(vm: Vm, arg: Argument) -> None:
    """A command on the VM's descriptor. `hw_error` returns the status of the SEAMCALL that failed."""
    if not isinstance(vm.ops, TdxVm):
        raise _no_td()
    cmd = arg.parse(wire.TdxCmd)
    if cmd.hw_error:
        raise KvmError(errno.EINVAL, f"struct kvm_tdx_cmd with hw_error {cmd.hw_error:#x}")
    if cmd.id not in (TdxCommand.CAPABILITIES, TdxCommand.INIT_VM, TdxCommand.FINALIZE_VM):
        raise KvmError(errno.EINVAL, f"KVM_MEMORY_ENCRYPT_OP {cmd.id} on a TD")
    try:
        if cmd.flags and cmd.id != TdxCommand.FINALIZE_VM:  # which looks at none
            raise KvmError(errno.EINVAL, f"struct kvm_tdx_cmd with flags {cmd.flags:#x}")
        if cmd.id == TdxCommand.CAPABILITIES:
            _capabilities(vm, arg.at(cmd.data))
        elif cmd.id == TdxCommand.INIT_VM:
            if vm.ops.state is not TdState.UNINITIALIZED:
                raise KvmError(errno.EINVAL, "KVM_TDX_INIT_VM was done before")
            vm.memory_encrypt_op(cmd.id, structs.parse_init_vm(arg.at(cmd.data)))
        else:
            vm.memory_encrypt_op(cmd.id)
    except KvmError as error:
        cmd.hw_error = error.hw_error
        raise
    finally:
        arg.write(cmd)


def _capabilities(vm: Vm, where: Argument) -> None:
    caps = vm.memory_encrypt_op(TdxCommand.CAPABILITIES)
    assert isinstance(caps, TdxCapabilities)
    head = wire.TdxCapabilitiesHead()
    head.supported_attrs, head.supported_xfam = caps.supported_attrs, caps.supported_xfam
    head.kernel_tdvmcallinfo_1_r11, head.kernel_tdvmcallinfo_1_r12 = caps.kernel_tdvmcallinfo
    head.user_tdvmcallinfo_1_r11, head.user_tdvmcallinfo_1_r12 = caps.user_tdvmcallinfo
    structs.give_cpuid(where, head.SIZE, caps.cpuid)
    where.write(head)


def vcpu_command(vcpu: Vcpu, arg: Argument) -> None:
    """A command on a vCPU's descriptor; the structure itself is not written back."""
    ops = vcpu.vm.ops
    if not isinstance(ops, TdxVm):
        raise _no_td()
    if ops.state is not TdState.INITIALIZED:
        raise KvmError(errno.EINVAL, "a KVM_TDX command of a vCPU needs a TD that is not yet finalised")
    cmd = arg.parse(wire.TdxCmd)
    if cmd.hw_error:
        raise KvmError(errno.EINVAL, f"struct kvm_tdx_cmd with hw_error {cmd.hw_error:#x}")
    where = arg.at(cmd.data)
    if cmd.id == TdxCommand.INIT_VCPU:
        if cmd.flags:
            raise KvmError(errno.EINVAL, f"KVM_TDX_INIT_VCPU with flags {cmd.flags:#x}")
        vcpu.memory_encrypt_op(cmd.id, cmd.data)
    elif cmd.id == TdxCommand.INIT_MEM_REGION:
        _init_mem_region(vcpu, cmd, where)
    elif cmd.id == TdxCommand.GET_CPUID:
        entries = vcpu.memory_encrypt_op(cmd.id)
        assert isinstance(entries, list)
        structs.give_cpuid(where, 0, entries, tell=True)
    else:
        raise KvmError(errno.EINVAL, f"KVM_MEMORY_ENCRYPT_OP {cmd.id} on a TD's vCPU")


def _init_mem_region(vcpu: Vcpu, cmd: wire.TdxCmd, where: Argument) -> None:
    if cmd.flags & ~INIT_MEM_REGION_MEASURE:
        raise KvmError(errno.EINVAL, f"KVM_TDX_INIT_MEM_REGION with flags {cmd.flags:#x}")
    raw = where.parse(wire.TdxInitMemRegion)
    region = TdxInitMemRegion(raw.source_addr, raw.gpa, raw.nr_pages, bool(cmd.flags & INIT_MEM_REGION_MEASURE))
    try:
        vcpu.memory_encrypt_op(cmd.id, region)
    finally:
        raw.source_addr, raw.gpa, raw.nr_pages = region.source_addr, region.gpa, region.nr_pages
        where.write(raw)  # how far it came


def _no_td() -> KvmError:
    return KvmError(errno.ENOTTY, "this type of VM has no KVM_MEMORY_ENCRYPT_OP")
