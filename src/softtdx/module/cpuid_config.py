"""The virtual CPUID table of a TD: what the host configured, what XFAM and ATTRIBUTES imply, the rest native.

TDX Module ABI, "CPUID Virtualization"; the table lies in TDCS.CPUID_VALUES, a row for each of `abi.cpuid.rows()`.
"""

from collections.abc import Callable
from typing import Final

from softtdx.abi import cpuid as abi_cpuid
from softtdx.abi.cpuid import CpuidRegs, CpuidRow
from softtdx.abi.status import Operand, Status
from softtdx.hw.isa import SeamCpu

from . import limits, tdcs
from .context import Call
from .errors import LeafError
from .features import CpuidFlag
from .platform import (
    ARCH_CAP_TSX_CTRL,
    IA32_ARCH_CAPABILITIES,
    LEVEL_CORE,
    LEVEL_MAX,
    LEVEL_SMT,
    PlatformConfig,
    leaf_subleaf,
)
from .td import Td

__all__ = ["ALLOWED_FMS", "CPUID_FIXED0_BITMAP", "configure", "fms_allowed", "xsave_area_size"]

EAX, EBX, ECX, EDX = range(4)
CONFIG_AT: Final = 256  # of CPUID_CONFIG in TD_PARAMS
CPUID_FIXED0_BITMAP: Final = 0x0380_0005_08CF_D308  # leaves that read 0 where the table has no row
XCR0_USER_BITS: Final = 0x0006_02FF
GPAW_BITS: Final = (48, 52)

STEPPING: Final = 0xF
ALLOWED_FMS: Final = (0xD06D1, 0xA06E1, 0xA06D1, 0xA06F3, 0xC06F2, 0x806F8)
"""CPUID(1).EAX that a migratable TD may be given, newest first: CWF, GNR-D, GNR-SP, SRF, EMR, SPR."""

Values = list[int]


def allowed_fms(platform_fms: int) -> tuple[int, ...]:
    """The families and models a TD on this machine may show: this one and older ones. Empty for an unknown machine."""
    for index, fms in enumerate(ALLOWED_FMS):
        if (fms ^ platform_fms) & ~STEPPING == 0:
            return ALLOWED_FMS[index:]
    return ()


def fms_allowed(platform_fms: int, wanted: int) -> bool:
    """Whether a migratable TD may be given this CPUID(1).EAX."""
    if (platform_fms ^ wanted) & ~STEPPING == 0 and wanted & STEPPING > platform_fms & STEPPING:
        return False
    matches = [fms for fms in allowed_fms(platform_fms) if (fms ^ wanted) & ~STEPPING == 0]
    return bool(matches) and all(wanted & STEPPING <= fms & STEPPING for fms in matches)


def xsave_area_size(cpu: SeamCpu, xfam: int) -> int:
    """Size of an XSAVE area with all user features of `xfam` enabled, as CPUID(0xD, 0).EBX gives it under that XCR0."""
    before = cpu.core.xcr0
    cpu.core.xcr0 = xfam & XCR0_USER_BITS
    size = cpu.cpuid(0xD, 0)[EBX]
    cpu.core.xcr0 = before
    return size


def configure(call: Call, td: Td, params: bytes) -> None:
    """Compute the whole table. LeafError as TDH.MNG.INIT documents; RCX names the refused leaf."""
    td.wr64(tdcs.CPUID_FIXED0_BITMAP, CPUID_FIXED0_BITMAP)
    _Configurator(call, td, params).run()
    _topology(call.g.platform, td)
    td.wr8(tdcs.TOPOLOGY_ENUM_CONFIGURED, 1)
    td.wr8(tdcs.VE_REDUCTION_VALID, 1)


class _Configurator:
    def __init__(self, call: Call, td: Td, params: bytes) -> None:
        self.call = call
        self.config: PlatformConfig = call.g.platform
        self.td = td
        self.params = params
        self.attributes = td.rd64(tdcs.ATTRIBUTES)
        self.xfam = td.rd64(tdcs.XFAM)
        self.flags: dict[CpuidFlag, bool] = {}
        self.perfmon_subleaves = 0

    def run(self) -> None:
        """Row by row in table order: later rows depend on flags of earlier ones."""
        td = self.td
        for row in abi_cpuid.rows():
            values: Values = list(self.config.cpuid[row.index])
            if row.config_index is not None:
                values = self._configured(row, values)
            special = self._SPECIAL.get(row.leaf)
            if special:
                special(self, row, values)
            td.write(tdcs.CPUID_VALUES + 16 * row.index, b"".join(v.to_bytes(4, "little") for v in values))
            td.wr8(tdcs.CPUID_VALID + row.index, 1)
        for flag, value in self.flags.items():
            td.wr8(tdcs.CPUID_FLAGS + flag, value)

    def _refuse(self, row: CpuidRow) -> LeafError:
        self.call.regs.rcx = leaf_subleaf(row)
        return LeafError(Status.OPERAND_INVALID, Operand.CPUID_CONFIG)

    def _configured(self, row: CpuidRow, values: Values) -> Values:
        at = CONFIG_AT + 16 * (row.config_index or 0)
        result = []
        for index, native in enumerate(values):
            wanted = int.from_bytes(self.params[at + 4 * index : at + 4 * index + 4], "little")
            direct, allow = row.config_direct[index], row.allow_direct[index]
            if wanted & ~(direct | allow):
                raise self._refuse(row)
            value = native & ~row.fixed0_or_dynamic[index] | row.fixed1[index]
            value = value & ~direct | wanted & direct
            result.append(value & (wanted | ~allow) & 0xFFFF_FFFF)
        return result

    def _xfam_masks(self, row: CpuidRow, values: Values) -> None:
        for bit, masks in abi_cpuid.xfam_masks()[row.leaf, row.subleaf].items():
            if not self.xfam >> bit & 1:
                for index, mask in enumerate(masks):
                    values[index] &= ~mask

    # --- leaves with rules of their own
    def _version(self, row: CpuidRow, values: Values) -> None:
        native = self.config.cpuid_fms
        if values[EAX] == 0:
            values[EAX] = native
        elif self.attributes & limits.ATTR_MIGRATABLE:
            if not fms_allowed(native, values[EAX]):
                raise self._refuse(row)
        elif values[EAX] != native:
            raise self._refuse(row)
        self._xfam_masks(row, values)
        ecx, flags = values[ECX], self.flags
        flags[CpuidFlag.MONITOR_MWAIT] = bool(ecx >> 3 & 1)
        flags[CpuidFlag.DCA] = bool(ecx >> 18 & 1)
        flags[CpuidFlag.TSC_DEADLINE] = bool(ecx >> 24 & 1)
        flags[CpuidFlag.EST] = bool(ecx >> 7 & 1)
        flags[CpuidFlag.TM2] = bool(ecx >> 8 & 1)
        flags[CpuidFlag.XTPR_UPDATE] = bool(ecx >> 14 & 1)
        # Without #VE reduction the TD has these whatever its CPUID says.
        flags[CpuidFlag.NOT_MCE] = flags[CpuidFlag.NOT_MCA] = flags[CpuidFlag.NOT_MTRR] = False
        flags[CpuidFlag.ACPI] = bool(values[EDX] >> 22 & 1)

    def _cache(self, row: CpuidRow, values: Values) -> None:
        del values
        if row.subleaf is not None and row.subleaf < 4:
            native = b"".join(v.to_bytes(4, "little") for v in self.config.cpuid[row.index])
            self.td.write(tdcs.CPUID4_NATIVE_VALUES + 16 * row.subleaf, native)

    def _monitor(self, row: CpuidRow, values: Values) -> None:
        del row
        if not self.flags[CpuidFlag.MONITOR_MWAIT]:
            values[:] = [0, 0, 0, 0]

    def _features(self, row: CpuidRow, values: Values) -> None:
        flags, config = self.flags, self.config
        if row.subleaf == 0:
            self._xfam_masks(row, values)
            hle, rtm = values[EBX] >> 4 & 1, values[EBX] >> 11 & 1
            if hle != rtm:
                raise self._refuse(row)
            if hle and not config.msrs[IA32_ARCH_CAPABILITIES] & ARCH_CAP_TSX_CTRL:
                raise LeafError(Status.INCORRECT_MSR_VALUE, IA32_ARCH_CAPABILITIES)
            flags[CpuidFlag.TSX] = bool(hle)
            flags[CpuidFlag.RDT_A] = bool(values[EBX] >> 15 & 1)
            flags[CpuidFlag.RDT_M] = bool(values[EBX] >> 12 & 1)
            pks = 1 << 31 if self.attributes & limits.ATTR_PKS else 0
            values[ECX] = values[ECX] & ~(1 << 31 | 1 << 23) | pks  # key locker does not exist in a TD
            flags[CpuidFlag.WAITPKG] = bool(values[ECX] >> 5 & 1)
            flags[CpuidFlag.TME] = bool(values[ECX] >> 13 & 1)
            flags[CpuidFlag.LA57] = bool(values[ECX] >> 16 & 1)
            flags[CpuidFlag.PCONFIG] = bool(values[EDX] >> 18 & 1)
            flags[CpuidFlag.NOT_CORE_CAPABILITIES] = False
        elif row.subleaf == 1:
            self._xfam_masks(row, values)
            flags[CpuidFlag.PERFMON_EXT_LEAF] = bool(values[EAX] >> 8 & 1)
            lass = 1 << 6 if self.attributes & limits.ATTR_LASS else 0
            values[EAX] = values[EAX] & ~(1 << 6) | lass
        else:
            flags[CpuidFlag.DDPD] = bool(values[EDX] >> 3 & 1)

    def _perfmon(self, row: CpuidRow, values: Values) -> None:
        del row
        if not self.attributes & limits.ATTR_PERFMON:
            values[:] = [0, 0, 0, 0]

    def _xsave(self, row: CpuidRow, values: Values) -> None:
        if row.subleaf == 0:
            self._xfam_masks(row, values)
            values[ECX] = xsave_area_size(self.call.cpu, self.xfam)
        elif row.subleaf == 1:
            self._xfam_masks(row, values)
            if not self.config.xfd_faulting & self.xfam:
                values[EAX] &= ~(1 << 4)
            self.flags[CpuidFlag.XFD] = bool(values[EAX] >> 4 & 1)
        elif not self.xfam >> (row.subleaf or 0) & 1:
            values[:] = [0, 0, 0, 0]

    def _only_with_xfam(self, needed: int) -> Callable[[CpuidRow, Values], None]:
        def rule(row: CpuidRow, values: Values) -> None:
            del row
            if self.xfam & needed != needed:
                values[:] = [0, 0, 0, 0]

        return rule

    def _trace(self, row: CpuidRow, values: Values) -> None:
        self._only_with_xfam(1 << 8)(row, values)

    def _lbr(self, row: CpuidRow, values: Values) -> None:
        self._only_with_xfam(1 << 15)(row, values)

    def _amx(self, row: CpuidRow, values: Values) -> None:
        self._only_with_xfam(3 << 17)(row, values)

    def _tsc(self, row: CpuidRow, values: Values) -> None:
        """EAX 1 and ECX 25 MHz are fixed, so EBX is the configured frequency in that unit."""
        del row
        values[EBX] = self.td.rd16(tdcs.TSC_FREQUENCY)

    def _zero(self, row: CpuidRow, values: Values) -> None:
        del row
        values[:] = [0, 0, 0, 0]

    def _model(self, row: CpuidRow, values: Values) -> None:
        del row
        if self.attributes & limits.ATTR_MIGRATABLE:
            values[:] = [0, 0, 0, 0]

    def _perfmon_ext(self, row: CpuidRow, values: Values) -> None:
        if not self.attributes & limits.ATTR_PERFMON or not self.flags[CpuidFlag.PERFMON_EXT_LEAF]:
            values[:] = [0, 0, 0, 0]
        elif row.subleaf == 0:
            self.perfmon_subleaves = values[EAX]
            self.td.wr32(tdcs.PERFMON_EXT_SUBLEAVES, values[EAX])
        elif not self.perfmon_subleaves >> (row.subleaf or 0) & 1:
            values[:] = [0, 0, 0, 0]

    def _address_widths(self, row: CpuidRow, values: Values) -> None:
        """Leaf 0x80000008: EAX physical bits 7:0, linear 15:8, guest-physical 23:16."""
        del row
        native, flags = self.config.max_pa, self.td.rd64(tdcs.CONFIG_FLAGS)
        width = GPAW_BITS[flags & limits.CONFIG_GPAW]
        physical, guest = values[EAX] & 0xFF, 0
        if flags & limits.CONFIG_MAXGPA_VIRT:
            physical, guest = native, min(native, width)
        elif not flags & limits.CONFIG_MAXPA_VIRT:
            physical = native
        elif physical == 0:
            physical = min(native, width)
        elif not limits.MIN_VIRT_MAXPA <= physical <= min(native, width):
            raise LeafError(Status.OPERAND_INVALID, Operand.CPUID_CONFIG)
        self.td.wr8(tdcs.VIRT_MAXPA, guest or physical)
        linear = 57 if self.flags[CpuidFlag.LA57] else 48
        values[EAX] = values[EAX] & 0xFF00_0000 | guest << 16 | linear << 8 | physical

    _SPECIAL: Final = {
        0x1: _version,
        0x4: _cache,
        0x5: _monitor,
        0x7: _features,
        0xA: _perfmon,
        0xD: _xsave,
        0x14: _trace,
        0x15: _tsc,
        0x19: _zero,
        0x1A: _model,
        0x1C: _lbr,
        0x1D: _amx,
        0x23: _perfmon_ext,
        0x8000_0008: _address_widths,
    }


def _topology(config: PlatformConfig, td: Td) -> None:
    """Check the virtual leaf 0x1F (all zero: the hardware's) and derive leaf 0xB from it."""
    refused = LeafError(Status.CPUID_LEAF_1F_FORMAT_UNRECOGNIZED)
    level, core_seen, native = 0, False, False
    last: CpuidRegs = CpuidRegs()
    next_0b = 0
    for subleaf in range(LEVEL_MAX):
        row = abi_cpuid.find(0x1F, subleaf)
        assert row is not None
        values = _read(td, row)
        if subleaf == 0:
            native = not any(values)
        elif native and any(values):
            raise refused
        if native:
            values = CpuidRegs(*config.cpuid[row.index])
            _write(td, row, values)
        before, level = level, values.ecx >> 8 & 0xFF
        if level:
            if level <= before or level >= LEVEL_MAX or values.ecx & 0xFF != subleaf:
                raise refused
            if level == LEVEL_SMT:
                if subleaf:
                    raise refused
                _write(td, _row_0b(0), values)
                next_0b = 1
            elif level == LEVEL_CORE:
                core_seen = True
            last = values
        elif subleaf == 0 or not core_seen:
            raise refused
    _write(td, _row_0b(next_0b), last._replace(ecx=next_0b | LEVEL_CORE << 8))
    for subleaf in range(next_0b + 1, 3):
        _write(td, _row_0b(subleaf), CpuidRegs(0, 0, subleaf, last.edx))


def _row_0b(subleaf: int) -> CpuidRow:
    row = abi_cpuid.find(0xB, subleaf)
    assert row is not None
    return row


def _read(td: Td, row: CpuidRow) -> CpuidRegs:
    data = td.read(tdcs.CPUID_VALUES + 16 * row.index, 16)
    return CpuidRegs(*(int.from_bytes(data[at : at + 4], "little") for at in (0, 4, 8, 12)))


def _write(td: Td, row: CpuidRow, values: CpuidRegs) -> None:
    td.write(tdcs.CPUID_VALUES + 16 * row.index, b"".join(v.to_bytes(4, "little") for v in values))
