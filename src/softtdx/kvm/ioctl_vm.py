"""The ioctls on a VM's descriptor, from their bytes to the methods of `Vm`."""

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from softtdx.abi import kvm_structs as wire
from softtdx.abi.kvm import MAX_IRQ_ROUTES, IoeventfdFlag, MemorySlotFlag
from softtdx.abi.kvm import KvmIoctl as Ioctl
from softtdx.kvm.errors import KvmError
from softtdx.kvm.eventfd import Eventfd
from softtdx.kvm.guest_memfd import GuestMemfd
from softtdx.kvm.ioctl_tdx import vm_command
from softtdx.kvm.user_memory import Argument
from softtdx.kvm.vm import Vm

if TYPE_CHECKING:
    from softtdx.kvm.ioctl import Process

__all__ = ["call"]

_ALL_SLOT_FLAGS: Final = int(MemorySlotFlag.LOG_DIRTY_PAGES | MemorySlotFlag.READONLY | MemorySlotFlag.GUEST_MEMFD)


def call(process: "Process", vm: Vm, arg: Argument) -> int:
    """One ioctl. EIO for a dead VM, ENOTTY for a request that a VM does not have."""
    if vm.dead or vm.closed:
        raise KvmError(errno.EIO, "the VM is dead")
    handler = _HANDLERS.get(arg.request)
    if handler is None:
        raise KvmError(errno.ENOTTY, f"a VM has no ioctl {arg.request:#x}")
    return handler(process, vm, arg) or 0


# --- memory
def _set_memory_region(process: "Process", vm: Vm, arg: Argument) -> None:
    file, offset = None, 0
    region: wire.UserspaceMemoryRegion | wire.UserspaceMemoryRegion2
    if arg.request == Ioctl.SET_USER_MEMORY_REGION2:
        region, flags = arg.parse(wire.UserspaceMemoryRegion2), _ALL_SLOT_FLAGS
    else:
        region, flags = arg.parse(wire.UserspaceMemoryRegion), _ALL_SLOT_FLAGS & ~int(MemorySlotFlag.GUEST_MEMFD)
    if region.flags & ~flags:
        raise KvmError(errno.EINVAL, f"memory slot flags {region.flags:#x}")
    if isinstance(region, wire.UserspaceMemoryRegion2) and region.flags & MemorySlotFlag.GUEST_MEMFD:
        if region.memory_size:
            found = process.file(region.guest_memfd)
            if not isinstance(found, GuestMemfd):
                raise KvmError(errno.EINVAL, f"descriptor {region.guest_memfd} is no guest_memfd")
            file = found
        offset = region.guest_memfd_offset
    vm.set_user_memory_region2(
        region.slot, region.guest_phys_addr, region.memory_size, region.userspace_addr, region.flags, file, offset
    )


def _create_guest_memfd(process: "Process", vm: Vm, arg: Argument) -> int:
    wanted = arg.parse(wire.CreateGuestMemfd)
    return process.add(vm.create_guest_memfd(wanted.size, wanted.flags))


def _set_memory_attributes(process: "Process", vm: Vm, arg: Argument) -> None:
    del process
    wanted = arg.parse(wire.MemoryAttributes)
    if wanted.flags:
        raise KvmError(errno.EINVAL, f"KVM_SET_MEMORY_ATTRIBUTES with flags {wanted.flags:#x}")
    vm.set_memory_attributes(wanted.address, wanted.size, wanted.attributes)


def _get_dirty_log(process: "Process", vm: Vm, arg: Argument) -> None:
    del process
    wanted = arg.parse(wire.DirtyLog)
    arg.at(wanted.dirty_bitmap).write(vm.get_dirty_log(wanted.slot))


def _clear_dirty_log(process: "Process", vm: Vm, arg: Argument) -> None:
    del process
    wanted = arg.parse(wire.ClearDirtyLog)
    bitmap = arg.at(wanted.dirty_bitmap).read(-(-wanted.num_pages // 8))
    vm.clear_dirty_log(wanted.slot, wanted.first_page, wanted.num_pages, bitmap)


# --- the VM as a whole
def _check_extension(process: "Process", vm: Vm, arg: Argument) -> int:
    del process
    return vm.check_extension(arg.number)


def _create_vcpu(process: "Process", vm: Vm, arg: Argument) -> int:
    return process.add(vm.create_vcpu(arg.number))


def _enable_cap(process: "Process", vm: Vm, arg: Argument) -> None:
    del process
    wanted = arg.parse(wire.EnableCap)
    if wanted.flags:
        raise KvmError(errno.EINVAL, f"KVM_ENABLE_CAP of capability {wanted.cap} with flags {wanted.flags:#x}")
    vm.enable_cap(wanted.cap, *wanted.args)


def _encrypt_op(process: "Process", vm: Vm, arg: Argument) -> None:
    del process
    vm_command(vm, arg)


def _set_tsc_khz(process: "Process", vm: Vm, arg: Argument) -> None:
    del process
    vm.set_tsc_khz(arg.number)


def _get_tsc_khz(process: "Process", vm: Vm, arg: Argument) -> int:
    del process, arg
    return vm.tsc_khz


def _accepted(process: "Process", vm: Vm, arg: Argument) -> None:
    """KVM_SET_TSS_ADDR and KVM_SET_IDENTITY_MAP_ADDR: for processors without unrestricted guests, which this is not."""
    del process, vm
    if arg.request == Ioctl.SET_TSS_ADDR:
        if arg.number > 0xFFFF_FFFF - 3 * 4096 + 1:
            raise KvmError(errno.EINVAL, f"TSS address {arg.number:#x}")
    else:
        arg.read(8)


def _set_boot_cpu(process: "Process", vm: Vm, arg: Argument) -> None:
    del process
    vm.set_boot_cpu(arg.number)


def _create_irqchip(process: "Process", vm: Vm, arg: Argument) -> None:
    """There is no PIC and no I/O APIC in this kernel (KVM_CAP_IRQCHIP is 0), only KVM_CAP_SPLIT_IRQCHIP."""
    del process, arg
    raise KvmError(errno.EEXIST if vm.irqchip else errno.EINVAL, "KVM_CREATE_IRQCHIP; KVM_CAP_SPLIT_IRQCHIP is there")


# --- interrupts
def _signal_msi(process: "Process", vm: Vm, arg: Argument) -> int:
    del process
    msi = arg.parse(wire.Msi)
    if msi.flags:
        raise KvmError(errno.EINVAL, f"KVM_SIGNAL_MSI with flags {msi.flags:#x}")
    return int(vm.signal_msi(msi.address_hi << 32 | msi.address_lo, msi.data))


def _set_gsi_routing(process: "Process", vm: Vm, arg: Argument) -> None:
    del process
    head = arg.parse(wire.IrqRoutingHead)
    if head.nr > MAX_IRQ_ROUTES or head.flags:
        raise KvmError(errno.EINVAL, f"{head.nr} interrupt routes with flags {head.flags:#x}")
    vm.set_gsi_routing(arg.parse_list(wire.IrqRoutingEntry, head.nr, head.SIZE))


def _irq_line(process: "Process", vm: Vm, arg: Argument) -> None:
    """KVM_IRQ_LINE and KVM_IRQ_LINE_STATUS: the latter returns how many took it, -1 when the level was not a rise."""
    del process
    line = arg.parse(wire.IrqLevel)
    taken = vm.set_irq(line.irq, line.level)
    if arg.request == Ioctl.IRQ_LINE_STATUS:
        line.irq = taken & 0xFFFF_FFFF
        arg.write(line)


def _irqfd(process: "Process", vm: Vm, arg: Argument) -> None:
    wanted = arg.parse(wire.Irqfd)
    vm.irqfd(_eventfd(process, wanted.fd), wanted.gsi, wanted.flags)


def _ioeventfd(process: "Process", vm: Vm, arg: Argument) -> None:
    wanted = arg.parse(wire.Ioeventfd)
    if wanted.flags & ~sum(IoeventfdFlag):
        raise KvmError(errno.EINVAL, f"ioeventfd with flags {wanted.flags:#x}")
    vm.io_bus.change(wanted.addr, wanted.len, wanted.datamatch, wanted.flags, _eventfd(process, wanted.fd))


def _eventfd(process: "Process", fd: int) -> Eventfd:
    file = process.file(fd)
    if not isinstance(file, Eventfd):
        raise KvmError(errno.EINVAL, f"descriptor {fd} is no eventfd")
    return file


_HANDLERS: Final[dict[int, Callable[["Process", Vm, Argument], int | None]]] = {
    Ioctl.CHECK_EXTENSION: _check_extension,
    Ioctl.CREATE_VCPU: _create_vcpu,
    Ioctl.SET_USER_MEMORY_REGION: _set_memory_region,
    Ioctl.SET_USER_MEMORY_REGION2: _set_memory_region,
    Ioctl.CREATE_GUEST_MEMFD: _create_guest_memfd,
    Ioctl.GET_DIRTY_LOG: _get_dirty_log,
    Ioctl.CLEAR_DIRTY_LOG: _clear_dirty_log,
    Ioctl.SET_MEMORY_ATTRIBUTES: _set_memory_attributes,
    Ioctl.ENABLE_CAP: _enable_cap,
    Ioctl.SIGNAL_MSI: _signal_msi,
    Ioctl.SET_GSI_ROUTING: _set_gsi_routing,
    Ioctl.IRQ_LINE: _irq_line,
    Ioctl.IRQ_LINE_STATUS: _irq_line,
    Ioctl.IRQFD: _irqfd,
    Ioctl.IOEVENTFD: _ioeventfd,
    Ioctl.SET_TSC_KHZ: _set_tsc_khz,
    Ioctl.GET_TSC_KHZ: _get_tsc_khz,
    Ioctl.SET_TSS_ADDR: _accepted,
    Ioctl.SET_IDENTITY_MAP_ADDR: _accepted,
    Ioctl.SET_BOOT_CPU_ID: _set_boot_cpu,
    Ioctl.CREATE_IRQCHIP: _create_irqchip,
    Ioctl.MEMORY_ENCRYPT_OP: _encrypt_op,
}
