"""CPUID: answered from the TD's virtual CPUID table, or given to its #VE handler (TDX Module ABI, "CPUID
Virtualization").
"""

import struct
from collections.abc import Callable
from functools import partial
from typing import Final

from softtdx.abi import cpuid as table
from softtdx.abi.exits import ExitReason, VeCategory
from softtdx.abi.msrs import Msr

from .. import tdcs, tdvps, vmcs
from ..features import CTL_ENUM_TOPOLOGY, CTL_REDUCE_VE, CTL_VIRT_CPUID2, CpuidFlag
from ..transitions.guest import Guest

__all__ = ["cpuid"]

RAX, RCX, RDX, RBX = range(4)
U32: Final = 0xFFFF_FFFF
LAST_BASE_LEAF: Final = 0x23
FIRST_EXTENDED_LEAF: Final = 0x8000_0000
LAST_EXTENDED_LEAF: Final = 0x8000_0008
HYPERVISOR_LEAVES: Final = range(0x4000_0000, 0x5000_0000)
FIXED0_EXTENDED_SHIFT: Final = 52  # CPUID_FIXED0_BITMAP: base leaves 51:0, extended leaves 59:52
FIXED0_EXTENDED_LEAVES: Final = 8
NATIVE_CACHE_LEAVES: Final = 4
CACHE_CONFIGURABLE: Final = 0xFFFF_C000  # CPUID(4).EAX 31:14: the host says who shares the caches
X2APIC_IDS_COUNT: Final = tdcs.MAX_VCPUS_PER_TD

CR4_OSXSAVE: Final = 1 << 18
CR4_PKE: Final = 1 << 22
TSX_CPUID_CLEAR: Final = 1 << 1
HLE_RTM: Final = 1 << 4 | 1 << 11

_VALUES: Final = struct.Struct("<4I")
_INDEX: Final = {(row.leaf, row.subleaf): row.index for row in table.rows()}

# Leaves that a TD sees as zero, or fixed, only with REDUCE_VE; some not even then while it keeps the feature.
_REDUCED: Final[dict[int, CpuidFlag | None]] = {
    0x6: None,
    0xC: None,
    0x16: None,
    0x17: None,
    0x8000_0002: None,
    0x8000_0003: None,
    0x8000_0004: None,
    0x8000_0005: None,
    0x9: CpuidFlag.DCA,
    0xF: CpuidFlag.RDT_M,
    0x10: CpuidFlag.RDT_A,
    0x1B: CpuidFlag.PCONFIG,
}

# (bit, flag, sense): bits of a leaf that follow CPUID_FLAGS, and so REDUCE_VE.
_LEAF1_ECX: Final = ((18, CpuidFlag.DCA), (24, CpuidFlag.TSC_DEADLINE), (7, CpuidFlag.EST), (8, CpuidFlag.TM2))
_LEAF1_EDX: Final = ((7, CpuidFlag.NOT_MCE), (14, CpuidFlag.NOT_MCA), (12, CpuidFlag.NOT_MTRR), (22, CpuidFlag.ACPI))
_LEAF7_EBX: Final = ((15, CpuidFlag.RDT_A), (12, CpuidFlag.RDT_M))
_LEAF7_ECX: Final = ((13, CpuidFlag.TME),)
_LEAF7_EDX: Final = ((18, CpuidFlag.PCONFIG), (30, CpuidFlag.NOT_CORE_CAPABILITIES))
_NEGATIVE: Final = frozenset(
    {CpuidFlag.NOT_MCE, CpuidFlag.NOT_MCA, CpuidFlag.NOT_MTRR, CpuidFlag.NOT_CORE_CAPABILITIES}
)


def cpuid(guest: Guest) -> None:
    """CPUID of the leaf in EAX and the subleaf in ECX."""
    cpu = guest.cpu
    leaf, subleaf = cpu.gpr(RAX) & U32, cpu.gpr(RCX) & U32
    category = VeCategory.CONFIGURABLE_PARAVIRT
    if leaf in HYPERVISOR_LEAVES:
        category = VeCategory.PARAVIRT
        values = None
    elif cpu.rd8(guest.vp + (tdvps.CPUID_USER_VE if guest.cpl() else tdvps.CPUID_SUPERVISOR_VE)):
        values = None
    else:
        values = _virtual(guest, leaf, subleaf)
    if values is None:
        guest.inject_ve(ExitReason.CPUID, 0, category)
        return
    set_gpr = cpu.set_gpr
    set_gpr(RAX, values[0])
    set_gpr(RBX, values[1])
    set_gpr(RCX, values[2])
    set_gpr(RDX, values[3])


def _virtual(guest: Guest, leaf: int, subleaf: int) -> tuple[int, int, int, int] | None:
    """The virtual values; None for a #VE."""
    cpu = guest.cpu
    base = guest.tdc
    controls = guest.controls()
    last_base = cpu.rd32(base + tdcs.CPUID_LAST_BASE_LEAF) or LAST_BASE_LEAF
    last_extended = cpu.rd32(base + tdcs.CPUID_LAST_EXT_LEAF) or LAST_EXTENDED_LEAF
    if leaf > last_extended or last_base < leaf < FIRST_EXTENDED_LEAF:
        leaf = last_base
    index = _INDEX.get((leaf, None))
    if index is None:
        index = _INDEX.get((leaf, subleaf))
    if index is None:
        if not _fixed_zero(guest, leaf):
            return _not_in_table(guest, leaf, subleaf) if controls & CTL_REDUCE_VE else None
        values = (0, 0, 0, 0)
    else:
        if not controls & CTL_REDUCE_VE and not cpu.rd8(base + tdcs.CPUID_VALID + index):
            return None
        if cpu.rd8(guest.vp + tdvps.CPUID_CONTROL + index) & (2 if guest.cpl() else 1):
            return None
        values = _VALUES.unpack(cpu.read(base + tdcs.CPUID_VALUES + 16 * index, 16))
    special = _SPECIAL.get(leaf)
    return special(guest, subleaf, controls, values) if special else values


def _fixed_zero(guest: Guest, leaf: int) -> bool:
    bitmap = guest.td.rd64(tdcs.CPUID_FIXED0_BITMAP)
    if leaf <= LAST_BASE_LEAF:
        return bool(bitmap >> leaf & 1)
    extended = leaf - FIRST_EXTENDED_LEAF
    return 0 <= extended < FIXED0_EXTENDED_LEAVES and bool(bitmap >> (FIXED0_EXTENDED_SHIFT + extended) & 1)


def _not_in_table(guest: Guest, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """A leaf or subleaf that the table does not hold is zero; topology leaves name their level and the x2APIC ID."""
    if leaf in (0xB, 0x1F):
        return 0, 0, subleaf & 0xFF, x2apic_id(guest)
    return 0, 0, 0, 0


def x2apic_id(guest: Guest) -> int:
    """The virtual x2APIC ID that VP.INIT was given."""
    index = guest.vcpu.rd32(tdvps.VCPU_INDEX)
    return guest.td.rd32(tdcs.X2APIC_IDS + 4 * index) if index < X2APIC_IDS_COUNT else 0


_Values = tuple[int, int, int, int]


def _follow(guest: Guest, value: int, rows: tuple[tuple[int, CpuidFlag], ...]) -> int:
    for bit, flag in rows:
        present = bool(guest.flag(flag)) != (flag in _NEGATIVE)
        value = value & ~(1 << bit) | present << bit
    return value


def _leaf_1(guest: Guest, subleaf: int, controls: int, values: _Values) -> _Values | None:
    del subleaf
    eax, ebx, ecx, edx = values
    apic_id = x2apic_id(guest) if controls & CTL_ENUM_TOPOLOGY else guest.vcpu.rd32(tdvps.VCPU_INDEX)
    ebx = ebx & 0x00FF_FFFF | (apic_id & 0xFF) << 24
    ecx = _follow(guest, ecx, _LEAF1_ECX)
    osxsave = bool(guest.cpu.vmread(vmcs.CR4) & CR4_OSXSAVE)
    return eax, ebx, ecx & ~(1 << 27) | osxsave << 27, _follow(guest, edx, _LEAF1_EDX)


def _leaf_2(guest: Guest, subleaf: int, controls: int, values: _Values) -> _Values | None:
    del guest, subleaf
    return values if controls & CTL_VIRT_CPUID2 else None


def _leaf_4(guest: Guest, subleaf: int, controls: int, values: _Values) -> _Values | None:
    if not controls & CTL_REDUCE_VE or subleaf >= NATIVE_CACHE_LEAVES:
        return values
    native = _VALUES.unpack(guest.td.read(tdcs.CPUID4_NATIVE_VALUES + 16 * subleaf, 16))
    return (native[0] & ~CACHE_CONFIGURABLE | values[0] & CACHE_CONFIGURABLE, *native[1:])


def _leaf_7(guest: Guest, subleaf: int, controls: int, values: _Values) -> _Values | None:
    del controls
    if subleaf:
        return values
    eax, ebx, ecx, edx = values
    cpu = guest.cpu
    ebx = _follow(guest, ebx, _LEAF7_EBX)
    if guest.flag(CpuidFlag.TSX) and cpu.rdmsr(Msr.TSX_CTRL) & TSX_CPUID_CLEAR:
        ebx &= ~HLE_RTM
    ospke = bool(cpu.vmread(vmcs.CR4) & CR4_PKE)
    ecx = _follow(guest, ecx, _LEAF7_ECX) & ~(1 << 4) | ospke << 4
    return eax, ebx, ecx, _follow(guest, edx, _LEAF7_EDX)


def _leaf_d(guest: Guest, subleaf: int, controls: int, values: _Values) -> _Values | None:
    """EBX is the size of the XSAVE area for what XCR0 (and IA32_XSS) enable now: the processor knows."""
    del controls
    if subleaf > 1:
        return values
    return values[0], guest.cpu.cpuid(0xD, subleaf)[1], values[2], values[3]


def _topology(guest: Guest, subleaf: int, controls: int, values: _Values) -> _Values | None:
    del subleaf
    return (*values[:3], x2apic_id(guest)) if controls & CTL_ENUM_TOPOLOGY else None


def _leaf_80000001(guest: Guest, subleaf: int, controls: int, values: _Values) -> _Values | None:
    """SYSCALL exists in 64-bit mode only."""
    del subleaf, controls
    return (*values[:3], values[3] & ~(1 << 11) | guest.in_64bit_mode() << 11)


def _reduced(keeps: CpuidFlag | None, guest: Guest, subleaf: int, controls: int, values: _Values) -> _Values | None:
    del subleaf
    if not controls & CTL_REDUCE_VE or (keeps is not None and guest.flag(keeps)):
        return None
    return values


_Special = Callable[[Guest, int, int, _Values], _Values | None]
_SPECIAL: Final[dict[int, _Special]] = {
    0x1: _leaf_1,
    0x2: _leaf_2,
    0x4: _leaf_4,
    0x7: _leaf_7,
    0xB: _topology,
    0xD: _leaf_d,
    0x1F: _topology,
    0x8000_0001: _leaf_80000001,
    **{leaf: partial(_reduced, flag) for leaf, flag in _REDUCED.items()},
}
