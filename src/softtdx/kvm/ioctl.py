"""The system calls of a VMM as the kernel has them: descriptors, request numbers, structures as bytes.

The methods of `Kvm`, `Vm` and `Vcpu` are the same ioctls for a VMM in Python; this is the face for one that is
written against /dev/kvm. A structure is a bytearray, or the address of one in the process's memory; results are
written into it. What fails raises KvmError with the kernel's errno. The requests of /dev/kvm are here, those of a VM
in `ioctl_vm`, of a vCPU in `ioctl_vcpu`, KVM_MEMORY_ENCRYPT_OP in `ioctl_tdx`.
(Kernel: virt/kvm/kvm_main.c, arch/x86/kvm/x86.c, arch/x86/kvm/vmx/tdx.c; Documentation/virt/kvm/api.rst.)
"""

import errno
from dataclasses import dataclass
from typing import Final

from softtdx.abi.kvm import KvmIoctl as Ioctl
from softtdx.abi.kvm_run import MMAP_SIZE, KvmRun
from softtdx.kvm import ioctl_structs as structs
from softtdx.kvm import ioctl_vcpu, ioctl_vm
from softtdx.kvm.emulate import FEATURES
from softtdx.kvm.errors import KvmError
from softtdx.kvm.eventfd import Eventfd
from softtdx.kvm.guest_memfd import GuestMemfd
from softtdx.kvm.host import Host
from softtdx.kvm.kvm import Kvm
from softtdx.kvm.memory import PAGE
from softtdx.kvm.mm import AddressSpace
from softtdx.kvm.user_memory import Argument
from softtdx.kvm.vcpu import Vcpu
from softtdx.kvm.vm import Vm
from softtdx.kvm.vmx_msrs import SAVED

__all__ = ["FALLOC_KEEP_SIZE", "FALLOC_PUNCH_HOLE", "Process", "Stat"]

FALLOC_KEEP_SIZE: Final = 1
FALLOC_PUNCH_HOLE: Final = 2
_FIRST_FD = 3
_MAX_OFFSET: Final = (1 << 63) - 1

File = Kvm | Vm | Vcpu | GuestMemfd | Eventfd


@dataclass(frozen=True)
class Stat:
    """struct stat, as far as a guest_memfd has something to say."""

    st_size: int
    st_blksize: int
    st_blocks: int  # of 512 bytes


class Process:
    """A process with open files and memory: what a VMM is to the kernel."""

    def __init__(self, host: Host) -> None:
        """A process that has opened nothing; `mm` is its memory."""
        self.host = host
        self.mm = AddressSpace(host.memory, host.mm.swap)
        self._files: dict[int, File] = {}
        self._next = _FIRST_FD

    # --- system calls on files
    def open(self, path: str = "/dev/kvm") -> int:
        """The system call: /dev/kvm is opened, ENOENT for any other path."""
        if path != "/dev/kvm":
            raise KvmError(errno.ENOENT, f"{path!r} cannot be opened here, only /dev/kvm can")
        return self.add(Kvm(self.host, self.mm))

    def eventfd(self, count: int = 0, flags: int = 0) -> int:
        """eventfd2(2)."""
        return self.add(Eventfd(count, flags))

    def close(self, fd: int) -> None:
        """The system call. A VM ends with the last descriptor of it and of its vCPUs."""
        file = self.file(fd)
        del self._files[fd]
        if isinstance(file, Eventfd):
            file.close()
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

    def read(self, fd: int, size: int) -> bytes:
        """The system call: 8 bytes of an eventfd. EINVAL for every other file of KVM, and for fewer bytes."""
        file = self.file(fd)
        if not isinstance(file, Eventfd) or size < 8:
            raise KvmError(errno.EINVAL, f"read of {size} bytes from descriptor {fd}")
        return file.read().to_bytes(8, "little")

    def write(self, fd: int, data: bytes) -> int:
        """The system call: 8 bytes to an eventfd."""
        file = self.file(fd)
        if not isinstance(file, Eventfd) or len(data) < 8:
            raise KvmError(errno.EINVAL, f"write of {len(data)} bytes to descriptor {fd}")
        file.signal(int.from_bytes(data[:8], "little"))
        return 8

    def mmap(self, fd: int, length: int, offset: int = 0) -> memoryview:
        """The system call on a vCPU: struct kvm_run and the page of port data, shared with KVM.

        ENODEV for a file that cannot be mapped (a guest_memfd is none of user space's), EINVAL for another range.
        """
        file = self.file(fd)
        if not isinstance(file, Vcpu):
            raise KvmError(errno.ENODEV, f"descriptor {fd} is not a vCPU's")
        if offset % PAGE or length <= 0 or offset < 0 or offset + length > MMAP_SIZE:
            raise KvmError(errno.EINVAL, f"mmap of {length} bytes at {offset:#x} of a vCPU; it has {MMAP_SIZE}")
        return file.kvm_run.view[offset : offset + length]

    def kvm_run(self, fd: int) -> KvmRun:
        """Struct kvm_run over what `mmap` of a vCPU gives."""
        self.mmap(fd, MMAP_SIZE)
        file = self.file(fd)
        assert isinstance(file, Vcpu)
        return file.kvm_run

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """The system call on a guest_memfd: allocate, or punch a hole, without changing its size.

        EINVAL for a misaligned range, or for one to allocate behind the end; EOPNOTSUPP for other modes; ENODEV for
        other files.
        """
        file = self.file(fd)
        if not isinstance(file, GuestMemfd):
            raise KvmError(errno.ENODEV, f"fallocate of descriptor {fd}")
        if offset < 0 or length <= 0 or offset + length > _MAX_OFFSET:
            raise KvmError(errno.EINVAL, f"fallocate of {length} bytes at {offset:#x}")
        if mode not in (FALLOC_KEEP_SIZE, FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE):
            raise KvmError(errno.EOPNOTSUPP, f"fallocate with mode {mode:#x} on a guest_memfd")
        punch = bool(mode & FALLOC_PUNCH_HOLE)
        if offset % PAGE or length % PAGE or (not punch and offset + length > file.size):
            raise KvmError(errno.EINVAL, f"fallocate of {length} bytes at {offset:#x} of {file.size:#x}")
        end = min(offset + length, file.size)
        if punch and end > offset:
            file.punch_hole(offset, end - offset)
        for index in range(offset // PAGE, end // PAGE) if not punch else ():
            file.get_page(index)

    def fstat(self, fd: int) -> Stat:
        """The system call on a guest_memfd."""
        file = self.file(fd)
        if not isinstance(file, GuestMemfd):
            return Stat(0, PAGE, 0)
        return Stat(file.size, PAGE, file.allocated_pages() * PAGE // 512)

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        """The system call: a number or 0. KvmError: EBADF, ENOTTY or EINVAL for an unknown request, EFAULT, its own."""
        file, arg = self.file(fd), Argument(self.mm, request & 0xFFFF_FFFF, argument)
        if isinstance(file, Kvm):
            return self._system(file, arg)
        if isinstance(file, Vm):
            return ioctl_vm.call(self, file, arg)
        if isinstance(file, Vcpu):
            return ioctl_vcpu.call(file, arg)
        raise KvmError(errno.ENOTTY, f"ioctl {request:#x} on a file that has none")

    # --- descriptors
    def file(self, fd: int) -> File:
        """What a descriptor stands for. EBADF for one that is not open."""
        file = self._files.get(fd)
        if file is None:
            raise KvmError(errno.EBADF, f"file descriptor {fd}")
        return file

    def add(self, file: File) -> int:
        """A new descriptor."""
        fd = self._next
        self._next += 1
        self._files[fd] = file
        return fd

    # --- /dev/kvm
    def _system(self, kvm: Kvm, arg: Argument) -> int:
        request = arg.request
        if request == Ioctl.GET_API_VERSION:
            arg.nothing()
            return kvm.get_api_version()
        if request == Ioctl.CHECK_EXTENSION:
            return kvm.check_extension(arg.number)
        if request == Ioctl.CREATE_VM:
            return self.add(kvm.create_vm(arg.number))
        if request == Ioctl.GET_VCPU_MMAP_SIZE:
            arg.nothing()
            return MMAP_SIZE
        if request == Ioctl.GET_SUPPORTED_CPUID:
            structs.give_cpuid(arg, 0, kvm.get_supported_cpuid())
        elif request == Ioctl.GET_MSR_INDEX_LIST:
            structs.give_indices(arg, SAVED)
        elif request == Ioctl.GET_MSR_FEATURE_INDEX_LIST:
            structs.give_indices(arg, FEATURES)
        elif request == Ioctl.GET_MSRS:
            return structs.give_msrs(arg, kvm.read_feature_msr)
        else:
            raise KvmError(errno.EINVAL, f"/dev/kvm has no ioctl {request:#x}")
        return 0
