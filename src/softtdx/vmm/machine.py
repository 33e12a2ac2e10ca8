"""The machine: QEMU's part. RAM, launcher and payload, devices, and a thread for every vCPU.

It uses KVM's ioctl surface and nothing below it. The same machine is a TD or, with `vm`, an ordinary VM.
"""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from time import perf_counter
from typing import Self

from softtdx.abi.fields import table
from softtdx.abi.kvm import (
    KVM_X86_DEFAULT_VM,
    KVM_X86_TDX_VM,
    MEMORY_ATTRIBUTE_PRIVATE,
    KvmExit,
    MemorySlotFlag,
    TdxCommand,
)
from softtdx.abi.structs import Attributes
from softtdx.abi.vmcs import AR_CODE32, AR_DATA32
from softtdx.attest.getquote import GetQuote
from softtdx.hw import LogicalProcessor
from softtdx.hw.faults import MachineCheck
from softtdx.kvm import Host, Kvm, KvmError, Vcpu
from softtdx.kvm.uapi import (
    CpuidEntry,
    KvmRun,
    MemoryFaultExit,
    Regs,
    Segment,
    Sregs,
    TdxCapabilities,
    TdxInitMemRegion,
    TdxInitVm,
)
from softtdx.vmm.agent import Agent, PortAgent
from softtdx.vmm.devices import PortBus
from softtdx.vmm.errors import MachineError
from softtdx.vmm.hypercalls import HypercallServices
from softtdx.vmm.launcher import FIRMWARE_BASE, PAGE, RANGE_TO_ACCEPT, firmware_image, lay_out
from softtdx.vmm.payload import Payload
from softtdx.vmm.quoting import QuotingService

__all__ = ["End", "Machine", "MachineConfig", "MachineResult"]

MAX_VCPUS = 64
_RESET_VECTOR = 0xFFFF_FFF0
_CR0_PE_NE = 0x21
_ADDRESS_LEAF = 0x8000_0008  # EAX 23:16 tell KVM the GPA width
_POLL = 0.05  # seconds between two looks of a waiting thread at signals


class End(Enum):
    """Why a machine stopped."""

    EXIT = "exit"  # the guest wrote a status to the exit port
    HALTED = "halted"  # every vCPU halted and nothing can wake it
    FATAL = "fatal error"  # TDG.VP.VMCALL<ReportFatalError>
    CRASH = "crash"  # triple fault, or something KVM could not go on from
    STOPPED = "stopped"  # from outside: Ctrl-C


@dataclass(frozen=True)
class MachineConfig:
    """What machine is built. `memory` in bytes."""

    memory: int = 64 << 20
    vcpus: int = 1
    vm: bool = False
    debug_td: bool = False
    gpa_width: int = 48  # of a TD: 48 or 52; the shared bit is the top one
    agent: bool = False  # of a TD: software in it answers who asks for its quote (softtdx.vmm.agent)
    mrconfigid: bytes = bytes(48)
    mrowner: bytes = bytes(48)
    mrownerconfig: bytes = bytes(48)

    def __post_init__(self) -> None:
        """MachineError for what no machine can have."""
        if not 1 <= self.vcpus <= MAX_VCPUS:
            raise MachineError(f"{self.vcpus} vCPUs; a machine has 1 to {MAX_VCPUS}")
        if self.agent and self.vm:
            raise MachineError("an ordinary VM has no quotes, and so no agent that gives them")
        if self.gpa_width not in (48, 52):
            raise MachineError(f"{self.gpa_width} guest-physical address bits; a TD has 48 or 52")
        if self.memory < 1 << 20:
            raise MachineError(f"{self.memory} bytes of memory; a machine needs at least 1 MiB")


@dataclass
class MachineResult:
    """How a run went."""

    end: End
    status: int | None = None
    message: str = ""
    console: bytes = b""
    mrtd: bytes | None = None
    instructions: int = 0
    wall_s: float = 0.0
    stats: Counter[str] = field(default_factory=Counter)
    undefined: list[str] = field(default_factory=list)  # instructions that raised #UD for want of support

    @property
    def ok(self) -> bool:
        """Whether the guest ended as it meant to."""
        return self.end is End.HALTED or (self.end is End.EXIT and self.status == 0)


class Machine:
    """One machine. Build it, `load` a payload, `run` it, `close` it (or use it in a with statement)."""

    def __init__(
        self,
        host: Host,
        config: MachineConfig | None = None,
        *,
        console: Callable[[bytes], None] | None = None,
        quoting: QuotingService | None = None,
    ) -> None:
        """KVM_CREATE_VM and, for a TD, KVM_TDX_INIT_VM. `console` gets serial output as it comes."""
        self.config = config or MachineConfig()
        self.host = host
        self._console = bytearray()
        self._sink = console
        self._lock = threading.Condition()
        self._ending: MachineResult | None = None
        self._bug: Exception | None = None
        self._idle: set[int] = set()
        self._wakes = 0
        self._mrtd: bytes | None = None
        self._woken: dict[int, int] = {}
        self._quoting = quoting
        self.agent = self._make_agent() if self.config.agent else None
        answer = self.agent.access if isinstance(self.agent, PortAgent) else None
        self._ports = PortBus(self._output, self._exit, self._park, self._wake, answer)
        self.kvm = Kvm(host)
        try:
            self.vm = self.kvm.create_vm(KVM_X86_DEFAULT_VM if self.config.vm else KVM_X86_TDX_VM)
            get_quote = GetQuote(quoting.quote, threaded=quoting.asynchronous) if quoting is not None else None
            self._services = HypercallServices(self.vm, get_quote)
            self.vcpus: list[Vcpu] = []
            if not self.config.vm:
                self._init_td()
        except KvmError as error:
            self._close_vm()
            raise MachineError(f"the machine cannot be built: {error.strerror}") from error

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    # --- building
    def _init_td(self) -> None:
        caps = self.vm.memory_encrypt_op(TdxCommand.CAPABILITIES)
        assert isinstance(caps, TdxCapabilities)
        attributes = Attributes.SEPT_VE_DISABLE | (Attributes.DEBUG if self.config.debug_td else 0)
        supported = {(e.function, e.index): e for e in self.kvm.get_supported_cpuid()}
        chosen = [supported[e.function, e.index] for e in caps.cpuid if (e.function, e.index) in supported]
        width = self.config.gpa_width << 16
        cpuid = tuple(replace(e, eax=e.eax & ~0xFF0000 | width) if e.function == _ADDRESS_LEAF else e for e in chosen)
        self.vm.memory_encrypt_op(
            TdxCommand.INIT_VM,
            TdxInitVm(
                attributes=attributes,
                mrconfigid=self.config.mrconfigid,
                mrowner=self.config.mrowner,
                mrownerconfig=self.config.mrownerconfig,
                cpuid=cpuid,
            ),
        )

    def load(self, payload: Payload) -> None:
        """Put launcher and payload into memory and make the vCPUs. MachineError when they do not fit."""
        if self._vcpu_count() > MAX_VCPUS:
            raise MachineError(f"{self.config.vcpus} vCPUs and the agent's; a machine has 1 to {MAX_VCPUS}")
        layout = lay_out(payload, self.config.memory, self.config.vcpus, agent=self.config.agent)
        self.load_contents([(FIRMWARE_BASE, firmware_image(layout)), *layout.present])
        if self.config.vm:
            return
        try:
            for base, size, kind in layout.ranges():
                if kind == RANGE_TO_ACCEPT:  # the launcher will accept all of it, so spare it the faults
                    self.vcpus[0].pre_fault_memory(base, size)
        except KvmError as error:
            raise MachineError(f"the machine cannot be built: {error.strerror}") from error

    def load_contents(self, contents: list[tuple[int, bytes]]) -> None:
        """The same with any initial memory: (GPA, whole pages), the firmware below 4 GiB first."""
        free = self.host.memory.free_pages * PAGE
        if self.config.memory > free:
            raise MachineError(
                f"the machine is to have {self.config.memory >> 20} MiB of memory, the simulated host has only "
                f"{free >> 20} MiB free; give --memory less, or --platform with more ram and cmrs"
            )
        try:
            self._add_memory(0, 0, self.config.memory)
            self._add_memory(1, contents[0][0], len(contents[0][1]))
            for vcpu_id in range(self._vcpu_count()):
                self._add_vcpu(vcpu_id)
            for gpa, data in contents:
                self._place(gpa, data)
            if not self.config.vm:
                self.vm.memory_encrypt_op(TdxCommand.FINALIZE_VM)
                self._mrtd = self._read_mrtd()
        except KvmError as error:
            raise MachineError(f"the machine cannot be built: {error.strerror}") from error

    def _add_memory(self, slot: int, gpa: int, size: int) -> None:
        hva = self.kvm.mm.mmap(size)
        if self.config.vm:
            self.vm.set_user_memory_region2(slot, gpa, size, hva)
            return
        file = self.vm.create_guest_memfd(size)
        self.vm.set_user_memory_region2(slot, gpa, size, hva, MemorySlotFlag.GUEST_MEMFD, file)
        self.vm.set_memory_attributes(gpa, size, MEMORY_ATTRIBUTE_PRIVATE)

    def _add_vcpu(self, vcpu_id: int) -> None:
        vcpu = self.vm.create_vcpu(vcpu_id)
        self.vcpus.append(vcpu)
        vcpu.set_cpuid2(self._cpuid(vcpu_id))
        if not self.config.vm:
            vcpu.memory_encrypt_op(TdxCommand.INIT_VCPU, 0)
            return
        flat = Segment(0x10, 0, 0xFFFF_FFFF, AR_DATA32)
        code = Segment(0x08, 0, 0xFFFF_FFFF, AR_CODE32)
        vcpu.set_sregs(Sregs(cs=code, ds=flat, es=flat, fs=flat, gs=flat, ss=flat, cr0=_CR0_PE_NE))
        vcpu.set_regs(Regs((0, 0, 0, 48, 0, 0, vcpu_id) + (0,) * 9, _RESET_VECTOR))

    def _vcpu_count(self) -> int:
        """The payload's, and the launcher's agent."""
        return self.config.vcpus + self.config.agent

    def _make_agent(self) -> Agent:
        """Who answers in the TD, as the host sees him."""
        if self._quoting is None:
            raise MachineError("a TD whose agent gives quotes needs a quoting service")
        return PortAgent(self._quoting.sign, self._wait, self._look_again)

    def _cpuid(self, vcpu_id: int) -> list[CpuidEntry]:
        """What KVM answers to CPUID on a vCPU."""
        del vcpu_id
        return self.kvm.get_supported_cpuid()

    def _place(self, gpa: int, data: bytes) -> None:
        """Initial contents: written by the VMM, or for a TD added and measured from a copy that is dropped after."""
        mm = self.kvm.mm
        if self.config.vm:
            slot = self.vm.memslots.find(gpa)
            assert slot is not None
            mm.write(slot.hva(gpa), data)
            return
        source = mm.mmap(len(data))
        mm.write(source, data)
        region = TdxInitMemRegion(source, gpa, len(data) // PAGE)
        self.vcpus[0].memory_encrypt_op(TdxCommand.INIT_MEM_REGION, region)
        mm.munmap(source)

    # --- running
    def run(self) -> MachineResult:
        """Run until the guest ends, or `stop`. KeyboardInterrupt stops the machine and is passed on."""
        start, before, undefined = perf_counter(), self._instructions(), self._undefined()
        threads = [
            threading.Thread(target=self._run_vcpu, args=(vcpu,), name=f"vcpu{vcpu.vcpu_id}", daemon=True)
            for vcpu in self.vcpus
        ]
        for thread in threads:
            thread.start()
        try:
            with self._lock:
                while self._ending is None:
                    self._lock.wait(_POLL)
        except KeyboardInterrupt:
            self.stop()
            raise
        finally:
            self._kick_until_gone(threads)
            if self.agent is not None:
                self.agent.close(self._ending.end.value if self._ending is not None else "interrupted")
        result = self._ending
        assert result is not None
        if self._bug is not None:
            where = "SOFTTDX_TRACEBACK=1 shows where"
            raise MachineError(f"internal error while a vCPU ran: {result.message} ({where})") from self._bug
        result.console, result.wall_s = bytes(self._console), perf_counter() - start
        result.instructions, result.stats = self._instructions() - before, self.vm.stats
        result.undefined = sorted(self._undefined() - undefined)
        result.mrtd = self.mrtd()
        return result

    def stop(self) -> None:
        """End the run from outside."""
        self._finish(MachineResult(End.STOPPED, message="stopped"))

    def mrtd(self) -> bytes | None:
        """The TD's MRTD, final once the TD is; None before, and for an ordinary VM."""
        return self._mrtd

    def _read_mrtd(self) -> bytes:
        """TDH.MNG.RD, while the TD is sure to answer: it does not any more once it died."""
        from softtdx.kvm.tdx import TdxVm

        ops = self.vm.ops
        assert isinstance(ops, TdxVm)
        count = table("td")["MRTD"].num_elements
        return b"".join(ops.read_td_field("MRTD", i).to_bytes(8, "little") for i in range(count))

    def close(self) -> None:
        """Tear the machine down: every page and KeyID goes back."""
        self._services.close()
        self._close_vm()

    def _close_vm(self) -> None:
        try:
            for vm in list(self.kvm.vms):
                vm.close()
        finally:
            self.kvm.mm.close()

    def _kick_until_gone(self, threads: list[threading.Thread]) -> None:
        for vcpu, thread in zip(self.vcpus, threads, strict=True):
            while thread.is_alive():
                vcpu.kick()
                thread.join(0.01)

    def _undefined(self) -> set[str]:
        """What the simulated processors could not execute so far, disassembled."""
        return {text for lp in self.host.cpus.online() for text in self.host.cpus.call_on(lp.index, _undefined_on)}

    def _instructions(self) -> int:
        return sum(vcpu.instructions for vcpu in self.vcpus)

    def _run_vcpu(self, vcpu: Vcpu) -> None:
        try:
            while self._ending is None:
                self._handle(vcpu, vcpu.run())
        except KvmError as error:
            if self._ending is None:
                self._finish(MachineResult(End.CRASH, message=str(error.strerror)))
        except MachineCheck as fault:
            self._finish(MachineResult(End.CRASH, message=f"machine check: poison was consumed at {fault.pa:#x}"))
        except Exception as error:  # a bug of ours must not leave the machine waiting for ever; `run` raises it
            self._bug = error
            self._finish(MachineResult(End.CRASH, message=f"{type(error).__name__}: {error}"))

    def _handle(self, vcpu: Vcpu, run: KvmRun) -> None:
        reason = run.exit_reason
        if reason is KvmExit.IO and run.io is not None:
            self._ports.access(vcpu.vcpu_id, run.io)
        elif reason is KvmExit.HYPERCALL and run.hypercall is not None:
            self._services.hypercall(run.hypercall)
        elif reason is KvmExit.TDX and run.tdx is not None:
            self._services.tdx(run.tdx, vcpu.vcpu_id)
        elif reason is KvmExit.HLT:
            self._wait(vcpu.vcpu_id, lambda: False)
        elif reason is KvmExit.MMIO and run.mmio is not None:
            run.mmio.value = (1 << 8 * run.mmio.size) - 1
        elif reason is KvmExit.MEMORY_FAULT and run.memory_fault is not None:
            self._memory_fault(run.memory_fault)
        elif reason is KvmExit.SYSTEM_EVENT and run.fatal is not None:
            text = run.fatal.message.decode("ascii", "replace")
            self._finish(
                MachineResult(
                    End.FATAL, run.fatal.error, f"the guest reported a fatal error {run.fatal.error:#x}: {text}"
                )
            )
        elif reason is not KvmExit.INTR:
            self._finish(MachineResult(End.CRASH, message=run.detail or f"KVM_EXIT_{reason.name}"))

    def _memory_fault(self, fault: MemoryFaultExit) -> None:
        """The guest touched the alias that the memory does not have now: convert it. Where there is none, that's it."""
        slot = self.vm.memslots.find(fault.gpa)
        if slot is None or (fault.private and slot.guest_memfd is None):
            what = f"the guest touched private memory at {fault.gpa:#x}, where it has none"
            self._finish(MachineResult(End.CRASH, message=what))
            return
        self.vm.set_memory_attributes(fault.gpa, fault.size, MEMORY_ATTRIBUTE_PRIVATE if fault.private else 0)

    # --- what devices do
    def _output(self, data: bytes) -> None:
        self._console += data
        if self._sink is not None:
            self._sink(data)

    def _exit(self, status: int) -> None:
        self._finish(MachineResult(End.EXIT, status, "" if status == 0 else f"the guest ended with status {status}"))

    def _park(self, vcpu: int) -> None:
        # A wake-up that came before the vCPU parked counts, so that none is lost.
        self._wait(vcpu, lambda: self._wakes != self._woken.get(vcpu, 0))
        self._woken[vcpu] = self._wakes

    def _wake(self) -> None:
        with self._lock:
            self._wakes += 1
        self._look_again()

    def _look_again(self) -> None:
        """Let vCPUs that sleep see whether they still may."""
        with self._lock:
            self._lock.notify_all()

    def _wait(self, vcpu: int, awake: Callable[[], bool]) -> None:
        """The vCPU sleeps until `awake`; when all sleep and nothing is left to wake one, the machine has halted."""
        with self._lock:
            if awake():
                return
            self._idle.add(vcpu)
            if len(self._idle) == len(self.vcpus):
                self._finish(MachineResult(End.HALTED))
            while self._ending is None and not awake():
                self._lock.wait(_POLL)
            self._idle.discard(vcpu)

    def _finish(self, result: MachineResult) -> None:
        with self._lock:
            if self._ending is None:
                self._ending = result
            self._lock.notify_all()


def _undefined_on(lp: LogicalProcessor) -> list[str]:
    return lp.core.undefined()
