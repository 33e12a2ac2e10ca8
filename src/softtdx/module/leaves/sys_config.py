"""TDH.SYS.CONFIG: the host's choice of TDMRs and of the global private key ID, checked rule by rule."""

import struct
from dataclasses import dataclass
from typing import Final

from softtdx.abi import cpuid as abi_cpuid
from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.status import Operand, Status

from .. import limits
from ..context import Call
from ..errors import LeafError
from ..locks import EXCLUSIVE
from ..pamt import ENTRY_SIZE, PageSize
from ..platform import PlatformConfig
from ..registry import seamcall
from ..shared import check_shared
from ..state import GlobalState, HkidState, SysState, Tdmr
from .sys import lock_global

TDMR_INFO: Final = struct.Struct("<8Q32Q")
ARRAY_ALIGNMENT: Final = 512
GIB: Final = 1 << 30
U64_END: Final = 1 << 64
DYNAMIC_PAMT: Final = 1 << 16
MAX_DYNAMIC_PAMT_HKID_SHIFT: Final = 48
PAGE_BYTES: Final = {PageSize.SIZE_1G: GIB, PageSize.SIZE_2M: 1 << 21, PageSize.SIZE_4K: 1 << 12}

Range = tuple[int, int]
"""(base, size)."""


@dataclass
class TdmrInfo:
    """One TDMR_INFO as the host wrote it. `pamt` is keyed by page size."""

    base: int
    size: int
    pamt: dict[PageSize, Range]
    reserved: tuple[Range, ...]

    @classmethod
    def parse(cls, data: bytes) -> "TdmrInfo":
        """Take TDMR_INFO apart (TDX Module ABI, "TDMR_INFO")."""
        values = TDMR_INFO.unpack(data)
        pamt = {
            PageSize.SIZE_1G: (values[2], values[3]),
            PageSize.SIZE_2M: (values[4], values[5]),
            PageSize.SIZE_4K: (values[6], values[7]),
        }
        areas = values[8:]
        return cls(values[0], values[1], pamt, tuple(zip(areas[::2], areas[1::2], strict=True)))

    def valid_areas(self) -> list[Range]:
        """The reserved areas up to the first null entry."""
        areas = []
        for area in self.reserved:
            if not area[1]:
                break
            areas.append(area)
        return areas

    def available(self) -> list[Range]:
        """(start, end) of what is not reserved."""
        found, at = [], self.base
        for offset, size in self.valid_areas():
            if self.base + offset > at:
                found.append((at, self.base + offset))
            at = self.base + offset + size
        if at < self.base + self.size:
            found.append((at, self.base + self.size))
        return found


@seamcall(SeamcallLeaf.SYS_CONFIG, before_ready=True)
def sys_config(call: Call) -> None:
    """TDH.SYS.CONFIG: take over the TDMRs and the global private HKID.

    In: RCX array of TDMR_INFO addresses (512 B aligned), RDX their number, R8 HKID in 15:0, dynamic PAMT in bit 16.
    Statuses in order: SYS_BUSY, SYS_CONFIG_NOT_PENDING, OPERAND_INVALID (RCX, RDX, R8), then for each TDMR:
    OPERAND_INVALID (RCX: its address), NON_ORDERED_TDMR, INVALID_TDMR, the reserved areas (INVALID_ and
    NON_ORDERED_RESERVED_IN_TDMR), the PAMT areas (INVALID_PAMT, PAMT_OVERLAP, PAMT_OUTSIDE_CMRS), TDMR_OUTSIDE_CMRS.
    Bits 31:0 name the TDMR (7:0) and the PAMT size or area (15:8), and for an overlap the other TDMR (23:16).
    """
    regs, g, cpu = call.regs, call.g, call.cpu
    array, count, options = regs.rcx, regs.rdx, regs.r8
    lock_global(call, EXCLUSIVE)
    if g.sys_state is not SysState.INIT_DONE or g.lps_initialized < g.sysinfo.lps:
        raise LeafError(Status.SYS_CONFIG_NOT_PENDING)
    check_shared(g, array, ARRAY_ALIGNMENT, Operand.RCX)
    if not 1 <= count <= limits.MAX_TDMRS:
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)
    hkid = options & 0xFFFF
    if options & ~0x1_FFFF or not g.private_hkid_min <= hkid <= g.private_hkid_max:
        raise LeafError(Status.OPERAND_INVALID, Operand.R8)
    # A refused call leaves this reservation behind, as the real module does.
    g.kot[hkid] = (HkidState.RESERVED, 0)
    g.hkid = hkid
    g.global_key_bits = hkid << g.hkid_shift
    g.dynamic_pamt = bool(options & DYNAMIC_PAMT)
    if g.dynamic_pamt and g.hkid_shift > MAX_DYNAMIC_PAMT_HKID_SHIFT:
        raise LeafError(Status.OPERAND_INVALID, Operand.R8)
    infos: list[TdmrInfo] = []
    for index in range(count):
        address = cpu.rd64(array + 8 * index)
        check_shared(g, address, ARRAY_ALIGNMENT, Operand.RCX)
        infos.append(TdmrInfo.parse(cpu.read(address, TDMR_INFO.size)))
        _check(g, infos)
    g.tdmrs = [_tdmr(index, info) for index, info in enumerate(infos)]
    g.blocks = {}
    complete_cpuid(g.platform)
    g.packages_keyed = 0
    call.module.enter_state(SysState.CONFIG_DONE)


def _tdmr(index: int, info: TdmrInfo) -> Tdmr:
    return Tdmr(
        index,
        info.base,
        info.size,
        info.pamt[PageSize.SIZE_1G][0],
        info.pamt[PageSize.SIZE_2M][0],
        info.pamt[PageSize.SIZE_4K][0],
        tuple(info.valid_areas()),
        info.base,
    )


def complete_cpuid(config: PlatformConfig) -> None:
    """From now on the sampled CPUID values are what a TD gets where the host configures nothing."""
    for index, row in enumerate(abi_cpuid.rows()):
        eax, ebx, ecx, edx = (
            value & ~zero | one
            for value, zero, one in zip(config.cpuid[index], row.fixed0_or_dynamic, row.fixed1, strict=True)
        )
        config.cpuid[index] = (eax, ebx, ecx, edx)


def _stop(status: Status, index: int, second: int = 0, third: int = 0) -> LeafError:
    return LeafError(status, index & 0xFF | (second & 0xFF) << 8 | (third & 0xFF) << 16)


def _check(g: GlobalState, infos: list[TdmrInfo]) -> None:
    index = len(infos) - 1
    info = infos[index]
    if info.base + info.size >= U64_END and info.base > U64_END - 1 - info.size:
        raise _stop(Status.INVALID_TDMR, index)
    if index and info.base < infos[index - 1].base + infos[index - 1].size:
        raise _stop(Status.NON_ORDERED_TDMR, index)
    if (info.base | info.size) & (GIB - 1) or not info.size or not _addressable(g, info.base, info.size):
        raise _stop(Status.INVALID_TDMR, index)
    _check_reserved(info, index)
    _check_pamt(g, infos, index)
    for start, end in info.available():
        if not _in_cmr(g, start, end):
            raise _stop(Status.TDMR_OUTSIDE_CMRS, index)


def _addressable(g: GlobalState, base: int, size: int) -> bool:
    """Whether neither end has KeyID bits or bits above MAXPA. A size of 0 makes the end wrap around."""
    return not (base | (base + size - 1) % U64_END) & g.not_a_page


def _check_reserved(info: TdmrInfo, index: int) -> None:
    before: Range = (0, 0)
    for number, (offset, size) in enumerate(info.reserved):
        if not size:
            if number + 1 < len(info.reserved) and info.reserved[number + 1][1]:
                raise _stop(Status.NON_ORDERED_RESERVED_IN_TDMR, index, number)
            before = (offset, size)
            continue
        if offset > U64_END - 1 - size:
            raise _stop(Status.INVALID_RESERVED_IN_TDMR, index, number)
        if number and offset < before[0] + before[1]:
            raise _stop(Status.NON_ORDERED_RESERVED_IN_TDMR, index, number)
        if (offset | size) & 0xFFF or offset + size > info.size:
            raise _stop(Status.INVALID_RESERVED_IN_TDMR, index, number)
        before = (offset, size)


def _overlap(one: Range, other: Range) -> bool:
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


_SMALL_FIRST: Final = (PageSize.SIZE_4K, PageSize.SIZE_2M, PageSize.SIZE_1G)
_LARGE_FIRST: Final = (PageSize.SIZE_1G, PageSize.SIZE_2M, PageSize.SIZE_4K)


def _check_pamt(g: GlobalState, infos: list[TdmrInfo], index: int) -> None:
    info = infos[index]
    for size in _LARGE_FIRST:
        if not _valid_pamt(g, info, size):
            raise _stop(Status.INVALID_PAMT, index, size)
    for other in range(index):
        for size in _SMALL_FIRST:
            if any(_overlap(info.pamt[size], area) for area in infos[other].pamt.values()):
                raise _stop(Status.PAMT_OVERLAP, index, size, other)
    for number, size in enumerate(_SMALL_FIRST):
        for larger in _SMALL_FIRST[number + 1 :]:
            if _overlap(info.pamt[size], info.pamt[larger]):
                raise _stop(Status.PAMT_OVERLAP, index, size, index)
    for other in range(index + 1):
        for size in _SMALL_FIRST:
            if _in_available(info.pamt[size], infos[other]):
                raise _stop(Status.PAMT_OVERLAP, index, size, other)
        if other < index:
            for size in _SMALL_FIRST:
                if _in_available(infos[other].pamt[size], info):
                    raise _stop(Status.PAMT_OVERLAP, other, size, index)
    for size in _LARGE_FIRST:
        base, length = info.pamt[size]
        if not _in_cmr(g, base, base + length):
            raise _stop(Status.PAMT_OUTSIDE_CMRS, index, size)


def _valid_pamt(g: GlobalState, info: TdmrInfo, size: PageSize) -> bool:
    base, length = info.pamt[size]
    needed = info.size // PAGE_BYTES[size] * ENTRY_SIZE
    if g.dynamic_pamt and size == PageSize.SIZE_4K:
        needed = (info.size >> 12) // 8  # a bitmap of the pages that hold PAMT
    return (
        base <= U64_END - 1 - length
        and not (base | length) & 0xFFF
        and _addressable(g, base, length)
        and length >= needed
    )


def _in_available(pamt: Range, info: TdmrInfo) -> bool:
    return any(_overlap(pamt, (start, end - start)) for start, end in info.available())


def _in_cmr(g: GlobalState, start: int, end: int) -> bool:
    """Whether the area lies in one CMR, or in several that follow each other without a gap."""
    run_start, run_end = 0, 0
    for base, size in g.sysinfo.cmrs:
        if not size:
            continue
        if base != run_end:
            run_start = base
        run_end = base + size
        if run_start <= start and end <= run_end:
            return True
    return False
