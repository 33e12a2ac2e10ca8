"""ioctl(2) at the level of bytes: any request number on any descriptor, structures nearly good, in any order.

The requests and the sizes of their structures are those that `softtdx.abi.kvm` lists, so that a new one is driven
without a change here.
"""

import contextlib
import errno
import random
import struct
from collections.abc import Iterator

from softtdx.abi.kvm import KVM_X86_DEFAULT_VM, KVM_X86_TDX_VM, KvmCap, KvmIoctl, TdxCommand
from softtdx.abi.kvm_structs import TdxCmd, TdxInitMemRegion, TdxInitVmHead
from softtdx.abi.structs import Attributes
from softtdx.attack.fuzz.core import EDGES
from softtdx.attack.fuzz.guest import settled
from softtdx.attack.oracle import BrokenInvariantError
from softtdx.kvm import KvmError
from softtdx.kvm.host import Host
from softtdx.kvm.ioctl import Process
from softtdx.vmm.boot import boot_host

__all__ = ["ioctls"]

_MEMORY = 1 << 20
_PAGE = 4096
_SIZE_SHIFT, _SIZE_MASK = 16, 0x3FFF
_ERRNOS = frozenset(errno.errorcode)
_COMMANDS = (*TdxCommand, 0xFF, 1 << 31)


class _Caller:
    """A process with one VM, its vCPUs and files, and an idea of what good arguments look like."""

    def __init__(self, rng: random.Random, host: Host) -> None:
        self.rng = rng
        self.process = Process(host)
        self.kvm = self.process.open()
        self.hva = self.process.mm.mmap(_MEMORY)
        kind = rng.choice((KVM_X86_DEFAULT_VM, KVM_X86_TDX_VM, KVM_X86_TDX_VM))
        self.vm = self.process.ioctl(self.kvm, KvmIoctl.CREATE_VM, kind)
        self.vcpus: list[int] = []
        self.files: list[int] = []

    def number(self) -> int:
        rng = self.rng
        return rng.choice((0, 1, 2, _PAGE, 0x1_0000, _MEMORY, self.hva, 1 << 21, *EDGES, rng.getrandbits(64)))

    def good(self, value: int) -> int:
        return value if self.rng.randrange(6) else self.number()

    def step(self) -> None:
        """One system call. What comes back is a number, or an errno that exists."""
        rng = self.rng
        fd, request = self._which()
        try:
            done = self.process.ioctl(fd, request, self._argument(request))
        except KvmError as error:
            if error.errno not in _ERRNOS:
                raise BrokenInvariantError(f"ioctl {request:#x} failed with errno {error.errno}") from error
            return
        if request == KvmIoctl.CREATE_VCPU:
            self.vcpus.append(done)
        elif request == KvmIoctl.CREATE_GUEST_MEMFD:
            self.files.append(done)
        elif request == KvmIoctl.CREATE_VM and rng.randrange(4):
            self.process.close(done)

    def _which(self) -> tuple[int, int]:
        rng = self.rng
        request = rng.choice(list(KvmIoctl)) if rng.randrange(16) else rng.getrandbits(32)
        if rng.randrange(16) == 0:
            request ^= 1 << rng.randrange(32)
        fds = [self.kvm, self.vm, self.vm, self.vm, *self.vcpus, *self.vcpus, *self.files, rng.randrange(64)]
        if request == KvmIoctl.RUN and rng.randrange(8):
            return (rng.choice(self.vcpus) if self.vcpus else self.vm), request
        return rng.choice(fds), request

    def _argument(self, request: int) -> int | bytearray:
        rng = self.rng
        size = request >> _SIZE_SHIFT & _SIZE_MASK
        if not size or rng.randrange(16) == 0:
            return self._plain(request)
        data = bytearray(self._structure(request, size))
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            if data:
                data[rng.randrange(len(data))] = rng.choice((0, 1, 0x80, 0xFF, rng.randrange(256)))
        if rng.randrange(24) == 0:
            del data[rng.randrange(len(data) + 1) :]
        if rng.randrange(4) == 0:  # in the process's memory, seldom so that it runs over the end
            at = self.hva + rng.choice((0, _PAGE, _PAGE + 4, _MEMORY - 8, _MEMORY))
            with contextlib.suppress(KvmError):
                self.process.mm.write(at, bytes(data))
            return at
        return data

    def _plain(self, request: int) -> int:
        rng = self.rng
        if request == KvmIoctl.CREATE_VCPU:
            return self.good(len(self.vcpus))
        if request == KvmIoctl.CHECK_EXTENSION:
            return self.good(int(rng.choice(list(KvmCap))))
        return self.good(0)

    def _structure(self, request: int, size: int) -> bytes:
        """Bytes of a structure that makes sense for the request, where one is known."""
        rng, good = self.rng, self.good
        if request in (KvmIoctl.SET_USER_MEMORY_REGION2, KvmIoctl.SET_USER_MEMORY_REGION):
            file = rng.choice(self.files) if self.files else 0
            flags = 4 if file and rng.randrange(2) else rng.choice((0, 1, 2, 4))
            words = (good(rng.randrange(3)) & 0xFFFF_FFFF | flags << 32, good(0), good(_MEMORY), good(self.hva))
            return struct.pack("<6Q", *words, good(0), file).ljust(size, b"\0")[:size]
        if request == KvmIoctl.SET_MEMORY_ATTRIBUTES:
            words = good(0), good(_MEMORY), rng.choice((0, 8, 8, self.number())), rng.choice((0, 0, 1))
            return struct.pack("<4Q", *words).ljust(size, b"\0")[:size]
        if request == KvmIoctl.CREATE_GUEST_MEMFD:
            return struct.pack("<2Q", good(_MEMORY), rng.choice((0, 0, 1))).ljust(size, b"\0")[:size]
        if request == KvmIoctl.PRE_FAULT_MEMORY:
            return struct.pack("<3Q", good(0), good(_PAGE), rng.choice((0, 0, 1))).ljust(size, b"\0")[:size]
        if request == KvmIoctl.ENABLE_CAP:
            capability = int(rng.choice(list(KvmCap))) | rng.choice((0, 0, 1)) << 32
            return struct.pack("<3Q", capability, self.number(), self.number()).ljust(size, b"\0")[:size]
        if request == KvmIoctl.MEMORY_ENCRYPT_OP:
            return self._tdx_command().ljust(size, b"\0")
        return rng.choice((bytes(size), rng.randbytes(size), struct.pack("<Q", self.number()) * (size // 8 + 1)))[:size]

    def _tdx_command(self) -> bytes:
        rng, hva = self.rng, self.hva
        command = rng.choice(_COMMANDS)
        data = self.good(0)
        if command == TdxCommand.INIT_VM:
            head = TdxInitVmHead()
            head.attributes, head.xfam = self.good(int(Attributes.SEPT_VE_DISABLE)), self.good(3)
            count = rng.choice((0, 0, 0, 1, 300))
            body = bytes(head) + struct.pack("<2I", count, 0) + rng.randbytes(40)
            data = self._put(body)
        elif command == TdxCommand.INIT_MEM_REGION:
            region = TdxInitMemRegion()
            region.source_addr, region.gpa = self.good(hva + _PAGE), self.good(0x1_0000)
            region.nr_pages = self.good(rng.randrange(1, 4))
            data = self._put(bytes(region))
        elif command in (TdxCommand.CAPABILITIES, TdxCommand.GET_CPUID):
            data = self._put(rng.choice((bytes(0x2000), b"\0\1" * 64, b"\xff" * 256)))
        cmd = TdxCmd()
        cmd.id, cmd.flags, cmd.data = int(command) & 0xFFFF_FFFF, rng.choice((0, 0, 1, 2)), data
        cmd.hw_error = rng.choice((0, 0, 0, 1))
        return bytes(cmd)

    def _put(self, data: bytes) -> int:
        at = self.hva + 0x8_0000
        self.process.mm.write(at, data)
        return self.good(at)


def ioctls(rng: random.Random, steps: int) -> Iterator[int]:
    """What a process can ask of /dev/kvm. A step is a system call."""
    host = boot_host()
    done = 0
    while done < steps:
        caller = _Caller(rng, host)
        try:
            for _ in range(min(rng.randrange(60, 200), steps - done)):
                done += 1
                for lp in host.platform.lps:
                    lp.core.kick()  # KVM_RUN comes back at once
                yield 1
                caller.step()
        finally:
            caller.process.exit()
        settled(host)
