"""A TD built step by step through the ioctls, so that a test can stop anywhere."""

from softtdx.abi.kvm import KVM_X86_TDX_VM, MEMORY_ATTRIBUTE_PRIVATE, MemorySlotFlag, TdxCommand
from softtdx.abi.structs import Attributes
from softtdx.kvm import Kvm
from softtdx.kvm.memory import PAGE
from softtdx.kvm.uapi import TdxInitMemRegion, TdxInitVm

INIT = TdxInitVm(attributes=Attributes.SEPT_VE_DISABLE)
PAGES = 8


class Build:
    """`steps` in order; each is one ioctl or user-space action."""

    def __init__(self, host, init=INIT):
        self.host = host
        self.kvm = Kvm(host)
        self.vm = self.kvm.create_vm(KVM_X86_TDX_VM)
        self.init = init
        self.vcpus = []

    def init_vm(self):
        self.vm.memory_encrypt_op(TdxCommand.INIT_VM, self.init)

    def add_slot(self):
        self.file = self.vm.create_guest_memfd(PAGES * PAGE)
        self.hva = self.kvm.mm.mmap(PAGES * PAGE)
        self.vm.set_user_memory_region2(0, 0, PAGES * PAGE, self.hva, MemorySlotFlag.GUEST_MEMFD, self.file)

    def make_private(self):
        self.vm.set_memory_attributes(0, PAGES * PAGE, MEMORY_ATTRIBUTE_PRIVATE)

    def create_vcpu(self):
        self.vcpus.append(self.vm.create_vcpu(len(self.vcpus)))

    def init_vcpu(self):
        self.vcpus[-1].memory_encrypt_op(TdxCommand.INIT_VCPU, 0)

    def add_memory(self):
        source = self.kvm.mm.mmap(2 * PAGE)
        self.kvm.mm.write(source, b"measured" * (2 * PAGE // 8))
        self.vcpus[0].memory_encrypt_op(TdxCommand.INIT_MEM_REGION, TdxInitMemRegion(source, 0, 2))

    def finalize(self):
        self.vm.memory_encrypt_op(TdxCommand.FINALIZE_VM)

    steps = (init_vm, add_slot, make_private, create_vcpu, init_vcpu, add_memory, finalize)

    def do(self, count=7):
        for step in self.steps[:count]:
            step(self)
        return self

    def close(self):
        self.vm.close()
        self.kvm.mm.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
