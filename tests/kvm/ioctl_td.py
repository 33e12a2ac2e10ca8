"""A TD built and driven by ioctl numbers and structures alone, and what the tests of them share."""

import struct

import pytest

from softtdx.abi.kvm import KVM_X86_TDX_VM, KvmIoctl, TdxCommand
from softtdx.abi.structs import Attributes
from softtdx.kvm import KvmError
from softtdx.kvm.memory import PAGE

MEASURE = 1
GPA_WIDTH = struct.pack("<10I", 0x8000_0008, 0, 0, 48 << 16, 0, 0, 0, 0, 0, 0)


def fails(code, call, *args):
    with pytest.raises(KvmError) as error:
        call(*args)
    assert error.value.errno == code, error.value


def answered(call, *args):
    """What a C program gets: a number, or the errno below 0."""
    try:
        return call(*args)
    except KvmError as error:
        return -error.errno


def command(number, data=0, flags=0):
    return bytearray(struct.pack("<IIQQ", number, flags, data, 0))


def init_vm(attributes=Attributes.SEPT_VE_DISABLE, xfam=3, cpuid=(GPA_WIDTH,)):
    """struct kvm_tdx_init_vm."""
    return struct.pack("<QQ240xII", attributes, xfam, len(cpuid), 0) + b"".join(cpuid)


class Td:
    """A TD with 8 private pages at 0, one of them measured, through ioctls alone."""

    def __init__(self, process, code=b"\xf4", attributes=Attributes.SEPT_VE_DISABLE):
        self.process = process
        self.kvm = process.open()
        self.vm = process.ioctl(self.kvm, KvmIoctl.CREATE_VM, KVM_X86_TDX_VM)
        mm = process.mm
        init = mm.mmap(PAGE)
        mm.write(init, init_vm(attributes))
        self.op(self.vm, TdxCommand.INIT_VM, init)
        self.memfd = process.ioctl(self.vm, KvmIoctl.CREATE_GUEST_MEMFD, bytearray(struct.pack("<Q56x", 8 * PAGE)))
        self.hva = mm.mmap(8 * PAGE)
        region = struct.pack("<IIQQQQI116x", 0, 4, 0, 8 * PAGE, self.hva, 0, self.memfd)
        process.ioctl(self.vm, KvmIoctl.SET_USER_MEMORY_REGION2, bytearray(region))
        process.ioctl(self.vm, KvmIoctl.SET_MEMORY_ATTRIBUTES, bytearray(struct.pack("<QQQQ", 0, 8 * PAGE, 8, 0)))
        self.vcpu = process.ioctl(self.vm, KvmIoctl.CREATE_VCPU, 0)
        self.op(self.vcpu, TdxCommand.INIT_VCPU, 0x1234)
        self.source = mm.mmap(PAGE)
        mm.write(self.source, code)
        self.region = mm.mmap(PAGE)
        mm.write(self.region, struct.pack("<QQQ", self.source, 0, 1))
        self.op(self.vcpu, TdxCommand.INIT_MEM_REGION, self.region, MEASURE)
        self.op(self.vm, TdxCommand.FINALIZE_VM)

    def op(self, fd, number, data=0, flags=0):
        return self.process.ioctl(fd, KvmIoctl.MEMORY_ENCRYPT_OP, command(number, data, flags))
