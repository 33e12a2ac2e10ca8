"""What TDH.SYS.INIT finds out about the machine, and refuses; TDH.SYS.LP.INIT compares each processor with it.

The order of the checks is that of the module interface: capability MSRs, CPUID, VMX capability MSRs, memory
encryption, CMRs, SMRRs (TDX Module Base Spec, "Platform Configuration Checks").
"""

from dataclasses import dataclass, field
from typing import Final

from softtdx.abi import cpuid as abi_cpuid
from softtdx.abi.cpuid import CpuidRow
from softtdx.abi.status import Operand, Status
from softtdx.hw.isa import SeamCpu
from softtdx.hw.registers import Registers

from . import vmx_controls
from .errors import LeafError
from .state import MAX_HKIDS, GlobalState, SysInfo

__all__ = ["PlatformConfig", "compare", "sample"]

U32: Final = 0xFFFF_FFFF

CpuidValues = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""

# --- MSRs
IA32_TSC_ADJUST: Final = 0x3B
MKTME_KEYID_PARTITIONING: Final = 0x87
IA32_WBINVDP: Final = 0x98
IA32_WBNOINVDP: Final = 0x99
IA32_MISC_PACKAGE_CTLS: Final = 0xBC
IA32_XAPIC_DISABLE_STATUS: Final = 0xBD
IA32_CORE_CAPABILITIES: Final = 0xCF
IA32_MTRRCAP: Final = 0xFE
IA32_ARCH_CAPABILITIES: Final = 0x10A
IA32_TSX_CTRL: Final = 0x122
IA32_MISC_ENABLE: Final = 0x1A0
SMRR: Final = ((0x1F2, 0x1F3), (0x1F6, 0x1F7))  # (base, mask)
IA32_PERF_CAPABILITIES: Final = 0x345
IA32_VMX_BASIC: Final = 0x480
IA32_VMX_MISC: Final = 0x485
IA32_VMX_CR0_FIXED0: Final = 0x486
IA32_VMX_CR0_FIXED1: Final = 0x487
IA32_VMX_CR4_FIXED0: Final = 0x488
IA32_VMX_CR4_FIXED1: Final = 0x489
IA32_VMX_PROCBASED_CTLS2: Final = 0x48B
IA32_VMX_EPT_VPID_CAP: Final = 0x48C
IA32_VMX_TRUE_PINBASED_CTLS: Final = 0x48D
IA32_VMX_TRUE_PROCBASED_CTLS: Final = 0x48E
IA32_VMX_TRUE_EXIT_CTLS: Final = 0x48F
IA32_VMX_TRUE_ENTRY_CTLS: Final = 0x490
IA32_VMX_PROCBASED_CTLS3: Final = 0x492
IA32_TME_CAPABILITY: Final = 0x981
IA32_TME_ACTIVATE: Final = 0x982
IA32_SEAMRR_BASE: Final = 0x1400
IA32_SEAMRR_MASK: Final = 0x1401

ARCH_CAP_TSX_CTRL: Final = 1 << 7
ARCH_CAP_MUST_BE_1: Final = 0x20_FD6B  # RDCL_NO, IBRS_ALL, SKIP_L1DFL, MDS_NO .. XAPIC_DISABLE_STATUS
ARCH_CAP_MUST_BE_0: Final = 1 << 2 | 1 << 18  # RSBA, FB_CLEAR_CTRL
MISC_ENABLE_PERFMON: Final = 1 << 7
MISC_ENABLE_BTS_UNAVAILABLE: Final = 1 << 11
MISC_ENABLE_LIMIT_CPUID: Final = 1 << 22
PERF_CAPABILITIES_MUST_BE_1: Final = 3 << 12  # FREEZE_WHILE_SMM, FW_WRITE
TSX_CPUID_CLEAR: Final = 1 << 1
VMX_MISC_MUST_BE_1: Final = 1 << 5 | 1 << 6 | 1 << 7 | 1 << 14 | 1 << 29
EPT_VPID_CAP_MUST_BE_1: Final = 0x101_0633_4041
SEAMRR_MASK_BITS: Final = ((1 << 52) - 1) & ~((1 << 25) - 1)
SMRR_MASK_BITS: Final = 0xFFFF_F000
SMRR_LOCK: Final = 1 << 10
SMRR_VALID: Final = 1 << 11
MTRRCAP_SMRR: Final = 1 << 11
MTRRCAP_SMRR2: Final = 1 << 13
MTRRCAP_SMRR_LOCK: Final = 1 << 14

# What TDH.SYS.LP.INIT compares, in its order. WBINVDP stands for the number of cache sub-blocks.
CAPABILITY_MSRS: Final = (
    IA32_CORE_CAPABILITIES,
    IA32_ARCH_CAPABILITIES,
    IA32_MISC_PACKAGE_CTLS,
    IA32_XAPIC_DISABLE_STATUS,
)
VMX_MSRS: Final = (
    IA32_VMX_BASIC,
    IA32_VMX_TRUE_PINBASED_CTLS,
    IA32_VMX_TRUE_PROCBASED_CTLS,
    IA32_VMX_PROCBASED_CTLS2,
    IA32_VMX_PROCBASED_CTLS3,
    IA32_VMX_TRUE_EXIT_CTLS,
    IA32_VMX_TRUE_ENTRY_CTLS,
    IA32_VMX_MISC,
    IA32_VMX_EPT_VPID_CAP,
    IA32_VMX_CR0_FIXED0,
    IA32_VMX_CR0_FIXED1,
    IA32_VMX_CR4_FIXED0,
    IA32_VMX_CR4_FIXED1,
)
KEY_MSRS: Final = (
    IA32_TME_CAPABILITY,
    IA32_TME_ACTIVATE,
    MKTME_KEYID_PARTITIONING,
    IA32_WBINVDP,
    IA32_WBNOINVDP,
)

# --- CPUID
MIN_LAST_CPU_BASE_LEAF: Final = 0x1F
LAST_BASE_LEAF: Final = 0x23
FIRST_EXTENDED_LEAF: Final = 0x8000_0000
LAST_EXTENDED_LEAF: Final = 0x8000_0008
XCR0_USER_BITS: Final = 0x0006_02FF
XCR0_SUPERVISOR_BITS: Final = 0x0001_FD00
MAX_FIXED_COUNTERS: Final = 7
MIN_TSC_HZ: Final = 0x2540C
LEVEL_INVALID, LEVEL_SMT, LEVEL_CORE, LEVEL_MAX = 0, 1, 2, 6
CMR_COUNT: Final = 32


@dataclass
class PlatformConfig:
    """The machine as SYS.INIT sampled it. `cpuid` is indexed as the rows of `abi.cpuid.rows()`."""

    msrs: dict[int, int] = field(default_factory=dict)
    cpuid: list[CpuidValues] = field(default_factory=list)
    cpuid_fms: int = 0  # CPUID(1).EAX with the lowest stepping of all packages
    max_pa: int = 52
    last_base_leaf: int = LAST_BASE_LEAF
    last_extended_leaf: int = LAST_EXTENDED_LEAF
    xcr0_supported: int = 0
    xss_supported: int = 0
    xfd_supported: bool = False
    xfd_faulting: int = 0
    xsave_components: dict[int, tuple[int, bool]] = field(default_factory=dict)  # bit -> (size, 64-byte aligned)
    hle: bool = False
    rtm: bool = False
    waitpkg: bool = False
    la57: bool = False
    lam: bool = False
    lass: bool = False
    ddpd: bool = False
    perfmon_ext_leaf: bool = False
    fixed_counters: int = 0
    fixed_counter_bitmap: int = 0
    crystal_hz: int = 0
    tsc_hz: int = 0
    native_model_info: int = 0
    max_lbr_depth: int = 0
    smt_shift: int = 0
    package_shift: int = 0
    smrr_count: int = 1
    controls: "vmx_controls.Controls" = field(default_factory=lambda: vmx_controls.Controls(0, 0, 0, 0, 0, 0))
    l2_controls: "vmx_controls.Controls" = field(default_factory=lambda: vmx_controls.Controls(0, 0, 0, 0, 0, 0))
    seam_capabilities: int = 0
    attributes_fixed0: int = 0
    attributes_fixed1: int = 0
    fatal_info_pa: int | None = None


def incorrect_msr(msr: int) -> LeafError:
    """INCORRECT_MSR_VALUE: the machine is set up in a way that TDX does not admit."""
    return LeafError(Status.INCORRECT_MSR_VALUE, msr)


def sample(cpu: SeamCpu, g: GlobalState, regs: Registers) -> PlatformConfig:
    """TDH.SYS.INIT's checks. LeafError names the MSR; a CPUID mismatch is in RCX, RDX, R8..R10 of `regs`."""
    config = PlatformConfig()
    tsx_ctrl = _capability_msrs(cpu, config)
    try:
        _CpuidSampler(cpu, g.sysinfo, config, regs).run()
    finally:
        if tsx_ctrl is not None:
            cpu.wrmsr(IA32_TSX_CTRL, tsx_ctrl)
    _vmx_msrs(cpu, config)
    _key_management(cpu, g, config)
    _cmrs(g)
    _smrrs(cpu, g, config)
    return config


def _take(cpu: SeamCpu, config: PlatformConfig, msr: int) -> int:
    config.msrs[msr] = value = cpu.rdmsr(msr)
    return value


def _capability_msrs(cpu: SeamCpu, config: PlatformConfig) -> int | None:
    """Returns IA32_TSX_CTRL to restore, when TSX_CPUID_CLEAR had to be lifted to see the real CPUID."""
    tsx_ctrl = None
    _take(cpu, config, IA32_CORE_CAPABILITIES)
    arch = _take(cpu, config, IA32_ARCH_CAPABILITIES)
    if arch & ARCH_CAP_MUST_BE_1 != ARCH_CAP_MUST_BE_1 or arch & ARCH_CAP_MUST_BE_0:
        raise incorrect_msr(IA32_ARCH_CAPABILITIES)
    if _take(cpu, config, IA32_XAPIC_DISABLE_STATUS) != 1:
        raise incorrect_msr(IA32_XAPIC_DISABLE_STATUS)
    tsx_ctrl = lift_tsx_cpuid_clear(cpu, arch)
    if not _take(cpu, config, IA32_MISC_PACKAGE_CTLS) & 1:
        raise incorrect_msr(IA32_MISC_PACKAGE_CTLS)
    if _take(cpu, config, IA32_PERF_CAPABILITIES) & PERF_CAPABILITIES_MUST_BE_1 != PERF_CAPABILITIES_MUST_BE_1:
        raise incorrect_msr(IA32_PERF_CAPABILITIES)
    _take(cpu, config, IA32_TSC_ADJUST)
    return tsx_ctrl


def lift_tsx_cpuid_clear(cpu: SeamCpu, arch_capabilities: int) -> int | None:
    """TSX_CPUID_CLEAR hides the TSX bits of CPUID: clear it, and return what to restore (None: nothing)."""
    if not arch_capabilities & ARCH_CAP_TSX_CTRL:
        return None
    original = cpu.rdmsr(IA32_TSX_CTRL)
    if not original & TSX_CPUID_CLEAR:
        return None
    cpu.wrmsr(IA32_TSX_CTRL, original & ~TSX_CPUID_CLEAR)
    return original


class _CpuidSampler:
    """Reads every CPUID leaf that the module virtualises, checks it, and notes what other code asks for."""

    def __init__(self, cpu: SeamCpu, sysinfo: SysInfo, config: PlatformConfig, regs: Registers) -> None:
        self.cpu = cpu
        self.sysinfo = sysinfo
        self.config = config
        self.regs = regs
        self.l3_sharing = 0
        self.shift = 0
        self.level = LEVEL_INVALID
        self.core_seen = False
        self.perfmon_subleaves = 0

    def run(self) -> None:
        """Sample all of `abi.cpuid.rows()`."""
        config = self.config
        enable = _take(self.cpu, config, IA32_MISC_ENABLE)
        if enable & MISC_ENABLE_LIMIT_CPUID:
            raise LeafError(Status.LIMIT_CPUID_MAXVAL_SET)
        if not enable & MISC_ENABLE_PERFMON or enable & MISC_ENABLE_BTS_UNAVAILABLE:
            raise incorrect_msr(IA32_MISC_ENABLE)
        last_base = self.cpu.cpuid(0)[0]
        if last_base < MIN_LAST_CPU_BASE_LEAF:
            raise LeafError(Status.CPUID_LEAF_NOT_SUPPORTED, MIN_LAST_CPU_BASE_LEAF)
        last_extended = self.cpu.cpuid(FIRST_EXTENDED_LEAF)[0]
        if last_extended < LAST_EXTENDED_LEAF:
            raise LeafError(Status.CPUID_LEAF_NOT_SUPPORTED, LAST_EXTENDED_LEAF & U32)
        config.last_extended_leaf = last_extended
        for row in abi_cpuid.rows():
            values: CpuidValues = (0, 0, 0, 0)
            if row.leaf <= last_base or FIRST_EXTENDED_LEAF <= row.leaf <= last_extended:
                values = self.cpu.cpuid(row.leaf, row.subleaf or 0)
            if any(v & m != e for v, m, e in zip(values, row.verify_mask, row.verify_value, strict=True)):
                raise self._incorrect(row, _pairs(row.verify_mask), _pairs(row.verify_value))
            special = self._SPECIAL.get(row.leaf)
            config.cpuid.append(special(self, row, values) if special else values)

    def _incorrect(self, row: CpuidRow, mask: tuple[int, int], expected: tuple[int, int]) -> LeafError:
        regs = self.regs
        regs.rcx = leaf_subleaf(row)
        regs.rdx, regs.r8 = mask
        regs.r9, regs.r10 = expected
        return LeafError(Status.INCORRECT_CPUID_VALUE)

    def _version(self, row: CpuidRow, values: CpuidValues) -> CpuidValues:
        """Leaf 1: family, model and the lowest stepping of all packages."""
        del row
        table = self.sysinfo.cpuid_fms[: max(1, self.sysinfo.packages)]
        self.config.cpuid_fms = fms = table[0] & ~0xF | min(entry & 0xF for entry in table)
        return (fms, *values[1:])

    def _cache(self, row: CpuidRow, values: CpuidValues) -> CpuidValues:
        if row.subleaf == 3:
            self.l3_sharing = values[0] >> 14 & 0xFFF
        return values

    def _features(self, row: CpuidRow, values: CpuidValues) -> CpuidValues:
        config = self.config
        eax, ebx, ecx, edx = values
        if row.subleaf == 0:
            config.hle, config.rtm = bool(ebx >> 4 & 1), bool(ebx >> 11 & 1)
            config.waitpkg, config.la57 = bool(ecx >> 5 & 1), bool(ecx >> 16 & 1)
        elif row.subleaf == 1:
            config.lass, config.perfmon_ext_leaf, config.lam = (
                bool(eax >> 6 & 1),
                bool(eax >> 8 & 1),
                bool(eax >> 26 & 1),
            )
        elif row.subleaf == 2:
            config.ddpd = bool(edx >> 3 & 1)
        return values

    def _perfmon(self, row: CpuidRow, values: CpuidValues) -> CpuidValues:
        config = self.config
        eax, _, ecx, edx = values
        if eax & 0xFF < 5:
            raise self._incorrect(row, (0xF, 0), (5, 0))
        config.fixed_counters = edx & 0x1F
        config.fixed_counter_bitmap = bitmap = ((1 << config.fixed_counters) - 1 | ecx) & U32
        if bitmap > (1 << MAX_FIXED_COUNTERS) - 1:
            raise self._incorrect(
                row, (0, 0x1F_FFFF_FFFF), (0, MAX_FIXED_COUNTERS << 32 | (1 << MAX_FIXED_COUNTERS) - 1)
            )
        return values

    def _xsave(self, row: CpuidRow, values: CpuidValues) -> CpuidValues:
        config = self.config
        eax, _, ecx, _ = values
        if row.subleaf == 0:
            config.xcr0_supported = eax & XCR0_USER_BITS
        elif row.subleaf == 1:
            config.xfd_supported = bool(eax >> 4 & 1)
            config.xss_supported = ecx & XCR0_SUPERVISOR_BITS
        else:
            bit = row.subleaf or 0
            config.xsave_components[bit] = (eax, bool(ecx >> 1 & 1))
            if config.xfd_supported and ecx >> 2 & 1:
                config.xfd_faulting |= 1 << bit
        return values

    def _tsc(self, row: CpuidRow, values: CpuidValues) -> CpuidValues:
        eax, ebx, ecx, _ = values
        if ebx == 0 or eax == 0:
            raise LeafError(Status.CPUID_LEAF_NOT_SUPPORTED, row.leaf)
        self.config.crystal_hz = ecx
        self.config.tsc_hz = ecx * ebx // eax
        if self.config.tsc_hz < MIN_TSC_HZ:
            raise LeafError(Status.CPUID_LEAF_NOT_SUPPORTED, row.leaf)
        return values

    def _model(self, row: CpuidRow, values: CpuidValues) -> CpuidValues:
        del row
        self.config.native_model_info = values[0]
        return values

    def _lbr(self, row: CpuidRow, values: CpuidValues) -> CpuidValues:
        del row
        self.config.max_lbr_depth = 8 * (values[0] & 0xFF).bit_length()
        return values

    def _topology(self, row: CpuidRow, values: CpuidValues) -> CpuidValues:
        """Leaf 0x1F: levels in ascending order; the L3 cache must be shared by exactly one package."""
        level_number, level_type = values[2] & 0xFF, values[2] >> 8 & 0xFF
        if row.subleaf != level_number:
            raise LeafError(Status.CPUID_LEAF_1F_FORMAT_UNRECOGNIZED)
        if level_type != LEVEL_INVALID:
            if level_type <= self.level or level_type >= LEVEL_MAX:
                raise LeafError(Status.CPUID_LEAF_1F_FORMAT_UNRECOGNIZED)
            self.shift = values[0] & 0x1F
            if level_type == LEVEL_SMT:
                self.config.smt_shift = self.shift
            elif level_type == LEVEL_CORE:
                self.core_seen = True
        else:
            if row.subleaf == 0 or not self.core_seen:
                raise LeafError(Status.CPUID_LEAF_NOT_SUPPORTED, Operand.RAX)
            if self.level != LEVEL_INVALID:
                self.config.package_shift = self.shift
                if self.shift == 0 or self.l3_sharing >> (self.shift - 1) != 1:
                    raise LeafError(Status.INVALID_WBINVD_SCOPE)
        self.level = level_type
        return values

    def _perfmon_ext(self, row: CpuidRow, values: CpuidValues) -> CpuidValues:
        if not self.config.perfmon_ext_leaf:
            return (0, 0, 0, 0)
        if row.subleaf == 0:
            self.perfmon_subleaves = values[0]
        elif not self.perfmon_subleaves >> (row.subleaf or 0) & 1 and any(values):
            raise self._incorrect(row, ((1 << 64) - 1, (1 << 64) - 1), (0, 0))
        return values

    def _max_pa(self, row: CpuidRow, values: CpuidValues) -> CpuidValues:
        config = self.config
        config.max_pa = values[0] & 0xFF
        linear = 57 if config.la57 else 48
        if values[0] >> 8 & 0xFF != linear:
            raise self._incorrect(row, (0xFF00, 0), (linear << 8, 0))
        return values

    _SPECIAL: Final = {
        0x1: _version,
        0x4: _cache,
        0x7: _features,
        0xA: _perfmon,
        0xD: _xsave,
        0x15: _tsc,
        0x1A: _model,
        0x1C: _lbr,
        0x1F: _topology,
        0x23: _perfmon_ext,
        0x8000_0008: _max_pa,
    }


def leaf_subleaf(row: CpuidRow) -> int:
    """Leaf in bits 31:0, subleaf in 63:32 (all ones: the leaf has none)."""
    subleaf = abi_cpuid.SUBLEAF_NA if row.subleaf is None else row.subleaf
    return row.leaf | subleaf << 32


def _pairs(regs: tuple[int, ...]) -> tuple[int, int]:
    eax, ebx, ecx, edx = regs
    return eax | ebx << 32, ecx | edx << 32


def _vmx_msrs(cpu: SeamCpu, config: PlatformConfig) -> None:
    msrs = config.msrs
    basic = _take(cpu, config, IA32_VMX_BASIC)
    if basic >> 32 & 0x1FFF > 4096 or not basic >> 54 & 1 or not basic >> 55 & 1:
        raise incorrect_msr(IA32_VMX_BASIC)
    for msr in VMX_MSRS[1:7]:
        _take(cpu, config, msr)
    config.controls = vmx_controls.for_td(msrs, waitpkg=config.waitpkg, ddpd=config.ddpd)
    misc = _take(cpu, config, IA32_VMX_MISC)
    if misc & VMX_MISC_MUST_BE_1 != VMX_MISC_MUST_BE_1 or misc >> 16 & 0x1FF < 4:
        raise incorrect_msr(IA32_VMX_MISC)
    if _take(cpu, config, IA32_VMX_EPT_VPID_CAP) & EPT_VPID_CAP_MUST_BE_1 != EPT_VPID_CAP_MUST_BE_1:
        raise incorrect_msr(IA32_VMX_EPT_VPID_CAP)
    for msr in VMX_MSRS[9:]:
        _take(cpu, config, msr)
    vmx_controls.check_cr_fixed(msrs)
    config.l2_controls = vmx_controls.for_l2(msrs, waitpkg=config.waitpkg)


def _key_management(cpu: SeamCpu, g: GlobalState, config: PlatformConfig) -> None:
    capability = _take(cpu, config, IA32_TME_CAPABILITY)
    activate = _take(cpu, config, IA32_TME_ACTIVATE)
    if not activate & 1:
        raise incorrect_msr(IA32_TME_ACTIVATE)
    plain = g.sysinfo.without_integrity
    algorithms = 0b0101 if plain else 0b1010  # AES-XTS-128 and 256, without or with integrity
    if not capability & algorithms:
        raise incorrect_msr(IA32_TME_CAPABILITY)
    if not activate >> 48 & algorithms:
        raise incorrect_msr(IA32_TME_ACTIVATE)
    bits = activate >> 32 & 0xF
    g.hkid_shift = config.max_pa - bits
    g.hkid_mask = (1 << bits) - 1 << g.hkid_shift
    g.pa_mask = (1 << g.hkid_shift) - 1
    g.not_a_page = (1 << 64) - (1 << 52) | g.hkid_mask
    partitioning = _take(cpu, config, MKTME_KEYID_PARTITIONING)
    shared, private = partitioning & U32, partitioning >> 32
    g.private_hkid_min = shared + 1
    g.private_hkid_max = shared + private
    if g.private_hkid_max >= MAX_HKIDS:
        raise LeafError(Status.NUM_ACTIVATED_HKIDS_NOT_SUPPORTED, MAX_HKIDS)
    mask = cpu.rdmsr(IA32_SEAMRR_MASK) & SEAMRR_MASK_BITS
    g.seamrr = (cpu.rdmsr(IA32_SEAMRR_BASE) & SEAMRR_MASK_BITS, mask & -mask)
    blocks = _take(cpu, config, IA32_WBINVDP)
    if _take(cpu, config, IA32_WBNOINVDP) != blocks:
        raise incorrect_msr(IA32_WBNOINVDP)


def _cmrs(g: GlobalState) -> None:
    """Page aligned, without KeyID, ascending and apart from each other."""
    last_base, last = 0, 0
    for base, size in g.sysinfo.cmrs:
        if not size:
            continue
        end = base + size - 1
        if (
            end >> 64
            or (base | end) & g.hkid_mask
            or end > 1 << 52
            or (base | size) & 0xFFF
            or (last and (last_base > base or last > base))
        ):
            raise LeafError(Status.CMR_LIST_INVALID)
        last_base, last = base, end


def _smrrs(cpu: SeamCpu, g: GlobalState, config: PlatformConfig) -> None:
    """SMRR and SMRR2 must be locked, well formed, and outside every CMR."""
    cap = _take(cpu, config, IA32_MTRRCAP)
    if not cap & MTRRCAP_SMRR:
        raise LeafError(Status.SMRR_NOT_SUPPORTED)
    if not cap & MTRRCAP_SMRR_LOCK:
        raise LeafError(Status.SMRR_LOCK_NOT_SUPPORTED)
    config.smrr_count = 2 if cap & MTRRCAP_SMRR2 and not g.sysinfo.smrr2_not_supported else 1
    ranges = [tuple(_take(cpu, config, msr) for msr in pair) for pair in SMRR[: config.smrr_count]]
    for index, (_, mask) in enumerate(ranges):
        if not mask & SMRR_LOCK:
            raise LeafError(Status.SMRR_NOT_LOCKED, index)
    for index, (base, mask) in enumerate(ranges):
        if not mask & SMRR_VALID:
            continue
        base &= SMRR_MASK_BITS
        mask &= SMRR_MASK_BITS
        size = mask & -mask
        if not mask or mask != 0x1_0000_0000 - size or base & (size - 1):
            raise LeafError(Status.INVALID_SMRR_CONFIGURATION, index)
        for number, (cmr, length) in enumerate(g.sysinfo.cmrs):
            if length and base < cmr + length and cmr < base + size:
                raise LeafError(Status.SMRR_OVERLAPS_CMR, index | number << 8)


def compare(cpu: SeamCpu, config: PlatformConfig, regs: Registers) -> None:
    """TDH.SYS.LP.INIT: this processor is set up as the one that ran SYS.INIT. LeafError INCONSISTENT_MSR and so on."""
    for msr in CAPABILITY_MSRS:
        _same(cpu, config, msr)
    tsx_ctrl = lift_tsx_cpuid_clear(cpu, config.msrs[IA32_ARCH_CAPABILITIES])
    try:
        _compare_cpuid(cpu, config, regs)
    finally:
        if tsx_ctrl is not None:
            cpu.wrmsr(IA32_TSX_CTRL, tsx_ctrl)
    _same(cpu, config, IA32_TSC_ADJUST)
    _same(cpu, config, IA32_MTRRCAP)
    for pair in SMRR[: config.smrr_count]:
        for msr in pair:
            _same(cpu, config, msr)
    for msr in VMX_MSRS:
        _same(cpu, config, msr)
    _same(cpu, config, IA32_PERF_CAPABILITIES)
    for msr in KEY_MSRS:
        _same(cpu, config, msr)


def _same(cpu: SeamCpu, config: PlatformConfig, msr: int) -> None:
    if cpu.rdmsr(msr) != config.msrs[msr]:
        raise LeafError(Status.INCONSISTENT_MSR, msr)


def _compare_cpuid(cpu: SeamCpu, config: PlatformConfig, regs: Registers) -> None:
    if cpu.rdmsr(IA32_MISC_ENABLE) & MISC_ENABLE_LIMIT_CPUID:
        raise LeafError(Status.LIMIT_CPUID_MAXVAL_SET)
    last_base = cpu.cpuid(0)[0]
    last_extended = cpu.cpuid(FIRST_EXTENDED_LEAF)[0]
    for row, sampled in zip(abi_cpuid.rows(), config.cpuid, strict=True):
        if not (row.leaf <= last_base or FIRST_EXTENDED_LEAF <= row.leaf <= last_extended):
            continue
        values = cpu.cpuid(row.leaf, row.subleaf or 0)
        if any((v ^ s) & m for v, s, m in zip(values, sampled, row.verify_same, strict=True)):
            regs.rcx = leaf_subleaf(row)
            regs.rdx, regs.r8 = _pairs(row.verify_same)
            raise LeafError(Status.INCONSISTENT_CPUID_FIELD)
