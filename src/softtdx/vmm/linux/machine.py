"""The machine that boots Linux: firmware, boot window, interrupt controllers and PCI devices around KVM."""

from collections.abc import Callable

from softtdx._silicon import PAYLOADS
from softtdx.abi.kvm import KvmExit, TdxCommand
from softtdx.kvm import Host, KvmError, Vcpu
from softtdx.kvm.uapi import IoExit, KvmRun
from softtdx.vmm.errors import MachineError
from softtdx.vmm.linux.acpi import RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_TYPE_S5
from softtdx.vmm.linux.bzimage import BzImage
from softtdx.vmm.linux.layout import BOOT_WINDOW, FIRMWARE_BASE, MemoryMap
from softtdx.vmm.linux.window import build_window
from softtdx.vmm.machine import Machine, MachineConfig
from softtdx.vmm.quoting import QuotingService

__all__ = ["LinuxMachine"]

PAGE = 4096


class LinuxMachine(Machine):
    """A Machine whose firmware boots a kernel instead of entering a payload."""

    def load_kernel(self, kernel: BzImage, initrd: bytes, command_line: str) -> None:
        """Put firmware and boot window into memory and make the vCPUs. MachineError, PayloadError: they do not fit."""
        config = self.config
        memory = MemoryMap.of(config.memory)
        window = build_window(kernel, initrd, command_line, memory, config.vcpus, td=not config.vm)
        firmware = PAYLOADS["firmware"]
        try:
            for slot, (base, size) in enumerate(memory.ranges(), 2):
                self._add_memory(slot, base, size)
            self._add_memory(1, FIRMWARE_BASE, len(firmware))
            hva = self.kvm.mm.mmap(len(window))
            self.kvm.mm.write(hva, window)
            self.vm.set_user_memory_region2(0, BOOT_WINDOW, len(window), hva)
            for vcpu_id in range(config.vcpus):
                self._add_vcpu(vcpu_id)
            self._place(FIRMWARE_BASE, firmware)
            if not config.vm:
                self.vm.memory_encrypt_op(TdxCommand.FINALIZE_VM)
        except KvmError as error:
            raise MachineError(f"the machine cannot be built: {error.strerror}") from error
