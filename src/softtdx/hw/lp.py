"""A logical processor: its modes, and the instructions that lead from one to another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING

from softtdx._silicon import Core
from softtdx.abi.msrs import Msr
from softtdx.hw.description import CpuidValues
from softtdx.hw.faults import GeneralProtection, MachineCheck, SeamShutdown, UndefinedOpcode, VmFail
from softtdx.hw.isa import SeamCpu
from softtdx.hw.registers import Registers

if TYPE_CHECKING:
    from softtdx.hw.platform import Platform

__all__ = ["GuestEngine", "LogicalProcessor", "Mode"]

GuestEngine = Callable[[Core, bool], int]
"""(core, launch) -> exit reason: stands in for the interpreter, e.g. to replay recorded exits."""

_ESCAPE = 0x10000  # Core.vmenter: the guest executed the escape instruction of hook n = low 16 bits
_P_SEAMLDR = 1 << 63
_LEAF_MASK = 0xFFFF
_VMCS_REVISION = 0x7FFF_FFFF  # of IA32_VMX_BASIC
_CPUID_XSTATE = 0xD
_XSAVE_LEGACY_SIZE = 576  # the legacy region and the header
_XSAVE_ALIGNED = 1 << 1  # CPUID(0DH, n).ECX: at a 64-byte boundary in the compacted format

_LOCKED_BY_FIRMWARE = (Msr.MKTME_KEYID_PARTITIONING, Msr.TME_ACTIVATE, Msr.SEAMRR_PHYS_BASE, Msr.SEAMRR_PHYS_MASK)


class Mode(Enum):
    """Where the processor executes. Non-root modes are inside `enter_guest`; the last three are for `executing_in`."""

    VMX_ROOT = "VMX root"
    SEAM_ROOT = "SEAM root"
    VMX_NON_ROOT = "VMX non-root"
    SEAM_NON_ROOT = "SEAM non-root"
    OUTSIDE_VMX = "no VMX"  # before VMXON or after VMXOFF
    USER = "user"  # VMX root operation, CPL 3
    SMM = "system-management"


# Finding a member of an Enum takes CPython 3.11 0.3 us, and a SEAMCALL changes modes several times.
_VMX_ROOT, _SEAM_ROOT, _VMX_NON_ROOT, _SEAM_NON_ROOT, _OUTSIDE_VMX, _USER, _SMM = Mode

_NO_GPRS = (0,) * 16


class LogicalProcessor:
    """One hardware thread. The host (VMX root) uses it directly; SEAM software gets `SeamCpu`.

    One thread of the host uses it at a time (KVM: the vCPU thread that is scheduled on it); `interrupt` and `nmi`
    may come from any.
    """

    def __init__(self, platform: "Platform", index: int) -> None:
        """Processor `index` of `platform`, in VMX root mode, as after VMXON."""
        d = platform.description
        self.platform = platform
        self.index = index
        self.package = index // d.lps_per_package
        self.apic_id = index
        self.mode = _VMX_ROOT
        self._td_ran = False
        self._written: dict[int, int] = {}
        self.core = Core(platform.memory, self.apic_id)
        self.core.configure(tsc_hz=d.tsc_hz, tsc_real=d.tsc_real)
        if Msr.VMX_BASIC in d.msrs:
            self.core.configure(vmcs_revision=d.msrs[Msr.VMX_BASIC] & _VMCS_REVISION)
        for msr, value in d.msrs.items():  # a guest reads some of them without a VM exit
            if self.core.rdmsr(msr) is None:
                self.core.wrmsr(msr, value)
        self.interrupt_pending = False
        self._tsc_seen = 0
        self.guest_engine: GuestEngine | None = None
        self._seam_cpu = SeamCpu(self)
        core = self.core
        self.rd8, self.rd16, self.rd32, self.rd64 = core.rd8, core.rd16, core.rd32, core.rd64
        self.wr8, self.wr16, self.wr32, self.wr64 = core.wr8, core.wr16, core.wr32, core.wr64
        self.read, self.write = core.read, core.write
        self.zero_page, self.copy_page = core.zero_page, core.copy_page

    # --- SEAMCALL
    def seamcall(self, regs: Registers | None = None, /, **operands: int) -> Registers:
        """SEAMCALL with `regs`, which hold the results afterwards (and are returned).

        Without `regs` the registers are given by name: `lp.seamcall(rax=33)`.

        RAX bit 63 selects the P-SEAMLDR. Raises UndefinedOpcode outside VMX root mode, GeneralProtection at CPL 3 and
        before SEAMRR is enabled, VmFail (VMfailInvalid) when the SEAM software asked for is not loaded, MachineCheck
        when it consumed poison: then that software is gone for good.
        """
        if regs is None:
            regs = Registers(**operands)
        if self.mode is not _VMX_ROOT:
            raise self._wrong_mode("SEAMCALL")
        platform = self.platform
        if self._tsc_seen != platform.tsc:
            self._follow_tsc()
        seam = platform.seam
        if not seam.enabled:
            raise GeneralProtection("SEAMCALL before SEAMRR is enabled")
        leaf = regs.rax
        to_loader = leaf >> 63
        software = seam.loader if to_loader else seam.module
        if software is None:
            raise VmFail("SEAMCALL: the SEAM software is not loaded")
        events = platform.events
        events.counts["seamldr" if to_loader else "seamcall"] += 1
        given = regs.values() if events.active else ()
        core = self.core
        self.mode = _SEAM_ROOT
        core.seam = True
        try:
            software.seam_entry(self._seam_cpu, regs)
        except MachineCheck:
            seam.unbreakable_shutdown(to_loader=bool(to_loader))
            raise
        except SeamShutdown as shutdown:
            seam.unbreakable_shutdown(to_loader=bool(to_loader))
            raise VmFail(f"SEAMCALL: the SEAM software shut down: {shutdown}") from shutdown
        finally:
            if self._td_ran:  # SEAMRET loads the host's registers: nothing of the TD's stays in the register file
                core.set_gprs(_NO_GPRS)
                self._td_ran = False
            core.seam = False
            self.mode = _VMX_ROOT
        if events.active:
            kind = "seamldr" if to_loader else "seamcall"
            events.publish(kind, self.index, leaf=leaf & _LEAF_MASK, operands=given, results=regs.values())
        return regs

    def seamret(self) -> None:
        """SEAMRET: #UD anywhere but in SEAM root mode, where it is the return of the entry point."""
        if self.mode is not _SEAM_ROOT:
            raise UndefinedOpcode(f"SEAMRET in {self.mode.value} mode")
        raise GeneralProtection("SEAMRET is the return of the SEAM software's entry point")

    def seamops(self) -> int:
        """SEAMOPS[CAPABILITIES]: #UD outside SEAM root mode."""
        if self.mode is not _SEAM_ROOT:
            raise UndefinedOpcode(f"SEAMOPS in {self.mode.value} mode")
        return self.platform.seamops.capabilities()

    def tdcall(self) -> None:
        """TDCALL: #UD for root-mode software; a TD's own TDCALL is executed by the interpreter."""
        raise UndefinedOpcode(f"TDCALL in {self.mode.value} mode")

    @contextmanager
    def executing_in(self, mode: Mode) -> Iterator[None]:
        """The host's software on this processor executes in OUTSIDE_VMX, USER or SMM for a while, and comes back."""
        if self.mode is not _VMX_ROOT or mode not in (_OUTSIDE_VMX, _USER, _SMM):
            raise ValueError(f"from {self.mode.value} mode to {mode.value} mode")
        self.mode = mode
        try:
            yield
        finally:
            self.mode = _VMX_ROOT

    def _wrong_mode(self, instruction: str) -> UndefinedOpcode | GeneralProtection:
        """A privileged instruction of VMX root mode elsewhere: #GP(0) at CPL 3, else there is no such instruction."""
        fault = GeneralProtection if self.mode is _USER else UndefinedOpcode
        return fault(f"{instruction} in {self.mode.value} mode")

    # --- VMX
    def vmenter(self, launch: bool) -> int:
        """VMLAUNCH/VMRESUME by the host: an ordinary VM runs until its VM exit; returns the exit reason."""
        if self.mode is not _VMX_ROOT:
            raise self._wrong_mode("VMLAUNCH")
        if self._tsc_seen != self.platform.tsc:
            self._follow_tsc()
        return self.enter_guest(launch)

    def enter_guest(self, launch: bool) -> int:
        """Run the current VMCS in the non-root mode that belongs to the current root mode."""
        root = self.mode
        self.mode = _SEAM_NON_ROOT if root is _SEAM_ROOT else _VMX_NON_ROOT
        self._td_ran = root is _SEAM_ROOT
        core = self.core
        try:
            if self.guest_engine is not None:
                reason = self.guest_engine(core, launch)
            else:
                reason = core.vmenter(launch)
                while reason & _ESCAPE and not reason >> 31:
                    self.platform.escapes[reason & 0xFFFF](self)
                    reason = core.vmcontinue()
        finally:
            self.mode = root
            self.platform.tsc = self._tsc_seen = max(core.rdtsc(), self.platform.tsc)
        self.platform.events.counts["vm_exit"] += 1
        return reason

    def _follow_tsc(self) -> None:
        """The TSCs of a machine run in step: catch up with a processor whose virtual TSC has gone further."""
        latest = self._tsc_seen = self.platform.tsc
        behind = latest - self.core.rdtsc()
        if behind > 0:
            self.core.advance_tsc(behind)

    def retired_instructions(self) -> int:
        """IA32_FIXED_CTR0 over non-root mode. A guest engine executes no code: it counts as having run much of it."""
        if self.guest_engine is not None:
            return self.platform.events.counts["vm_exit"] << 16
        return self.core.retired

    # --- interrupts, from any thread
    def interrupt(self) -> None:
        """An external interrupt for this processor: a guest on it exits; long SEAM leaves return early."""
        self.interrupt_pending = True
        self.core.kick()

    def acknowledge_interrupt(self) -> None:
        """The host took the interrupt (its IRQ handler ran)."""
        self.interrupt_pending = False

    def nmi(self) -> None:
        """A non-maskable interrupt for this processor."""
        self.core.nmi()

    # --- CPUID and MSRs of the real processor
    def cpuid(self, leaf: int, subleaf: int = 0) -> CpuidValues:
        """CPUID as executed in root mode; unknown leaves give zeroes."""
        table = self.platform.description.cpuid
        values = table.get((leaf, None)) or table.get((leaf, subleaf))
        if values is None:
            return (0, 0, 0, 0)
        if leaf == _CPUID_XSTATE and subleaf < 2 and self.guest_engine is None:
            return (values[0], self._xsave_area_size(compacted=bool(subleaf)), *values[2:])
        return values

    def _xsave_area_size(self, *, compacted: bool) -> int:
        """Bytes of the XSAVE area for what XCR0 enables; in the compacted format for IA32_XSS too (SDM 13.4.3)."""
        enabled = self.core.xcr0 | ((self.core.rdmsr(Msr.XSS) or 0) if compacted else 0)
        size = _XSAVE_LEGACY_SIZE
        table = self.platform.description.cpuid
        for component in range(2, 63):
            if not enabled >> component & 1:
                continue
            length, offset, flags, _ = table.get((_CPUID_XSTATE, component), (0, 0, 0, 0))
            if not compacted:
                size = max(size, offset + length)
            else:
                size = (size + 63 & ~63 if flags & _XSAVE_ALIGNED else size) + length
        return size

    def rdmsr(self, msr: int) -> int:
        """RDMSR in root mode. Raises GeneralProtection when there is no such MSR."""
        value = self._written.get(msr)
        if value is None:
            value = self.platform.rdmsr(msr)
        if value is None:
            value = self.core.rdmsr(msr)
        if value is None:
            raise GeneralProtection(f"RDMSR of {msr:#x}, which this processor does not have")
        return value

    def wrmsr(self, msr: int, value: int) -> None:
        """WRMSR in root mode. Raises GeneralProtection when there is no such MSR or it is locked."""
        if self.platform.rdmsr(msr) is not None:
            if msr in _LOCKED_BY_FIRMWARE:
                raise GeneralProtection(f"WRMSR of {msr:#x}, which the platform's firmware locked")
            self._written[msr] = value  # differs from the description on this processor from now on
        self.core.wrmsr(msr, value)

    def __repr__(self) -> str:
        """Index, package and mode."""
        return f"<LP {self.index} of package {self.package}, {self.mode.value}>"
