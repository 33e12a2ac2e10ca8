"""The ioctls on a vCPU's descriptor, from their bytes to the methods of `Vcpu` and of its implementation."""

import errno
from collections.abc import Callable
from typing import Final

from softtdx.abi import kvm_structs as wire
from softtdx.abi.kvm import MAX_XCRS, KvmExit, VcpuEventFlag
from softtdx.abi.kvm import KvmIoctl as Ioctl
from softtdx.kvm import ioctl_structs as structs
from softtdx.kvm.emulate import FEATURES
from softtdx.kvm.errors import KvmError
from softtdx.kvm.ioctl_tdx import vcpu_command
from softtdx.kvm.lapic_state import SIZE as LAPIC_SIZE
from softtdx.kvm.user_memory import Argument
from softtdx.kvm.vcpu import Vcpu

__all__ = ["call"]

_XSAVE_SIZE: Final = 4096
_VECTORS: Final = 256
_MAX_EXCEPTION, _NMI_VECTOR = 31, 2
_U32: Final = 0xFFFF_FFFF


def call(vcpu: Vcpu, arg: Argument) -> int:
    """One ioctl. EIO when the VM is dead, EINVAL for a request that a vCPU does not have."""
    if vcpu.vm.dead or vcpu.vm.closed:
        raise KvmError(errno.EIO, "the VM is dead")
    if arg.request == Ioctl.RUN:
        return _run(vcpu, arg)
    if arg.request == Ioctl.NMI:
        vcpu.nmi()
        return 0
    handler = _HANDLERS.get(arg.request)
    if handler is None:
        raise KvmError(errno.EINVAL, f"a vCPU has no ioctl {arg.request:#x}")
    with vcpu.taken():
        return handler(vcpu, arg) or 0


def _run(vcpu: Vcpu, arg: Argument) -> int:
    """KVM_RUN: EFAULT goes with KVM_EXIT_MEMORY_FAULT, EINTR with KVM_EXIT_INTR."""
    arg.nothing()
    reason = vcpu.run().exit_reason
    if reason is KvmExit.MEMORY_FAULT:
        raise KvmError(errno.EFAULT, "KVM_EXIT_MEMORY_FAULT")
    if reason is KvmExit.INTR:
        raise KvmError(errno.EINTR, "KVM_EXIT_INTR")
    return 0


# --- registers
def _regs(vcpu: Vcpu, arg: Argument) -> None:
    if arg.request == Ioctl.GET_REGS:
        arg.write(structs.pack_regs(vcpu.get_regs()))
    else:
        vcpu.set_regs(structs.unpack_regs(arg.parse(wire.RegsStruct)))


def _get_sregs(vcpu: Vcpu, arg: Argument) -> None:
    raw = wire.SregsStruct() if arg.request == Ioctl.GET_SREGS else wire.Sregs2Struct()
    structs.pack_sregs(vcpu.get_sregs(), raw)
    arg.write(raw)


def _set_sregs(vcpu: Vcpu, arg: Argument) -> None:
    if arg.request == Ioctl.SET_SREGS:
        raw: wire.SregsStruct | wire.Sregs2Struct = arg.parse(wire.SregsStruct)
        _visible(vcpu)
    else:
        _visible(vcpu)
        raw = arg.parse(wire.Sregs2Struct)
    vcpu.set_sregs(structs.unpack_sregs(raw))


def _get_fpu(vcpu: Vcpu, arg: Argument) -> None:
    arg.write(structs.fpu_of(vcpu.ops.get_fxsave()))


def _set_fpu(vcpu: Vcpu, arg: Argument) -> None:
    raw = arg.parse(wire.FpuStruct)
    vcpu.ops.set_fxsave(structs.put_fpu(raw, vcpu.ops.get_fxsave()))


def _get_xsave(vcpu: Vcpu, arg: Argument) -> None:
    """KVM_GET_XSAVE and KVM_GET_XSAVE2: all state that there is fits into 4096 bytes."""
    arg.write(vcpu.ops.get_fxsave())


def _set_xsave(vcpu: Vcpu, arg: Argument) -> None:
    vcpu.ops.set_fxsave(arg.read(_XSAVE_SIZE))


def _get_xcrs(vcpu: Vcpu, arg: Argument) -> None:
    raw = wire.XcrsStruct()
    raw.nr_xcrs = 1
    raw.xcrs[0].value = vcpu.ops.get_xcr0()
    arg.write(raw)


def _set_xcrs(vcpu: Vcpu, arg: Argument) -> None:
    raw = arg.parse(wire.XcrsStruct)
    vcpu.ops.get_xcr0()  # EINVAL for a vCPU whose state is protected comes first
    if raw.nr_xcrs > MAX_XCRS or raw.flags:
        raise KvmError(errno.EINVAL, f"{raw.nr_xcrs} XCRs with flags {raw.flags:#x}")
    for xcr in raw.xcrs[: raw.nr_xcrs]:
        if xcr.xcr == 0:
            vcpu.ops.set_xcr0(xcr.value)
            return


def _get_debugregs(vcpu: Vcpu, arg: Argument) -> None:
    raw = wire.DebugregsStruct()
    *db, raw.dr6, raw.dr7 = vcpu.ops.get_debugregs()
    raw.db = db
    arg.write(raw)


def _set_debugregs(vcpu: Vcpu, arg: Argument) -> None:
    raw = arg.parse(wire.DebugregsStruct)
    vcpu.ops.get_debugregs()
    if raw.flags or raw.dr6 > _U32 or raw.dr7 > _U32:
        raise KvmError(errno.EINVAL, f"DR6 {raw.dr6:#x}, DR7 {raw.dr7:#x}, flags {raw.flags:#x}")
    vcpu.ops.set_debugregs((*raw.db, raw.dr6, raw.dr7))


def _get_lapic(vcpu: Vcpu, arg: Argument) -> None:
    arg.write(vcpu.ops.get_lapic())


def _set_lapic(vcpu: Vcpu, arg: Argument) -> None:
    vcpu.ops.set_lapic(arg.read(LAPIC_SIZE))


def _translate(vcpu: Vcpu, arg: Argument) -> None:
    raw = arg.parse(wire.Translation)
    gpa = vcpu.ops.translate(raw.linear_address)
    raw.physical_address = (1 << 64) - 1 if gpa is None else gpa
    raw.valid, raw.writeable, raw.usermode = int(gpa is not None), 1, 0
    arg.write(raw)


def _visible(vcpu: Vcpu) -> None:
    """EINVAL for a vCPU whose state is protected."""
    vcpu.get_regs()


# --- events and interrupts
def _get_events(vcpu: Vcpu, arg: Argument) -> None:
    arg.write(vcpu.ops.get_events())


def _set_events(vcpu: Vcpu, arg: Argument) -> None:
    events, flag = arg.parse(wire.VcpuEventsStruct), VcpuEventFlag
    known = flag.VALID_NMI_PENDING | flag.VALID_SIPI_VECTOR | flag.VALID_SHADOW | flag.VALID_SMM
    if events.flags & ~int(known):  # exception payloads and triple faults need capabilities that are not there
        raise KvmError(errno.EINVAL, f"vCPU events with flags {events.flags:#x}")
    if events.exception_injected and (events.exception_nr > _MAX_EXCEPTION or events.exception_nr == _NMI_VECTOR):
        raise KvmError(errno.EINVAL, f"exception {events.exception_nr}")
    if events.flags & flag.VALID_SMM and (events.smi_smm or events.smi_pending or events.smi_smm_inside_nmi):
        raise KvmError(errno.EINVAL, "system-management mode, which is not there")
    vcpu.ops.set_events(events)


def _interrupt(vcpu: Vcpu, arg: Argument) -> None:
    vector = int.from_bytes(arg.read(4), "little")
    if vector >= _VECTORS:
        raise KvmError(errno.EINVAL, f"interrupt vector {vector}")
    vcpu.ops.queue_interrupt(vector)


def _get_mp_state(vcpu: Vcpu, arg: Argument) -> None:
    arg.write(int(vcpu.mp_state).to_bytes(4, "little"))


def _set_mp_state(vcpu: Vcpu, arg: Argument) -> None:
    vcpu.set_mp_state(int.from_bytes(arg.read(4), "little"))


# --- CPUID, MSRs and the rest
def _set_cpuid2(vcpu: Vcpu, arg: Argument) -> None:
    vcpu.set_cpuid2(structs.take_cpuid(arg))


def _get_cpuid2(vcpu: Vcpu, arg: Argument) -> None:
    structs.give_cpuid(arg, 0, vcpu.cpuid.values())


def _get_msrs(vcpu: Vcpu, arg: Argument) -> int:
    return structs.give_msrs(arg, vcpu.ops.read_msr)


def _set_msrs(vcpu: Vcpu, arg: Argument) -> int:
    def write(index: int, value: int) -> bool:
        if vcpu.has_run and index in FEATURES[1:] and vcpu.ops.read_msr(index) != value:
            return False  # what the processor can do does not change under a guest
        return vcpu.ops.write_msr(index, value)

    return structs.put_msrs(arg, write)


def _get_tsc_khz(vcpu: Vcpu, arg: Argument) -> int:
    del arg
    return vcpu.vm.tsc_khz


def _set_tsc_khz(vcpu: Vcpu, arg: Argument) -> None:
    """The frequency of a TD is the module's; that of a VM cannot be scaled here."""
    if arg.number & _U32 not in (0, vcpu.vm.tsc_khz):
        raise KvmError(errno.EINVAL, f"a TSC of {arg.number & _U32} kHz; this VM has {vcpu.vm.tsc_khz}")


def _set_guest_debug(vcpu: Vcpu, arg: Argument) -> None:
    """Single steps and breakpoints of user space: not there (KVM_CAP_SET_GUEST_DEBUG is 0) but to switch them off."""
    control = int.from_bytes(arg.read(arg.size)[:4], "little")
    _visible(vcpu)
    if control:
        raise KvmError(errno.EINVAL, f"KVM_SET_GUEST_DEBUG with control {control:#x}")


def _pre_fault(vcpu: Vcpu, arg: Argument) -> None:
    wanted = arg.parse(wire.PreFaultMemory)
    if wanted.flags:
        raise KvmError(errno.EINVAL, f"KVM_PRE_FAULT_MEMORY with flags {wanted.flags:#x}")
    try:
        done = vcpu.pre_fault_memory(wanted.gpa, wanted.size)
        wanted.gpa, wanted.size = wanted.gpa + done, wanted.size - done
    finally:
        arg.write(wanted)


def _enable_cap(vcpu: Vcpu, arg: Argument) -> None:
    del vcpu
    wanted = arg.parse(wire.EnableCap)
    raise KvmError(errno.EINVAL, f"KVM_ENABLE_CAP of capability {wanted.cap} on a vCPU")


def _encrypt_op(vcpu: Vcpu, arg: Argument) -> None:
    vcpu_command(vcpu, arg)


_HANDLERS: Final[dict[int, Callable[[Vcpu, Argument], int | None]]] = {
    Ioctl.GET_REGS: _regs,
    Ioctl.SET_REGS: _regs,
    Ioctl.GET_SREGS: _get_sregs,
    Ioctl.SET_SREGS: _set_sregs,
    Ioctl.GET_SREGS2: _get_sregs,
    Ioctl.SET_SREGS2: _set_sregs,
    Ioctl.GET_FPU: _get_fpu,
    Ioctl.SET_FPU: _set_fpu,
    Ioctl.GET_XSAVE: _get_xsave,
    Ioctl.GET_XSAVE2: _get_xsave,
    Ioctl.SET_XSAVE: _set_xsave,
    Ioctl.GET_XCRS: _get_xcrs,
    Ioctl.SET_XCRS: _set_xcrs,
    Ioctl.GET_DEBUGREGS: _get_debugregs,
    Ioctl.SET_DEBUGREGS: _set_debugregs,
    Ioctl.GET_LAPIC: _get_lapic,
    Ioctl.SET_LAPIC: _set_lapic,
    Ioctl.GET_VCPU_EVENTS: _get_events,
    Ioctl.SET_VCPU_EVENTS: _set_events,
    Ioctl.GET_MP_STATE: _get_mp_state,
    Ioctl.SET_MP_STATE: _set_mp_state,
    Ioctl.INTERRUPT: _interrupt,
    Ioctl.TRANSLATE: _translate,
    Ioctl.SET_CPUID2: _set_cpuid2,
    Ioctl.GET_CPUID2: _get_cpuid2,
    Ioctl.GET_MSRS: _get_msrs,
    Ioctl.SET_MSRS: _set_msrs,
    Ioctl.GET_TSC_KHZ: _get_tsc_khz,
    Ioctl.SET_TSC_KHZ: _set_tsc_khz,
    Ioctl.SET_GUEST_DEBUG: _set_guest_debug,
    Ioctl.PRE_FAULT_MEMORY: _pre_fault,
    Ioctl.ENABLE_CAP: _enable_cap,
    Ioctl.MEMORY_ENCRYPT_OP: _encrypt_op,
}
