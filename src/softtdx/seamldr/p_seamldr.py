"""P-SEAMLDR: the persistent SEAM loader. It verifies, installs, updates and shuts down the TDX module.

Order of checks and state machine follow the behaviour of Intel's P-SEAMLDR (interface specification, chapter
"SEAMLDR.INSTALL"): every logical processor calls INSTALL; the last one does the work. A failure before the module
range is touched leaves RDX = 0 (recoverable: the old module, if any, goes on); afterwards RDX = 1.
"""

import hashlib
from enum import Enum
from threading import Lock
from typing import Protocol

from softtdx.abi.leaves import SeamldrLeaf
from softtdx.abi.msrs import TME_ACTIVATE_KEYID_BITS_SHIFT, Msr
from softtdx.abi.status import SeamldrStatus
from softtdx.abi.structs import (
    SIGSTRUCT_VENDOR_INTEL,
    SeamExtend,
    SeamldrInfo,
    SeamldrParams,
    SeamldrScenario,
    SeamSigstruct,
    SysInfoTable,
)
from softtdx.hw.isa import SeamCpu, SeamSoftware
from softtdx.hw.registers import Registers
from softtdx.hw.seamops import SeamIdentity
from softtdx.seamldr.image import PAGE, ImageError, load_image
from softtdx.seamldr.sigstruct import fields_problem, signature_is_good, signer_hash

__all__ = ["PSeamldr"]

_RECOVERABLE, _UNRECOVERABLE = 0, 1
_MAX_MODULE_PAGES = SeamldrParams.module_pages.count
_CODE_REGION = 2 << 20
_SEAMEXTEND_VALID = 0x1FF
_UPDATES_PER_BOOT = 63  # the SEAM database holds 64 generations
_STEPPING = 0xF
_LINEAR = {
    "code": 0xFFFF_8000_0000_0000,
    "stack": 0xFFFF_8001_0000_0000,
    "keyhole": 0xFFFF_8002_0000_0000,
    "data": 0xFFFF_8003_0000_0000,
    "keyhole_edit": 0x0000_0001_0000_0000,
}


class _Failed(Exception):  # noqa: N818 - it ends a flow and never leaves this file
    """INSTALL ends with a status; RDX says if the platform can go on as before."""

    def __init__(self, status: SeamldrStatus, recoverable: int = _RECOVERABLE) -> None:
        super().__init__(status.name)
        self.status = status
        self.recoverable = recoverable


class _Flow(Enum):
    READY = "ready"
    INSTALL = "install"
    SHUTDOWN = "shutdown"


class SeamRegion(Protocol):
    """SEAMRR as the loader needs it: where it lies, and the slots of what SEAMCALL reaches."""

    base: int
    size: int
    loader: SeamSoftware | None
    module: SeamSoftware | None
    shut_down: bool


class PSeamldr:
    """The loader in SEAMRR. SEAMCALL with RAX bit 63 enters `seam_entry`."""

    def __init__(self, region: SeamRegion, *, acm_apic_id: int, signer: bytes) -> None:
        """Installed by the NP-SEAMLDR that ran on the processor with `acm_apic_id`; trusts `signer` only."""
        self._region = region
        self._acm_apic_id = acm_apic_id
        self._signer = signer
        self._lock = Lock()
        self._flow = _Flow.READY
        self._installing: set[int] = set()
        self._shutting_down: set[int] = set()
        self._suspended: SeamSoftware | None = None  # the module while its SEAM_READY is off
        self._identity: SeamIdentity | None = None
        self._remaining_updates = _UPDATES_PER_BOOT
        self._leaves = {
            SeamldrLeaf.INFO: self._info,
            SeamldrLeaf.INSTALL: self._install,
            SeamldrLeaf.SHUTDOWN: self._shutdown,
            SeamldrLeaf.SEAMINFO: self._seaminfo,
        }

    def seam_entry(self, cpu: SeamCpu, regs: Registers) -> None:
        """Dispatch a SEAMLDR leaf: RAX status, other results by leaf. One call at a time (EBADCALL otherwise)."""
        leaf = self._leaves.get(regs.rax)  # type: ignore[call-overload]
        if leaf is None:
            regs.rax = SeamldrStatus.EBADPARAM
            return
        if not self._lock.acquire(blocking=False):
            regs.rax = SeamldrStatus.EBADCALL
            return
        try:
            regs.rax = leaf(cpu, regs)
        finally:
            self._lock.release()

    # --- SEAMLDR.INFO, SEAMLDR.SEAMINFO
    def _info(self, cpu: SeamCpu, regs: Registers) -> SeamldrStatus:
        if not self._is_shared_page(cpu, regs.rcx, SeamldrInfo.SIZE):
            return SeamldrStatus.EBADPARAM
        info = SeamldrInfo()
        info.vendor_id = SIGSTRUCT_VENDOR_INTEL
        info.build_date, info.build_num, info.minor_version, info.major_version = 0x20261123, 1, 5, 1
        info.acm_x2apic_id = self._acm_apic_id
        info.num_remaining_updates = self._remaining_updates
        identity = self._identity
        if identity is not None:
            self._fill_seam_extend(info.seam_extend, identity)
        cpu.write(regs.rcx, bytes(info))
        return SeamldrStatus.SUCCESS

    def _fill_seam_extend(self, record: SeamExtend, identity: SeamIdentity) -> None:
        record.valid = _SEAMEXTEND_VALID
        record.tee_tcb_svn, record.attributes = identity.tee_tcb_svn, identity.attributes
        record.mrseam, record.mrsigner = identity.mrseam, identity.mrsigner
        record.seam_ready, record.p_seamldr_ready = int(self._region.module is not None), 1

    def _seaminfo(self, cpu: SeamCpu, regs: Registers) -> SeamldrStatus:
        if not self._is_shared_page(cpu, regs.rcx, 2048):
            return SeamldrStatus.EBADPARAM
        cpu.write(regs.rcx, cpu.read(self._region.base, 2048))
        return SeamldrStatus.SUCCESS

    # --- SEAMLDR.INSTALL
    def _install(self, cpu: SeamCpu, regs: Registers) -> SeamldrStatus:
        if self._shutting_down or self._flow is _Flow.SHUTDOWN or cpu.apic_id in self._installing:
            return SeamldrStatus.EBADCALL
        if not self._installing:
            # SEAM_READY goes off: no SEAMCALL reaches the module while its successor is installed.
            self._suspended, self._region.module = self._region.module, None
            self._flow = _Flow.INSTALL
        self._installing.add(cpu.apic_id)
        table = self._sysinfo(cpu)
        if len(self._installing) < table.tot_num_lps:
            regs.rdx = 0
            return SeamldrStatus.SUCCESS
        try:
            self._region.module = self._load(cpu, regs.rcx, table)
            self._region.shut_down = False
            status, regs.rdx = SeamldrStatus.SUCCESS, 0
        except _Failed as failure:
            if failure.recoverable == _RECOVERABLE:
                self._region.module = self._suspended
            status, regs.rdx = failure.status, failure.recoverable
        finally:
            self._suspended = None
            self._installing.clear()
            self._flow = _Flow.READY
        return status

    def _load(self, cpu: SeamCpu, params_pa: int, table: SysInfoTable) -> SeamSoftware:
        if not self._is_shared_page(cpu, params_pa, PAGE):
            raise _Failed(SeamldrStatus.EBADPARAM)
        # Both structures are copied once: the host may change them while we look.
        params = SeamldrParams(cpu.read(params_pa, PAGE))
        self._check_params(cpu, params)
        sigstruct = SeamSigstruct(cpu.read(params.sigstruct_pa, SeamSigstruct.SIZE))
        self._check_sigstruct(params, sigstruct, table)
        update = params.scenario == SeamldrScenario.UPDATE
        if update and self._remaining_updates == 0:
            raise _Failed(SeamldrStatus.EBADCALL)

        # From here the module range changes: what fails now cannot be undone.
        code_pa = self._region.base + self._region.size - 2 * _CODE_REGION
        for index, page in enumerate(params.module_pages[: params.num_module_pages]):
            cpu.write(code_pa + index * PAGE, cpu.read(page, PAGE))
        image = cpu.read(code_pa, params.num_module_pages * PAGE)
        if hashlib.sha384(image).digest() != sigstruct.seamhash:
            raise _Failed(SeamldrStatus.EBADHASH, _UNRECOVERABLE)
        if not update:  # the data pages of a module that was there before: their first one holds its handoff data
            cpu.zero_page(self._region.base + PAGE * (1 + table.tot_num_lps))
        self._write_sysinfo(cpu, params, sigstruct, table)
        try:
            module = load_image(image)(cpu, cpu.read(self._region.base, SysInfoTable.SIZE))
        except ImageError as error:
            raise _Failed(SeamldrStatus.EUNSPECERR, _UNRECOVERABLE) from error
        svn = sigstruct.seamsvn.to_bytes(2, "little")
        self._identity = SeamIdentity(
            tee_tcb_svn=svn.ljust(16, b"\0"),
            mrseam=sigstruct.seamhash,
            mrsigner=bytes(48),  # the platform's own signer reports as zero
            attributes=sigstruct.attributes,
        )
        self._remaining_updates = self._remaining_updates - 1 if update else _UPDATES_PER_BOOT
        cpu.seamextend(self._identity, preserve_database=update)
        return module

    def _check_params(self, cpu: SeamCpu, params: SeamldrParams) -> None:
        good = (
            params.version == 0
            and params.reserved_is_zero()
            and params.scenario in (SeamldrScenario.LOAD, SeamldrScenario.UPDATE)
            and 1 <= params.num_module_pages <= _MAX_MODULE_PAGES
            and all(self._is_shared_page(cpu, page, PAGE) for page in params.module_pages[: params.num_module_pages])
            and self._is_shared_page(cpu, params.sigstruct_pa, PAGE)
            and not (params.scenario == SeamldrScenario.UPDATE and self._suspended is None)
        )
        if not good:
            raise _Failed(SeamldrStatus.EBADPARAM)

    def _check_sigstruct(self, params: SeamldrParams, s: SeamSigstruct, table: SysInfoTable) -> None:
        if fields_problem(s) is not None or signer_hash(s.modulus) != self._signer:
            raise _Failed(SeamldrStatus.EBADSIG)
        if s.module_type >> 31:  # debug-signed modules need a debug-unlocked platform, which this never is
            raise _Failed(SeamldrStatus.EBADSIG)
        minor, major = s.seamsvn & 0xFF, s.seamsvn >> 8
        if major == 0:
            raise _Failed(SeamldrStatus.EUNSPECERR)
        if params.scenario == SeamldrScenario.UPDATE and self._identity is not None:
            old_minor, old_major = self._identity.tee_tcb_svn[0], self._identity.tee_tcb_svn[1]
            if major != old_major:
                raise _Failed(SeamldrStatus.EUNSPECERR)
            if minor < old_minor:
                raise _Failed(SeamldrStatus.EBADSIG)
        if s.gdt_idt_offset > params.num_module_pages * PAGE - PAGE:
            raise _Failed(SeamldrStatus.EBADSIG)
        cpus = {value & ~_STEPPING for value in s.cpuid_table[: s.cpuid_table_size]}
        here = {value & ~_STEPPING for value in table.socket_cpuid_table[: table.tot_num_sockets]}
        if cpus and not here <= cpus:
            raise _Failed(SeamldrStatus.EUNSUPCPU)
        if not cpus or not signature_is_good(s):
            raise _Failed(SeamldrStatus.EBADSIG)

    # --- SEAMLDR.SHUTDOWN
    def _shutdown(self, cpu: SeamCpu, regs: Registers) -> SeamldrStatus:
        del regs
        if self._installing or self._flow is _Flow.INSTALL:
            return SeamldrStatus.EBADCALL
        if not self._shutting_down:
            self._region.module = None
            self._flow = _Flow.SHUTDOWN
        self._shutting_down.add(cpu.apic_id)
        if len(self._shutting_down) < self._sysinfo(cpu).tot_num_lps:
            return SeamldrStatus.SUCCESS
        if cpu.apic_id != self._acm_apic_id:  # the last call must come from the processor that launched the ACM
            return SeamldrStatus.EBADCALL
        self._region.loader = None
        return SeamldrStatus.SUCCESS

    # --- SEAMRR
    def _sysinfo(self, cpu: SeamCpu) -> SysInfoTable:
        return SysInfoTable(cpu.read(self._region.base, SysInfoTable.SIZE))

    def _write_sysinfo(self, cpu: SeamCpu, params: SeamldrParams, s: SeamSigstruct, firmware: SysInfoTable) -> None:
        table = SysInfoTable(bytearray(bytes(firmware)))
        table.seam_status = 1
        lps = firmware.tot_num_lps
        table.code_rgn_base, table.code_rgn_size = _LINEAR["code"], params.num_module_pages * PAGE
        data = (s.num_tls_pages + 1) * lps + s.num_global_data_pages + 1 + s.num_handoff_pages + 1
        table.data_rgn_base, table.data_rgn_size = _LINEAR["data"], data * PAGE
        stack = (s.num_stack_pages + 2) * lps
        table.stack_rgn_base, table.stack_rgn_size = _LINEAR["stack"], stack * PAGE
        keyholes = (s.num_keyhole_pages + 1) * lps
        table.keyhole_rgn_base, table.keyhole_rgn_size = _LINEAR["keyhole"], keyholes * PAGE
        table.keyhole_edit_rgn_base = _LINEAR["keyhole_edit"]
        table.keyhole_edit_rgn_size = -(-keyholes * 8 // PAGE) * PAGE
        table.num_stack_pages, table.num_tls_pages = s.num_stack_pages, s.num_tls_pages
        table.module_hv, table.min_update_hv = s.module_hv, s.min_update_hv
        table.no_downgrade, table.num_handoff_pages = s.no_downgrade, s.num_handoff_pages
        cpu.write(self._region.base, bytes(table))

    def _is_shared_page(self, cpu: SeamCpu, pa: int, size: int) -> bool:
        """A host buffer: aligned to its size (4 KiB at most), under a shared KeyID, not in SEAMRR."""
        keyid_bits = cpu.rdmsr(Msr.TME_ACTIVATE) >> TME_ACTIVATE_KEYID_BITS_SHIFT & 0xF
        last_shared = cpu.rdmsr(Msr.MKTME_KEYID_PARTITIONING) & 0xFFFF_FFFF
        shift = 52 - keyid_bits
        address = pa & (1 << shift) - 1
        region = self._region
        return (
            pa >> 52 == 0
            and pa % min(size, PAGE) == 0
            and pa >> shift <= last_shared
            and not region.base <= address < region.base + region.size
        )
