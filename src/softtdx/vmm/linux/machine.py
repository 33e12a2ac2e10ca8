"""The machine that boots Linux: firmware, boot window, interrupt controllers and PCI devices around KVM."""

import time
from collections.abc import Callable
from enum import IntEnum
from typing import BinaryIO

from softtdx._silicon import PAYLOADS
from softtdx.abi.kvm import KvmExit, TdxCommand
from softtdx.kvm import Host, KvmError, Vcpu
from softtdx.kvm.memory import PAGE
from softtdx.kvm.uapi import CpuidEntry, IoExit, KvmRun, MmioExit
from softtdx.vmm.agent import Agent, ChannelAgent
from softtdx.vmm.errors import MachineError
from softtdx.vmm.hypercalls import GuestSharedMemory
from softtdx.vmm.linux.acpi import RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_TYPE_S5
from softtdx.vmm.linux.bzimage import BzImage
from softtdx.vmm.linux.cpuid import guest_cpuid
from softtdx.vmm.linux.initramfs import STATUS_PREFIX, USERSPACE
from softtdx.vmm.linux.layout import BOOT_WINDOW, FIRMWARE_BASE, PCI_WINDOW, PCI_WINDOW_SIZE, MemoryMap
from softtdx.vmm.linux.window import build_window
from softtdx.vmm.machine import End, Machine, MachineConfig, MachineResult
from softtdx.vmm.net import Network
from softtdx.vmm.pci import ADDRESS_PORT, DATA_PORT, PciBus
from softtdx.vmm.quoting import QuotingService
from softtdx.vmm.rtc import INDEX_PORT, CmosClock
from softtdx.vmm.virtio import VirtioBlock, VirtioConsole, VirtioNet, VirtioPci
from softtdx.vmm.virtio.device import VirtioDevice

__all__ = ["LinuxMachine", "Stage"]

_WINDOW_SLOT, _FIRMWARE_SLOT, _FIRST_RAM_SLOT = range(3)
_STAGE_PORT = 0x80
_PAUSE_PORT = 0x511
_TIMER_PORTS = range(0x40, 0x44)
_PAUSE = 0.002  # seconds that a read of the pause port takes
_SLEEP_ENABLE = 1 << 5
_MAX_STATUS = 4096  # bytes of a line on the status channel


class Stage(IntEnum):
    """How far a boot has come: the firmware's progress codes, then what the kernel does."""

    OFF = 0
    STARTED = 1
    MEMORY = 2
    MEASURED = 3
    KERNEL = 4
    DRIVERS = 5
    CONSOLE = 6
    USERSPACE = 7


class LinuxMachine(Machine):
    """A Machine whose firmware boots a kernel instead of entering a payload."""

    def __init__(
        self,
        host: Host,
        config: MachineConfig | None = None,
        *,
        console: Callable[[bytes], None] | None = None,
        quoting: QuotingService | None = None,
    ) -> None:
        """As Machine; `console` gets what the guest prints, on whichever console it does."""
        super().__init__(host, config, console=console, quoting=quoting)
        self.vm.create_irqchip()
        self.stage = Stage.OFF
        self.exit_status: int | None = None
        self._status_text = b""
        self._window_hva: int | None = None
        self._clock = CmosClock()
        self.pci = PciBus(PCI_WINDOW, PCI_WINDOW_SIZE)
        self._shared = GuestSharedMemory(self.vm)
        self.console = VirtioConsole(self._shared, self._print)
        self._plug(self.console)
        self._plug(VirtioConsole(self._shared, self._status_channel))
        if isinstance(self.agent, ChannelAgent):
            channel = VirtioConsole(self._shared, self.agent.receive)
            self.agent.attach(channel.feed)
            self._plug(channel)

    def _make_agent(self) -> Agent:
        return ChannelAgent()

    def _plug(self, device: VirtioDevice) -> None:
        self.pci.add(VirtioPci(device, self.vm.signal_msi))

    def add_drive(self, file: BinaryIO, *, read_only: bool = False) -> None:
        """A disk, before the kernel starts. `file` stays open as long as the machine."""
        self._plug(VirtioBlock(self._shared, file, read_only=read_only))

    def add_network(self, plug: Callable[[Callable[[bytes], None]], Network], mac: bytes) -> Network:
        """A network card, before the kernel starts; returns the network, which the caller closes before the machine.

        `plug` makes the network, given where the frames go that arrive from it.
        """
        card = VirtioNet(self._shared, mac)
        network = plug(card.feed)
        card.attach(network.send)
        self._plug(card)
        self.vm.idle_in_real_time = True  # a guest that waits for an answer must not see its time-out come at once
        return network

    def type(self, data: bytes) -> None:
        """Input on the console."""
        self.console.feed(data)

    def instructions(self) -> int:
        """Instructions that this host's guests have executed so far, as their processors last showed."""
        return sum(lp.core.counters()["instructions"] for lp in self.host.platform.lps)

    def load_kernel(self, kernel: BzImage, initrd: bytes, command_line: str) -> None:
        """Put firmware and boot window into memory and make the vCPUs. MachineError, PayloadError: they do not fit."""
        config = self.config
        memory = MemoryMap.of(config.memory)
        window = build_window(kernel, initrd, command_line, memory, config.vcpus, td=not config.vm)
        firmware = PAYLOADS["firmware"]
        free = self.host.memory.free_pages * PAGE
        if config.memory + len(window) > free:
            raise MachineError(
                f"the machine is to have {config.memory >> 20} MiB of memory, the simulated host has {free >> 20} MiB "
                "free; give --memory less, or --platform with more ram and cmrs"
            )
        try:
            for slot, (base, size) in enumerate(memory.ranges(), _FIRST_RAM_SLOT):
                self._add_memory(slot, base, size)
            self._add_memory(_FIRMWARE_SLOT, FIRMWARE_BASE, len(firmware))
            self._window_hva = hva = self.kvm.mm.mmap(len(window))
            self.kvm.mm.write(hva, window)
            self.vm.set_user_memory_region2(_WINDOW_SLOT, BOOT_WINDOW, len(window), hva)
            for vcpu_id in range(config.vcpus):
                self._add_vcpu(vcpu_id)
            self._place(FIRMWARE_BASE, firmware)
            if not config.vm:
                self.vm.memory_encrypt_op(TdxCommand.FINALIZE_VM)
                self._mrtd = self._read_mrtd()
                for base, size in memory.ranges():  # the firmware will accept all of it, so spare it the faults
                    self.vcpus[0].pre_fault_memory(base, size)
        except KvmError as error:
            raise MachineError(f"the machine cannot be built: {error.strerror}") from error

    def _cpuid(self, vcpu_id: int) -> list[CpuidEntry]:
        tsc_hz = self.host.platform.description.tsc_hz
        return guest_cpuid(self.kvm.get_supported_cpuid(), vcpu_id, self.config.vcpus, tsc_hz)

    # --- what the guest does
    def _handle(self, vcpu: Vcpu, run: KvmRun) -> None:
        if run.exit_reason is KvmExit.IO and run.io is not None and self._port(run.io):
            return
        if run.exit_reason is KvmExit.MMIO and run.mmio is not None:
            self._mmio(run.mmio)
            return
        super()._handle(vcpu, run)

    def _port(self, io: IoExit) -> bool:
        """The ports of this kind of machine; False for others."""
        if io.port == _STAGE_PORT:
            if io.write:
                self._firmware_stage(io.value)
        elif io.port == _PAUSE_PORT:
            time.sleep(_PAUSE)
            io.value = 0
        elif io.port in _TIMER_PORTS:
            # There is no PIT. Counters that read zero end the kernel's attempt to calibrate against one at once.
            io.value = 0
        elif ADDRESS_PORT <= io.port < DATA_PORT + 4:
            if io.write:
                self.pci.write_port(io.port, io.value, io.size)
            else:
                io.value = self.pci.read_port(io.port, io.size)
        elif io.port in (INDEX_PORT, INDEX_PORT + 1):
            if io.write:
                self._clock.write(io.port, io.value & 0xFF)
            else:
                io.value = self._clock.read(io.port)
        elif io.port == SLEEP_CONTROL_PORT and io.write:
            if io.value & _SLEEP_ENABLE and io.value >> 2 & 7 == SLEEP_TYPE_S5:
                self._finish(MachineResult(End.EXIT, self.exit_status or 0))
        elif io.port == RESET_PORT and io.write and io.value == RESET_VALUE:
            self._reset()
        else:
            return False
        return True

    def _reset(self) -> None:
        """What a kernel does after a panic (panic=-1), and a user who says reboot."""
        text = bytes(self._console).decode("utf-8", "replace")
        panic = next((line for line in reversed(text.splitlines()) if "Kernel panic" in line), None)
        if panic is not None:
            self._finish(MachineResult(End.CRASH, message=panic.strip()))
        elif self.stage < Stage.CONSOLE:
            self._finish(MachineResult(End.CRASH, message="the kernel reset the machine before it printed anything"))
        else:
            self._finish(MachineResult(End.EXIT, self.exit_status or 0, "the guest asked for a reset"))

    def _mmio(self, access: MmioExit) -> None:
        """Loads and stores where there is no memory: a device's BAR, or nobody."""
        if access.write:
            self.pci.write_memory(access.gpa, access.value, access.size)
        else:
            value = self.pci.read_memory(access.gpa, access.size)
            access.value = (1 << 8 * access.size) - 1 if value is None else value

    def _print(self, data: bytes) -> None:
        """Output of the virtio console."""
        self.stage = max(self.stage, Stage.CONSOLE)
        self._output(data)

    def _status_channel(self, data: bytes) -> None:
        """Lines that our init writes to /dev/hvc1."""
        self._status_text += data
        *lines, self._status_text = self._status_text.split(b"\n")
        self._status_text = self._status_text[-_MAX_STATUS:]
        for line in map(bytes.strip, lines):
            if line == USERSPACE:
                self.stage = Stage.USERSPACE
            elif line.startswith(STATUS_PREFIX) and line[len(STATUS_PREFIX) :].isdigit():
                self.exit_status = int(line[len(STATUS_PREFIX) :]) & 0xFF

    def _firmware_stage(self, code: int) -> None:
        if self.stage < code <= Stage.KERNEL:
            self.stage = Stage(code)
        if code == Stage.KERNEL and self._window_hva is not None:
            # Kernel and initrd have been taken; the window is of no more use.
            hva, self._window_hva = self._window_hva, None
            self.vm.set_user_memory_region2(_WINDOW_SLOT, BOOT_WINDOW, 0, hva)
            self.kvm.mm.munmap(hva)
