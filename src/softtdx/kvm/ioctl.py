"""ioctl(2) as the kernel has it: file descriptors, request numbers, structures as bytes.

The methods of `Kvm`, `Vm` and `Vcpu` are the same ioctls for a VMM in Python; this is the face for one that is
written against /dev/kvm. A structure is a bytearray, or the address of one in the process's memory; results are
written into it. What fails raises KvmError with the kernel's errno. struct kvm_run is `Process.kvm_run(fd)`.
(Kernel: virt/kvm/kvm_main.c, arch/x86/kvm/x86.c, arch/x86/kvm/vmx/tdx.c; Documentation/virt/kvm/api.rst.)
"""

import errno
from collections.abc import Callable
from typing import Final

from softtdx.abi import kvm as abi
from softtdx.abi.kvm import KvmCap, KvmExit, TdxCommand
from softtdx.abi.kvm import KvmIoctl as Ioctl
from softtdx.kvm import ioctl_structs as structs
from softtdx.kvm.errors import KvmError
from softtdx.kvm.guest_memfd import GuestMemfd
from softtdx.kvm.host import Host
from softtdx.kvm.kvm import Kvm
from softtdx.kvm.mm import AddressSpace
from softtdx.kvm.tdx import TdxVm
from softtdx.kvm.uapi import KvmRun, TdxCapabilities
from softtdx.kvm.vcpu import Vcpu
from softtdx.kvm.vm import Vm

__all__ = ["Process"]

_FIRST_FD = 3
_SIZE_SHIFT, _SIZE_MASK = 16, 0x3FFF  # of a request number
_READS, _WRITES = 1 << 30, 1 << 31  # the kernel reads, or writes, the structure
_MAX_CPUID_ENTRIES = 256
_HEAD = abi.Cpuid2Head.SIZE
_STATE: Final = frozenset(
    {
        Ioctl.GET_SREGS, Ioctl.SET_SREGS, Ioctl.GET_SREGS2, Ioctl.GET_FPU, Ioctl.SET_FPU, Ioctl.GET_DEBUGREGS,
        Ioctl.SET_DEBUGREGS, Ioctl.GET_XSAVE, Ioctl.SET_XSAVE, Ioctl.GET_XSAVE2, Ioctl.GET_XCRS, Ioctl.SET_XCRS,
    }
)  # fmt: skip
"""Requests for a vCPU's state, beside those that are done here: what a TD's vCPU refuses by EINVAL."""

File = Kvm | Vm | Vcpu | GuestMemfd


class Process:
    """A process with open files and memory: what a VMM is to the kernel."""

    def __init__(self, host: Host) -> None:
        """A process that has opened nothing; `mm` is its memory."""
        self.host = host
        self.mm = AddressSpace(host.memory, host.mm.swap)
        self._files: dict[int, File] = {}
        self._next = _FIRST_FD

    def open(self, path: str = "/dev/kvm") -> int:
        """The system call: /dev/kvm is opened, ENOENT for any other path."""
        if path != "/dev/kvm":
            raise KvmError(errno.ENOENT, f"{path!r} cannot be opened here, only /dev/kvm can")
        return self._new(Kvm(self.host, self.mm))

    def close(self, fd: int) -> None:
        """The system call. A VM ends with the last descriptor of it and of its vCPUs."""
        file = self._file(fd)
        del self._files[fd]
        vm = file.vm if isinstance(file, Vcpu) else file
        if isinstance(vm, Vm) and not any(
            f is vm or (isinstance(f, Vcpu) and f.vm is vm) for f in self._files.values()
        ):
            vm.close()

    def exit(self) -> None:
        """The process is gone: every descriptor is closed, its memory freed."""
        for fd in sorted(self._files, reverse=True):
            self.close(fd)
        self.mm.close()

    def kvm_run(self, fd: int) -> KvmRun:
        """Struct kvm_run of a vCPU, which a process maps from its descriptor."""
        file = self._file(fd)
        if not isinstance(file, Vcpu):
            raise KvmError(errno.ENODEV, f"descriptor {fd} is not a vCPU's")
        return file.kvm_run

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        """The system call: a number or 0. KvmError: EBADF, ENOTTY or EINVAL for an unknown request, EFAULT, its own."""
        file = self._file(fd)
        if isinstance(file, Kvm):
            return self._system(file, request, argument)
        if isinstance(file, Vm):
            return self._vm(file, request, argument)
        if isinstance(file, Vcpu):
            return self._vcpu(file, request, argument)
        raise KvmError(errno.ENOTTY, f"ioctl {request:#x} on a guest_memfd")

    # --- descriptors and memory
    def _file(self, fd: int) -> File:
        file = self._files.get(fd)
        if file is None:
            raise KvmError(errno.EBADF, f"file descriptor {fd}")
        return file

    def _new(self, file: File) -> int:
        fd = self._next
        self._next += 1
        self._files[fd] = file
        return fd

    def _copy_in(self, argument: int | bytearray, size: int, offset: int = 0) -> bytes:
        """copy_from_user. EFAULT for what is not there."""
        if isinstance(argument, int):
            return self.mm.read(argument + offset, size)
        if len(argument) < offset + size:
            raise KvmError(errno.EFAULT, f"a structure of {offset + size} bytes in {len(argument)} bytes")
        return bytes(argument[offset : offset + size])

    def _copy_out(self, argument: int | bytearray, data: bytes, offset: int = 0) -> None:
        """copy_to_user."""
        if isinstance(argument, int):
            self.mm.write(argument + offset, data)
            return
        if len(argument) < offset + len(data):
            raise KvmError(errno.EFAULT, f"a structure of {offset + len(data)} bytes in {len(argument)} bytes")
        argument[offset : offset + len(data)] = data

    def _struct(self, request: int, argument: int | bytearray) -> bytes:
        return self._copy_in(argument, request >> _SIZE_SHIFT & _SIZE_MASK)

    def _number(self, argument: int | bytearray) -> int:
        if not isinstance(argument, int):
            raise KvmError(errno.EINVAL, "this ioctl takes a number")
        return argument

    # --- /dev/kvm
    def _system(self, kvm: Kvm, request: int, argument: int | bytearray) -> int:
        if request == Ioctl.GET_API_VERSION:
            if argument:
                raise KvmError(errno.EINVAL, "KVM_GET_API_VERSION takes no argument")
            return kvm.get_api_version()
        if request == Ioctl.CHECK_EXTENSION:
            return kvm.check_extension(self._number(argument))
        if request == Ioctl.CREATE_VM:
            return self._new(kvm.create_vm(self._number(argument)))
        if request == Ioctl.GET_SUPPORTED_CPUID:
            self._give_cpuid(argument, 0, structs.cpuid_entries(kvm.get_supported_cpuid()))
            return 0
        raise KvmError(errno.EINVAL, f"/dev/kvm has no ioctl {request:#x}")

    # --- a VM
    def _vm(self, vm: Vm, request: int, argument: int | bytearray) -> int:
        if vm.dead or vm.closed:
            raise KvmError(errno.EIO, "the VM is dead")
        if request == Ioctl.CHECK_EXTENSION:
            return vm.check_extension(self._number(argument))
        if request == Ioctl.CREATE_VCPU:
            return self._new(vm.create_vcpu(self._number(argument)))
        handler = _VM.get(request)
        if handler is None:
            raise KvmError(errno.ENOTTY, f"a VM has no ioctl {request:#x}")
        return handler(self, vm, request, argument)

    def _set_memory_region(self, vm: Vm, request: int, argument: int | bytearray) -> int:
        data = self._struct(request, argument)
        file, offset = None, 0
        region: abi.UserspaceMemoryRegion | abi.UserspaceMemoryRegion2
        if request == Ioctl.SET_USER_MEMORY_REGION2:
            region = abi.UserspaceMemoryRegion2.parse(data, strict=False)
            if region.flags & abi.MemorySlotFlag.GUEST_MEMFD:
                found = self._file(region.guest_memfd)
                if not isinstance(found, GuestMemfd):
                    raise KvmError(errno.EINVAL, f"descriptor {region.guest_memfd} is no guest_memfd")
                file, offset = found, region.guest_memfd_offset
        else:
            region = abi.UserspaceMemoryRegion.parse(data)
        if region.flags & ~_ALL_SLOT_FLAGS:
            raise KvmError(errno.EINVAL, f"memory slot flags {region.flags:#x}")
        vm.set_user_memory_region2(
            region.slot, region.guest_phys_addr, region.memory_size, region.userspace_addr, region.flags, file, offset
        )
        return 0

    def _create_guest_memfd(self, vm: Vm, request: int, argument: int | bytearray) -> int:
        wanted = abi.CreateGuestMemfd.parse(self._struct(request, argument), strict=False)
        return self._new(vm.create_guest_memfd(wanted.size, wanted.flags))

    def _set_memory_attributes(self, vm: Vm, request: int, argument: int | bytearray) -> int:
        wanted = abi.MemoryAttributes.parse(self._struct(request, argument))
        if wanted.flags:
            raise KvmError(errno.EINVAL, f"KVM_SET_MEMORY_ATTRIBUTES with flags {wanted.flags:#x}")
        vm.set_memory_attributes(wanted.address, wanted.size, wanted.attributes)
        return 0

    def _enable_cap(self, vm: Vm, request: int, argument: int | bytearray) -> int:
        wanted = abi.EnableCap.parse(self._struct(request, argument), strict=False)
        if wanted.cap == KvmCap.MANUAL_DIRTY_LOG_PROTECT2 and not wanted.flags:
            vm.enable_manual_dirty_log(wanted.args[0])
            return 0
        if wanted.flags or wanted.cap != KvmCap.SPLIT_IRQCHIP:
            raise KvmError(errno.EINVAL, f"KVM_ENABLE_CAP of capability {wanted.cap} with flags {wanted.flags:#x}")
        vm.create_irqchip()
        return 0

    def _get_dirty_log(self, vm: Vm, request: int, argument: int | bytearray) -> int:
        wanted = abi.DirtyLog.parse(self._struct(request, argument), strict=False)
        self.mm.write(wanted.dirty_bitmap, vm.get_dirty_log(wanted.slot))
        return 0

    def _clear_dirty_log(self, vm: Vm, request: int, argument: int | bytearray) -> int:
        wanted = abi.ClearDirtyLog.parse(self._struct(request, argument), strict=False)
        bitmap = self.mm.read(wanted.dirty_bitmap, -(-wanted.num_pages // 8))
        vm.clear_dirty_log(wanted.slot, wanted.first_page, wanted.num_pages, bitmap)
        return 0

    def _signal_msi(self, vm: Vm, request: int, argument: int | bytearray) -> int:
        msi = abi.Msi.parse(self._struct(request, argument), strict=False)
        if msi.flags:
            raise KvmError(errno.EINVAL, f"KVM_SIGNAL_MSI with flags {msi.flags:#x}")
        return int(vm.signal_msi(msi.address_hi << 32 | msi.address_lo, msi.data))

    # --- a vCPU
    def _vcpu(self, vcpu: Vcpu, request: int, argument: int | bytearray) -> int:
        if vcpu.vm.dead or vcpu.vm.closed:
            raise KvmError(errno.EIO, "the VM is dead")
        if request == Ioctl.RUN:
            return self._run(vcpu, argument)
        handler = _VCPU.get(request)
        if handler is not None:
            return handler(self, vcpu, request, argument)
        if request in _STATE and isinstance(vcpu.vm.ops, TdxVm):
            raise KvmError(errno.EINVAL, "the state of a TD's vCPU is protected")
        raise KvmError(errno.EINVAL, f"a vCPU has no ioctl {request:#x}")

    def _run(self, vcpu: Vcpu, argument: int | bytearray) -> int:
        """KVM_RUN: EFAULT goes with KVM_EXIT_MEMORY_FAULT, EINTR with KVM_EXIT_INTR."""
        if argument:
            raise KvmError(errno.EINVAL, "KVM_RUN takes no argument")
        reason = vcpu.run().exit_reason
        if reason is KvmExit.MEMORY_FAULT:
            raise KvmError(errno.EFAULT, "KVM_EXIT_MEMORY_FAULT")
        if reason is KvmExit.INTR:
            raise KvmError(errno.EINTR, "KVM_EXIT_INTR")
        return 0

    def _regs(self, vcpu: Vcpu, request: int, argument: int | bytearray) -> int:
        if request == Ioctl.GET_REGS:
            self._copy_out(argument, structs.pack_regs(vcpu.get_regs()))
        else:
            vcpu.set_regs(structs.unpack_regs(self._struct(request, argument)))
        return 0

    def _set_sregs2(self, vcpu: Vcpu, request: int, argument: int | bytearray) -> int:
        vcpu.set_sregs(structs.unpack_sregs2(self._struct(request, argument)))
        return 0

    def _cpuid2(self, vcpu: Vcpu, request: int, argument: int | bytearray) -> int:
        if request == Ioctl.GET_CPUID2:
            self._give_cpuid(argument, 0, structs.cpuid_entries(vcpu.cpuid.values()))
        else:
            vcpu.set_cpuid2(structs.parse_cpuid(self._take_cpuid(argument, 0)))
        return 0

    def _pre_fault(self, vcpu: Vcpu, request: int, argument: int | bytearray) -> int:
        wanted = abi.PreFaultMemory.parse(self._struct(request, argument), strict=False)
        if wanted.flags:
            raise KvmError(errno.EINVAL, f"KVM_PRE_FAULT_MEMORY with flags {wanted.flags:#x}")
        vcpu.pre_fault_memory(wanted.gpa, wanted.size)
        wanted.gpa, wanted.size = wanted.gpa + wanted.size, 0
        self._copy_out(argument, bytes(wanted))
        return 0

    # --- struct kvm_cpuid2: a count, and as many entries behind it
    def _take_cpuid(self, argument: int | bytearray, offset: int) -> bytes:
        head = abi.Cpuid2Head.parse(self._copy_in(argument, _HEAD, offset), strict=False)
        if head.nent > _MAX_CPUID_ENTRIES:
            raise KvmError(errno.E2BIG, f"{head.nent} CPUID entries; there may be {_MAX_CPUID_ENTRIES}")
        return self._copy_in(argument, head.nent * abi.CpuidEntry2.SIZE, offset + _HEAD)

    def _give_cpuid(self, argument: int | bytearray, offset: int, entries: list[bytes]) -> None:
        """E2BIG when there is room for fewer; the count needed is returned either way."""
        head = abi.Cpuid2Head.parse(self._copy_in(argument, _HEAD, offset), strict=False)
        room, head.nent = head.nent, len(entries)
        self._copy_out(argument, bytes(head), offset)
        if room < len(entries):
            raise KvmError(errno.E2BIG, f"{len(entries)} CPUID entries, room for {room}")
        self._copy_out(argument, b"".join(entries), offset + _HEAD)

    # --- KVM_MEMORY_ENCRYPT_OP
    def _encrypt_op(self, file: Vm | Vcpu, request: int, argument: int | bytearray) -> int:
        del request
        cmd = abi.TdxCmd.parse(self._copy_in(argument, abi.TdxCmd.SIZE))
        if not isinstance((file.vm if isinstance(file, Vcpu) else file).ops, TdxVm):
            raise KvmError(errno.ENOTTY, "this type of VM has no KVM_MEMORY_ENCRYPT_OP")
        allowed = abi.INIT_MEM_REGION_MEASURE if cmd.id == TdxCommand.INIT_MEM_REGION else 0
        if cmd.hw_error or cmd.flags & ~allowed:
            raise KvmError(errno.EINVAL, f"struct kvm_tdx_cmd with flags {cmd.flags:#x}, hw_error {cmd.hw_error:#x}")
        try:
            self._tdx_command(file, cmd)
        except KvmError as error:
            cmd.hw_error = error.hw_error
            raise
        finally:
            self._copy_out(argument, bytes(cmd))
        return 0

    def _tdx_command(self, file: Vm | Vcpu, cmd: abi.TdxCmd) -> None:
        op, where = file.memory_encrypt_op, cmd.data
        if cmd.id == TdxCommand.CAPABILITIES:
            caps = op(cmd.id)
            assert isinstance(caps, TdxCapabilities)
            head = abi.TdxCapabilitiesHead()
            head.supported_attrs, head.supported_xfam = caps.supported_attrs, caps.supported_xfam
            self._give_cpuid(where, head.SIZE, structs.cpuid_entries(caps.cpuid))
            self._copy_out(where, bytes(head))
        elif cmd.id == TdxCommand.INIT_VM:
            size = abi.TdxInitVmHead.SIZE
            op(cmd.id, structs.parse_init_vm(self._copy_in(where, size), self._take_cpuid(where, size)))
        elif cmd.id == TdxCommand.INIT_VCPU:
            op(cmd.id, where)
        elif cmd.id == TdxCommand.INIT_MEM_REGION:
            region = abi.TdxInitMemRegion.parse(self._copy_in(where, abi.TdxInitMemRegion.SIZE))
            op(cmd.id, structs.mem_region(region, measure=bool(cmd.flags & abi.INIT_MEM_REGION_MEASURE)))
            region.source_addr += region.nr_pages << 12
            region.gpa += region.nr_pages << 12
            region.nr_pages = 0
            self._copy_out(where, bytes(region))
        elif cmd.id == TdxCommand.GET_CPUID and isinstance(file, Vcpu):
            entries = op(cmd.id)
            assert isinstance(entries, list)
            self._give_cpuid(where, 0, structs.cpuid_entries(entries))
        else:
            op(cmd.id)


_ALL_SLOT_FLAGS: Final = int(
    abi.MemorySlotFlag.LOG_DIRTY_PAGES | abi.MemorySlotFlag.READONLY | abi.MemorySlotFlag.GUEST_MEMFD
)
_VM: Final[dict[int, Callable[[Process, Vm, int, int | bytearray], int]]] = {
    Ioctl.SET_USER_MEMORY_REGION: Process._set_memory_region,
    Ioctl.SET_USER_MEMORY_REGION2: Process._set_memory_region,
    Ioctl.CREATE_GUEST_MEMFD: Process._create_guest_memfd,
    Ioctl.SET_MEMORY_ATTRIBUTES: Process._set_memory_attributes,
    Ioctl.ENABLE_CAP: Process._enable_cap,
    Ioctl.SIGNAL_MSI: Process._signal_msi,
    Ioctl.GET_DIRTY_LOG: Process._get_dirty_log,
    Ioctl.CLEAR_DIRTY_LOG: Process._clear_dirty_log,
    Ioctl.MEMORY_ENCRYPT_OP: Process._encrypt_op,
}
_VCPU: Final[dict[int, Callable[[Process, Vcpu, int, int | bytearray], int]]] = {
    Ioctl.GET_REGS: Process._regs,
    Ioctl.SET_REGS: Process._regs,
    Ioctl.SET_SREGS2: Process._set_sregs2,
    Ioctl.SET_CPUID2: Process._cpuid2,
    Ioctl.GET_CPUID2: Process._cpuid2,
    Ioctl.PRE_FAULT_MEMORY: Process._pre_fault,
    Ioctl.MEMORY_ENCRYPT_OP: Process._encrypt_op,
}
