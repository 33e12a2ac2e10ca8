"""The module's own life: TDH.SYS.INIT, LP.INIT, INFO, KEY.CONFIG, TDMR.INIT, LP.SHUTDOWN (SYS.CONFIG: sys_config)."""

import struct
from typing import Final

from softtdx.abi import cpuid as abi_cpuid
from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.status import Operand, Status

from .. import limits, tdcs, tdvps
from ..context import Call
from ..errors import LeafError
from ..handoff import read_header
from ..locks import EXCLUSIVE, SHARED
from ..pamt import ENTRY_SIZE, PageType, publish_block
from ..platform import compare, leaf_subleaf, sample
from ..registry import ALL_VERSIONS, seamcall
from ..shared import check_shared
from ..state import GLOBAL_LOCK, MAX_PACKAGES, TDMR_LOCK, SysState, Tdmr

MIN_HANDOFF_PAGES: Final = 14
SEAMOPS_GETREF_AND_REPORT: Final = 1 << 4 | 1 << 5
SYSINFO_SIZE: Final = 1024
CMR_INFO_SIZE: Final = 512
GIB: Final = 1 << 30
SLICE_PAGES: Final = 1024  # 4 KiB entries initialised by one TDMR.INIT
SLICE_PAGES_DYNAMIC: Final = 4096
LINE: Final = 64
PAGE: Final = 4096
RSVD_ENTRY: Final = struct.pack("<QQ", PageType.RSVD << 16, 0)


def lock_global(call: Call, exclusive: bool) -> None:
    """The lock around the module's own life. LeafError SYS_BUSY."""
    if call.locks.acquire(GLOBAL_LOCK, exclusive):
        raise LeafError(Status.SYS_BUSY)
    call.held.note(GLOBAL_LOCK, exclusive)


@seamcall(SeamcallLeaf.SYS_INIT, versions=ALL_VERSIONS, before_ready=True)
def sys_init(call: Call) -> None:
    """TDH.SYS.INIT: check the machine and set up the module's global data.

    In: RCX reserved; version 1: R8 fatal-error reporting (address bits 51:6, interrupt kind 55:54, vector 63:56).
    Out: after INCORRECT_CPUID_VALUE RCX leaf and subleaf, RDX/R8 mask, R9/R10 expected value; else 0.
    Statuses in order: OPERAND_INVALID (RAX: version), SYS_BUSY, OPERAND_INVALID (RCX), SYS_INIT_NOT_PENDING, those
    of `platform.sample`, INCOMPATIBLE_SEAM_CAPABILITIES, SYS_INCOMPATIBLE_SIGSTRUCT, OPERAND_INVALID (R8).
    """
    regs, g, cpu = call.regs, call.g, call.cpu
    reserved, fatal_info = regs.rcx, regs.r8
    regs.rcx = regs.rdx = regs.r8 = regs.r9 = regs.r10 = 0
    if call.version > 1:
        raise LeafError(Status.OPERAND_INVALID, Operand.RAX)
    lock_global(call, EXCLUSIVE)
    if reserved:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    if g.sys_state is not SysState.INIT_PENDING:
        raise LeafError(Status.SYS_INIT_NOT_PENDING)
    config = sample(cpu, g, regs)
    capabilities = cpu.seamops_capabilities()
    if capabilities & SEAMOPS_GETREF_AND_REPORT != SEAMOPS_GETREF_AND_REPORT:
        raise LeafError(Status.INCOMPATIBLE_SEAM_CAPABILITIES)
    config.seam_capabilities = capabilities
    info = g.sysinfo
    if info.module_hv != limits.MODULE_HV or not info.no_downgrade or info.num_handoff_pages + 1 < MIN_HANDOFF_PAGES:
        raise LeafError(Status.SYS_INCOMPATIBLE_SIGSTRUCT)
    reference = cpu.seamops_database_reference()
    if reference is not None:
        g.seamdb_index, g.seamdb_nonce, _ = reference
    config.attributes_fixed0 = limits.attributes_fixed0(lass=config.lass)
    config.attributes_fixed1 = 0
    if call.version:
        config.fatal_info_pa = _fatal_info(call, fatal_info)
    g.handoff = read_header(cpu, g)
    g.platform = config
    call.module.enter_state(SysState.INIT_DONE)


def _fatal_info(call: Call, raw: int) -> int | None:
    """Version 1's R8: where to write and how to tell when the module dies. All ones in the address: nowhere."""
    address = raw & ((1 << 52) - 1) & ~0x3F
    kind, vector = raw >> 54 & 3, raw >> 56
    nowhere = (1 << 52) - 1 & ~0x3F
    if raw & 0x3F or raw >> 52 & 3:
        raise LeafError(Status.OPERAND_INVALID, Operand.R8)
    if address != nowhere:
        check_shared(call.g, address, LINE, Operand.R8)
    if kind == 1 and vector < 16:
        raise LeafError(Status.OPERAND_INVALID, Operand.R8)
    return None if address == nowhere else address


@seamcall(SeamcallLeaf.SYS_LP_INIT, before_ready=True)
def sys_lp_init(call: Call) -> None:
    """TDH.SYS.LP.INIT: check this processor against what SYS.INIT found, and flush what an older module left in it.

    Out: after INCONSISTENT_CPUID_FIELD RCX leaf and subleaf, RDX/R8 mask; else 0.
    Statuses in order: SYS_BUSY, SYS_LP_INIT_NOT_PENDING, SYS_LP_INIT_DONE, INCOMPATIBLE_SEAM_CAPABILITIES, those of
    `platform.compare`, INVALID_PKG_ID.
    """
    regs, g, cpu = call.regs, call.g, call.cpu
    regs.rcx = regs.rdx = regs.r8 = 0
    lock_global(call, SHARED)
    if g.sys_state is not SysState.INIT_DONE:
        raise LeafError(Status.SYS_LP_INIT_NOT_PENDING)
    if call.lp_initialized:
        raise LeafError(Status.SYS_LP_INIT_DONE)
    cpu.invept(2, 0)
    if cpu.seamops_capabilities() != g.platform.seam_capabilities:
        raise LeafError(Status.INCOMPATIBLE_SEAM_CAPABILITIES)
    compare(cpu, g.platform, regs)
    if cpu.package >= MAX_PACKAGES:
        raise LeafError(Status.INVALID_PKG_ID, cpu.package)
    if g.platform.fatal_info_pa is not None:
        cpu.write(g.platform.fatal_info_pa, bytes(LINE))
    call.lp_initialized = True
    with g.mutex:
        g.lps_initialized += 1


@seamcall(SeamcallLeaf.SYS_KEY_CONFIG, before_ready=True)
def sys_key_config(call: Call) -> None:
    """TDH.SYS.KEY.CONFIG: program the global private key on this package; the last package makes the module ready.

    Statuses in order: SYS_BUSY, SYS_KEY_CONFIG_NOT_PENDING, KEY_CONFIGURED, OPERAND_BUSY (KET).
    """
    g, cpu = call.g, call.cpu
    lock_global(call, EXCLUSIVE)
    if g.sys_state is not SysState.CONFIG_DONE:
        raise LeafError(Status.SYS_KEY_CONFIG_NOT_PENDING)
    bit = 1 << cpu.package
    if g.packages_keyed & bit:
        raise LeafError(Status.KEY_CONFIGURED)
    if not cpu.pconfig(g.hkid):
        raise LeafError(Status.OPERAND_BUSY, Operand.KET)
    g.packages_keyed |= bit
    if g.packages_keyed.bit_count() == g.sysinfo.packages:
        call.module.enter_state(SysState.READY)


@seamcall(SeamcallLeaf.SYS_TDMR_INIT)
def sys_tdmr_init(call: Call) -> None:
    """TDH.SYS.TDMR.INIT: initialise the next 4 MiB worth of a TDMR's PAMT.

    In: RCX base of the TDMR. Out: RDX next address to initialise, rounded down to 1 GiB: a block is usable only when
    all of it is done.
    Statuses in order: OPERAND_INVALID (RCX), OPERAND_BUSY (RCX), TDMR_ALREADY_INITIALIZED.
    """
    regs, g = call.regs, call.g
    base = regs.rcx
    regs.rdx = 0
    tdmr = None
    if not base & (GIB - 1 | g.not_a_page):
        tdmr = next((t for t in g.tdmrs if t.base == base), None)
    if tdmr is None:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    call.lock(TDMR_LOCK - tdmr.index, EXCLUSIVE, Operand.RCX)
    if tdmr.initialized >= tdmr.end:
        raise LeafError(Status.TDMR_ALREADY_INITIALIZED)
    pages = SLICE_PAGES_DYNAMIC if g.dynamic_pamt else SLICE_PAGES
    _init_slice(call, tdmr, tdmr.initialized - tdmr.base, pages)
    tdmr.initialized += pages << 12
    done = tdmr.initialized & ~(GIB - 1)
    if done == tdmr.initialized:
        publish_block(g, tdmr, done - GIB)
    regs.rdx = done


def _init_slice(call: Call, tdmr: Tdmr, offset: int, pages: int) -> None:
    cpu, g = call.cpu, call.g
    key = g.global_key_bits
    first = offset >> 12
    reserved = [
        (max(start >> 12, first) - first, min(start + size >> 12, first + pages) - first)
        for start, size in tdmr.reserved
        if start >> 12 < first + pages and start + size >> 12 > first
    ]
    if g.dynamic_pamt:
        bitmap = 0
        for start, end in reserved:
            bitmap |= (1 << end) - (1 << start)
        cpu.write(tdmr.pamt_4k + first // 8 | key, bitmap.to_bytes(pages // 8, "little"))
    else:
        entries = bytearray(pages * ENTRY_SIZE)
        for start, end in reserved:
            entries[start * ENTRY_SIZE : end * ENTRY_SIZE] = RSVD_ENTRY * (end - start)
        cpu.write(tdmr.pamt_4k + first * ENTRY_SIZE | key, bytes(entries))
    _init_nodes(call, tdmr.pamt_2m | key, first // 512, (first + pages) // 512)
    _init_nodes(call, tdmr.pamt_1g | key, first >> 18, first + pages >> 18)


def _init_nodes(call: Call, table: int, start: int, end: int) -> None:
    """Free entries, from `start` up to `end`; whole pages of PAMT, since a line that has no MAC yet cannot be read."""
    for index in range(start, end):
        address = table + index * ENTRY_SIZE
        if address % PAGE:
            call.cpu.write(address, bytes(ENTRY_SIZE))
        else:
            call.cpu.zero_page(address)


@seamcall(SeamcallLeaf.SYS_LP_SHUTDOWN, before_ready=True)
def sys_lp_shutdown(call: Call) -> None:
    """TDH.SYS.LP.SHUTDOWN: kept for TDX 1.0 hosts; succeeds and does nothing."""
    del call


@seamcall(SeamcallLeaf.SYS_INFO, before_ready=True)
def sys_info(call: Call) -> None:
    """TDH.SYS.INFO: TDSYSINFO_STRUCT and CMR_INFO for the host.

    In: RCX buffer (1 KiB aligned), RDX its size, R8 CMR array (512 B aligned), R9 its entries. Out: RDX bytes, R9
    CMR entries written.
    Statuses in order: SYS_LP_INIT_NOT_DONE, OPERAND_INVALID (RCX, RDX, R8, R9). The buffer is zeroed before R8 is
    looked at.
    """
    regs, g, cpu = call.regs, call.g, call.cpu
    target, size, cmr_target, cmr_count = regs.rcx, regs.rdx, regs.r8, regs.r9
    regs.rdx = regs.r9 = 0
    if not call.lp_initialized:
        raise LeafError(Status.SYS_LP_INIT_NOT_DONE)
    check_shared(g, target, SYSINFO_SIZE, Operand.RCX)
    if size < SYSINFO_SIZE:
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)
    cpu.write(target, bytes(SYSINFO_SIZE))
    check_shared(g, cmr_target, CMR_INFO_SIZE, Operand.R8)
    if cmr_count < limits.MAX_CMRS:
        raise LeafError(Status.OPERAND_INVALID, Operand.R9)
    cpu.write(target, _sysinfo(call))
    cpu.write(cmr_target, b"".join(struct.pack("<QQ", *cmr) for cmr in g.sysinfo.cmrs))
    regs.rdx = SYSINFO_SIZE
    regs.r9 = limits.MAX_CMRS


def _sysinfo(call: Call) -> bytes:
    config = call.g.platform
    rows = abi_cpuid.configurable()
    head = struct.pack(
        "<IIIHHHB13xHHH10xHxxHB9xQQQQ32xI",
        0,
        limits.VENDOR_INTEL,
        limits.BUILD_DATE,
        limits.BUILD_NUM,
        limits.MINOR_VERSION,
        limits.MAJOR_VERSION,
        1,
        limits.MAX_TDMRS,
        limits.MAX_RESERVED_AREAS,
        ENTRY_SIZE,
        tdcs.PAGES_BASE * 4096,
        tdvps.PAGES_BASE * 4096,
        0,
        config.attributes_fixed0,
        config.attributes_fixed1,
        limits.XFAM_FIXED0 & (config.xcr0_supported | config.xss_supported),
        limits.XFAM_FIXED1,
        len(rows),
    )
    entries = b"".join(struct.pack("<Q4I", leaf_subleaf(row), *configurable_bits(call, row)) for row in rows)
    return (head + entries).ljust(SYSINFO_SIZE, b"\0")


def configurable_bits(call: Call, row: abi_cpuid.CpuidRow) -> tuple[int, ...]:
    """The bits of a CPUID leaf that a host may set to 1 on this machine."""
    native = call.g.platform.cpuid[row.index]
    return tuple(
        direct | allow & have for direct, allow, have in zip(row.config_direct, row.allow_direct, native, strict=True)
    )
