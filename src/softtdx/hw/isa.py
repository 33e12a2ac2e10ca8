"""Wall 2: the instruction set, as software in SEAM root mode may use it.

The SEAM loader and the TDX module get a `SeamCpu` and nothing else of the hardware. Its methods are the
instructions that Intel's module uses (facts: static counts of special instructions in module 1.5): loads and stores
through keyholes with any KeyID, MOVDIR64B, VMREAD/VMWRITE/VMPTRLD/VMCLEAR/VMLAUNCH/VMRESUME, RDMSR/WRMSR, CPUID,
INVEPT, PCONFIG, SEAMOPS, RDRAND/RDSEED, RDTSC, XSAVES/XRSTORS, LOCK-prefixed instructions on words of its own
(`LockWords`, `HeldLocks`). Loads in a row (`walk_ept`, `PamtPath`) and SHA-384 from memory are one call each.
SEAMRET is the return from the entry point.
"""

from typing import TYPE_CHECKING, Protocol

from softtdx._silicon import HeldLocks, LockWords, PamtPath
from softtdx.hw.description import CpuidValues
from softtdx.hw.registers import Registers
from softtdx.hw.seamops import SeamIdentity, SeamOpsStatus

if TYPE_CHECKING:
    from softtdx.hw.lp import LogicalProcessor

__all__ = ["HeldLocks", "LockWords", "PamtPath", "SeamCpu", "SeamSoftware"]


class SeamSoftware(Protocol):
    """What lies in SEAMRR and is entered by SEAMCALL."""

    def seam_entry(self, cpu: "SeamCpu", regs: Registers) -> None:
        """SEAMCALL was executed on `cpu` with `regs`; results go into `regs`, the return is SEAMRET."""


class SeamCpu:
    """One logical processor in SEAM root mode.

    `pa` operands are bus addresses: KeyID in the bits above the DRAM address. Faults are those of `hw.faults`:
    BusFault, MachineCheck (fatal to the SEAM software: it is shut down, the host sees #MC), GeneralProtection.
    """

    __slots__ = (
        "_lp",
        "apic_id",
        "cas64",
        "copy_page",
        "core",
        "extend_sha384",
        "gpr",
        "gprs",
        "index",
        "invept",
        "invvpid",
        "load_gprs",
        "package",
        "rd8",
        "rd16",
        "rd32",
        "rd64",
        "rdtsc",
        "read",
        "set_gpr",
        "set_gprs",
        "set_xmm",
        "store_gprs",
        "vmclear",
        "vmptrld",
        "vmread",
        "vmwrite",
        "walk_ept",
        "wr8",
        "wr16",
        "wr32",
        "wr64",
        "write",
        "xinit",
        "xmm",
        "xrstor",
        "xsave",
        "zero_page",
    )  # fmt: skip

    def __init__(self, lp: "LogicalProcessor") -> None:
        """The SEAM view of `lp`. The frequent instructions are bound straight to the silicon."""
        core = lp.core
        self._lp = lp
        self.core = core
        self.index = lp.index
        self.apic_id = lp.apic_id
        self.package = lp.package
        self.rd8, self.rd16, self.rd32, self.rd64 = core.rd8, core.rd16, core.rd32, core.rd64
        self.wr8, self.wr16, self.wr32, self.wr64 = core.wr8, core.wr16, core.wr32, core.wr64
        self.read, self.write, self.cas64 = core.read, core.write, core.cas64
        self.zero_page, self.copy_page = core.zero_page, core.copy_page
        self.walk_ept, self.extend_sha384 = core.walk_ept, core.extend_sha384
        self.vmread, self.vmwrite, self.vmptrld, self.vmclear = (
            core.vmread,
            core.vmwrite,
            core.vmptrld,
            core.vmclear,
        )
        self.gpr, self.set_gpr = core.gpr, core.set_gpr
        self.gprs, self.set_gprs = core.gprs, core.set_gprs
        self.xmm, self.set_xmm = core.xmm, core.set_xmm
        self.load_gprs, self.store_gprs = core.load_gprs, core.store_gprs
        self.xsave, self.xrstor, self.xinit = core.xsave, core.xrstor, core.xinit
        self.invept, self.invvpid, self.rdtsc = core.invept, core.invvpid, core.rdtsc

    def vmenter(self, launch: bool) -> int:
        """VMLAUNCH or VMRESUME of the current VMCS in SEAM non-root mode; returns the exit reason of the VM exit."""
        return self._lp.enter_guest(launch)

    def cpuid(self, leaf: int, subleaf: int = 0) -> CpuidValues:
        """CPUID of the real processor."""
        return self._lp.cpuid(leaf, subleaf)

    def rdmsr(self, msr: int) -> int:
        """RDMSR. GeneralProtection when there is no such MSR."""
        return self._lp.rdmsr(msr)

    def wrmsr(self, msr: int, value: int) -> None:
        """WRMSR. GeneralProtection when there is no such MSR."""
        self._lp.wrmsr(msr, value)

    def rdrand(self) -> int:
        """RDRAND: 64 random bits."""
        return self._lp.platform.entropy.u64()

    def retired_instructions(self) -> int:
        """RDMSR IA32_FIXED_CTR0: instructions retired in non-root mode since the processor was powered on."""
        return self._lp.retired_instructions()

    def self_interrupt(self, *, nmi: bool = False) -> None:
        """WRMSR IA32_X2APIC_ICR to itself: an interrupt taken from the host while its TD was examined comes again."""
        if nmi:
            self._lp.nmi()
        else:
            self._lp.interrupt()

    def interrupt_pending(self) -> bool:
        """IA32_INTR_PENDING (0x9A): long leaf functions stop early when an interrupt waits for the host."""
        return self._lp.interrupt_pending

    def pconfig(self, keyid: int) -> bool:
        """PCONFIG MKTME_KEY_PROGRAM, "set random key" on this package: False when the key table is busy."""
        return self._lp.platform.program_random_key(self._lp.package, keyid)

    def flush_caches(self) -> None:
        """WRMSR IA32_WBNOINVDP: write back this package's caches."""
        self._lp.platform.write_back_caches(self._lp.package)

    def flush_page(self, pa: int) -> None:
        """CLFLUSH of every line of a 4 KiB page, under the KeyID in `pa`."""
        self._lp.platform.caches.flush(pa, 4096)

    # --- SEAMOPS
    def seamops_capabilities(self) -> int:
        """CAPABILITIES."""
        return self._lp.platform.seamops.capabilities()

    def seamops_database_reference(self) -> tuple[int, bytes, int] | None:
        """SEAMDB_GETREF: (last index, 32-byte nonce, size), None when the database is empty."""
        return self._lp.platform.seamops.database_reference()

    def seamops_report(
        self,
        report_type: bytes,
        report_data: bytes,
        tee_info_hash: bytes,
        reference: tuple[int, bytes] | None = None,
    ) -> tuple[SeamOpsStatus, bytes]:
        """SEAMREPORT/SEAMDB_REPORT: (status, REPORTMACSTRUCT 256 bytes then TEE_TCB_INFO 239 bytes)."""
        return self._lp.platform.seamops.report(report_type, report_data, tee_info_hash, reference)

    def seamops_verify_report(self, report_mac: bytes) -> SeamOpsStatus:
        """SEAMVERIFYREPORT of a 256-byte REPORTMACSTRUCT."""
        return self._lp.platform.seamops.verify(report_mac)

    # --- the loader's own instructions
    def seamextend(self, identity: SeamIdentity, *, preserve_database: bool) -> None:
        """SEAMEXTEND and SEAMDB_INSERT: record the module being installed; a fresh load clears the database."""
        seamops = self._lp.platform.seamops
        if not preserve_database:
            seamops.database_clear()
        seamops.seamextend(identity)
        seamops.database_insert()

    def publish(self, kind: str, **data: object) -> None:
        """The trace pins of the processor: nothing happens when nobody listens."""
        events = self._lp.platform.events
        events.counts[kind] += 1
        number = data.get("leaf", data.get("reason"))
        if isinstance(number, int):
            events.by_number[kind, number] += 1
        if events.active:
            events.publish(kind, self.index, **data)
