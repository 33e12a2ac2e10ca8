"""TDH.MNG.INIT: TD_PARAMS, checked bit by bit in the order of the interface, becomes the TD's configuration.

The virtual CPUID table is computed in `cpuid_config`, the virtual MSRs and the MSR bitmaps in `virtual_msrs`.
"""

import struct
from typing import Final

from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.opstate import OpState
from softtdx.abi.status import Operand, Status

from .. import cpuid_config, features, limits, measure, tdcs, virtual_msrs
from ..context import Call
from ..errors import LeafError
from ..locks import EXCLUSIVE
from ..platform import IA32_MISC_ENABLE, IA32_TSC_ADJUST, MISC_ENABLE_LIMIT_CPUID
from ..registry import seamcall
from ..shared import check_shared, is_shared
from ..td import NO_LOCK, Td, open_td

TD_PARAMS_SIZE: Final = 1024
EVENT_FILTERING: Final = 1 << 0
PAGE: Final = 4096
TSC_UNIT_HZ: Final = 25_000_000
TSC_MIN_UNITS: Final = 4
TSC_MAX_UNITS: Final = 400
DEFAULT_HP_LOCK_TIMEOUT_US: Final = 1_000_000
MULTIPLIER_SHIFT: Final = 48
MT_WB: Final = 6
PML5_SUPPORTED: Final = 1 << 7  # IA32_VMX_EPT_VPID_CAP
EPTP_MUST_BE_0: Final = ~0x3F
XSAVE_EXTENDED_AREA: Final = 576
XFAM_AVX: Final = 1 << 2
XFAM_AVX512: Final = 0xE0
XFAM_CET: Final = 3 << 11
XFAM_AMX: Final = 3 << 17
XFAM_LAST_BIT: Final = 18
U64: Final = (1 << 64) - 1


def _invalid(operand: Operand) -> LeafError:
    return LeafError(Status.OPERAND_INVALID, operand)


@seamcall(SeamcallLeaf.MNG_INIT)
def mng_init(call: Call) -> None:
    """TDH.MNG.INIT: initialise the TDCS from TD_PARAMS; OP_STATE becomes INITIALIZED.

    In: RCX TDR (bit 0: R8 has event filters), RDX TD_PARAMS (1 KiB aligned), R8 event filters: number in 11:0, page
    in 51:12. Out: RCX leaf and subleaf after a refused CPUID configuration, else 0.
    Statuses in order: LIMIT_CPUID_MAXVAL_SET, those of `open_td` (RCX), OPERAND_INVALID (RDX, ATTRIBUTES, XFAM,
    MAX_VCPUS, NUM_L2_VMS), TDCS_NOT_ALLOCATED, OPERAND_INVALID (RDX, EXEC_CONTROLS, EPTP_CONTROLS, TSC_FREQUENCY),
    INCONSISTENT_MSR, OPERAND_INVALID (RDX, R8), EVENT_FILTER_INVALID, EVENT_FILTER_ORDER_INVALID, OPERAND_INVALID
    (CPUID_CONFIG), INCORRECT_MSR_VALUE, CPUID_LEAF_1F_FORMAT_UNRECOGNIZED, OPERAND_INVALID (RDX,
    IA32_ARCH_CAPABILITIES_CONFIG).
    """
    regs, cpu = call.regs, call.cpu
    tdr_pa, params_pa, filters = regs.rcx, regs.rdx, regs.r8
    regs.rcx = 0
    if cpu.rdmsr(IA32_MISC_ENABLE) & MISC_ENABLE_LIMIT_CPUID:
        raise LeafError(Status.LIMIT_CPUID_MAXVAL_SET)
    td = open_td(call, tdr_pa & ~EVENT_FILTERING, SeamcallLeaf.MNG_INIT, Operand.RCX, EXCLUSIVE, NO_LOCK)
    check_shared(call.g, params_pa, TD_PARAMS_SIZE, Operand.RDX)
    params = cpu.read(params_pa, TD_PARAMS_SIZE)
    td.wr64(tdcs.NUM_VCPUS, 0)  # and NUM_ASSOC_VCPUS
    td.wr64(tdcs.TD_EPOCH, 1)
    td.wr64(tdcs.REFCOUNT, 0)
    tsc_hz = call.g.platform.tsc_hz
    td.wr64(tdcs.HP_LOCK_TIMEOUT, DEFAULT_HP_LOCK_TIMEOUT_US * tsc_hz // 1_000_000)
    _configuration(call, td, params)
    if tdr_pa & EVENT_FILTERING and td.rd64(tdcs.ATTRIBUTES) & limits.ATTR_PERFMON:
        _event_filters(call, td, filters)
    cpuid_config.configure(call, td, params)
    if any(params[704:]):
        raise _invalid(Operand.RDX)
    arch_config = int.from_bytes(params[224:232], "little")
    virtual_msrs.init_arch_capabilities(call.g.platform, td, bool(params[19] & 1), arch_config)
    virtual_msrs.write_bitmaps(call.g.platform, td)
    virtual_msrs.init_vmx_msrs(call.g.platform, td)
    measure.start(td)
    for register in range(4):
        td.write(tdcs.RTMR + 48 * register, bytes(48))
    td.set_op_state(OpState.INITIALIZED)


def _configuration(call: Call, td: Td, params: bytes) -> None:
    """TD_PARAMS up to the CPUID configuration."""
    config = call.g.platform
    attributes, xfam, max_vcpus, l2_vms, msr_ctls = struct.unpack_from("<QQHBB", params)
    eptp, flags, tsc_frequency = struct.unpack_from("<QQH", params, 24)
    if not attributes_valid(config.attributes_fixed0, config.attributes_fixed1, attributes):
        raise _invalid(Operand.ATTRIBUTES)
    td.wr64(tdcs.ATTRIBUTES, attributes)
    pending_ve_disable = features.CTL_PENDING_VE_DISABLE if attributes & limits.ATTR_SEPT_VE_DISABLE else 0
    td.wr64(tdcs.TD_CTLS, td.rd64(tdcs.TD_CTLS) & ~features.CTL_PENDING_VE_DISABLE | pending_ve_disable)
    if not xfam_valid(config.xcr0_supported | config.xss_supported, xfam):
        raise _invalid(Operand.XFAM)
    td.wr64(tdcs.XFAM, xfam)
    set_xbuff_layout(td, xfam, config.xsave_components)
    if not 1 <= max_vcpus <= limits.MAX_VCPUS_PER_TD:
        raise _invalid(Operand.MAX_VCPUS)
    td.wr32(tdcs.MAX_VCPUS, max_vcpus)
    if l2_vms > limits.MAX_L2_VMS:
        raise _invalid(Operand.NUM_L2_VMS)
    if td.num_tdcx < tdcs.PAGES_BASE + tdcs.PAGES_PER_L2_VM * l2_vms:
        raise LeafError(Status.TDCS_NOT_ALLOCATED)
    td.wr16(tdcs.NUM_L2_VMS, l2_vms)
    if any(params[20:24]):
        raise _invalid(Operand.RDX)
    if not config_flags_valid(flags):
        raise _invalid(Operand.EXEC_CONTROLS)
    if not eptp_controls_valid(config.msrs[0x48C], bool(flags & limits.CONFIG_GPAW), eptp):
        raise _invalid(Operand.EPTP_CONTROLS)
    td.wr64(tdcs.EPTP, eptp | td.sept_root)
    td.wr64(tdcs.CONFIG_FLAGS, flags)
    td.wr8(tdcs.GPAW, flags & limits.CONFIG_GPAW)
    if not TSC_MIN_UNITS <= tsc_frequency <= TSC_MAX_UNITS:
        raise _invalid(Operand.TSC_FREQUENCY)
    td.wr16(tdcs.TSC_FREQUENCY, tsc_frequency)
    if call.cpu.rdmsr(IA32_TSC_ADJUST) != config.msrs[IA32_TSC_ADJUST]:
        raise LeafError(Status.INCONSISTENT_MSR, IA32_TSC_ADJUST)
    set_tsc(td, call.cpu.rdtsc(), config.tsc_hz, tsc_frequency, 0)
    if any(params[42:80]):
        raise _invalid(Operand.RDX)
    td.write(tdcs.MRCONFIGID, params[80:128])
    td.write(tdcs.MROWNER, params[128:176])
    td.write(tdcs.MROWNERCONFIG, params[176:224])
    if msr_ctls & ~1 or any(params[232:256]):
        raise _invalid(Operand.RDX)


def attributes_valid(fixed0: int, fixed1: int, attributes: int) -> bool:
    """ATTRIBUTES as a host may configure them: known bits, and no combination that leaks or cannot be."""
    if attributes & ~fixed0 or attributes & fixed1 != fixed1:
        return False
    if attributes & limits.ATTR_MIGRATABLE and attributes & (limits.ATTR_DEBUG | limits.ATTR_PERFMON):
        return False
    return not (attributes & limits.ATTR_PERFMON and attributes & limits.ATTR_ICSSD)


def xfam_valid(supported: int, xfam: int) -> bool:
    """XFAM: supported features, x87 and SSE always, AVX-512, CET and AMX each as a whole."""
    if xfam & ~(limits.XFAM_FIXED0 & supported) or xfam & limits.XFAM_FIXED1 != limits.XFAM_FIXED1:
        return False
    if xfam & 1 << 5 and not xfam & XFAM_AVX:
        return False
    return all(xfam & group in (0, group) for group in (XFAM_AVX512, XFAM_CET, XFAM_AMX))


def config_flags_valid(flags: int) -> bool:
    """CONFIG_FLAGS: known bits; MAXPA and MAXGPA virtualisation exclude each other."""
    both = limits.CONFIG_MAXPA_VIRT | limits.CONFIG_MAXGPA_VIRT
    return not flags & ~limits.CONFIG_FLAGS_FIXED0 and flags & both != both


def eptp_controls_valid(ept_vpid_cap: int, gpaw: bool, eptp: int) -> bool:
    """EPTP_CONTROLS: write-back, 4 levels, or 5 where the CPU has them; GPAW = 52 needs 5."""
    levels = eptp >> 3 & 7
    deepest = 4 if ept_vpid_cap & PML5_SUPPORTED else 3
    return eptp & 7 == MT_WB and 3 <= levels <= deepest and not eptp & EPTP_MUST_BE_0 and not (gpaw and levels < 4)


def set_xbuff_layout(td: Td, xfam: int, components: dict[int, tuple[int, bool]]) -> None:
    """Where each XSAVE component lies in a vCPU's extended state (SDM volume 1, 13.4.3: compacted format)."""
    offset = XSAVE_EXTENDED_AREA
    for bit in range(2, XFAM_LAST_BIT + 1):
        if xfam >> bit & 1:
            size, aligned = components.get(bit, (0, False))
            if aligned:
                offset = offset + 63 & ~63
            td.wr32(tdcs.XBUFF_OFFSETS + 4 * bit, offset)
            offset += size
    td.wr32(tdcs.XBUFF_SIZE, offset)


def set_tsc(td: Td, tsc: int, native_hz: int, frequency: int, virtual_tsc: int) -> None:
    """TSC multiplier and offset, so that the TD's TSC reads `virtual_tsc` now and runs at `frequency` * 25 MHz."""
    multiplier = (frequency * TSC_UNIT_HZ << MULTIPLIER_SHIFT) // native_hz
    td.wr64(tdcs.TSC_MULTIPLIER, multiplier)
    td.wr64(tdcs.TSC_OFFSET, virtual_tsc - (tsc * multiplier >> MULTIPLIER_SHIFT) & U64)


def _event_filters(call: Call, td: Td, info: int) -> None:
    """The only performance events that the TD may count: sorted, simple filters only."""
    count, page = info & 0xFFF, info & ~0xFFF
    if info >> 52 or not 1 <= count <= limits.MAX_EVENT_FILTERS or not is_shared(call.g, page, PAGE):
        raise _invalid(Operand.R8)
    td.wr16(tdcs.EVENT_FILTERS_NUM, count)
    before = -1
    for index, (filter_,) in enumerate(struct.iter_unpack("<Q", call.cpu.read(page, 8 * count))):
        umask = filter_ >> 32 & 0xFFFF
        if filter_ >> 8 & 0xFF_FFFF or umask > 0xFF or filter_ >> 48 != 0xFFFF:
            raise LeafError(Status.EVENT_FILTER_INVALID, index)
        event = filter_ & 0xFF | umask << 8
        if event <= before:
            raise LeafError(Status.EVENT_FILTER_ORDER_INVALID, index)
        td.wr16(tdcs.EVENT_FILTERS + 2 * index, event)
        before = event
