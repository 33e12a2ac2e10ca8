"""TDH.MNG.INIT: what TD_PARAMS may say, and what the TD's virtual CPUID, MSRs and controls become."""

import struct

import pytest
from tdx_machine import BUFFER, PAGE, Leaf, Machine, Td, status, td_params

from softtdx.abi import cpuid
from softtdx.abi.status import Operand, Status
from softtdx.module import tdcs

INVALID = Status.OPERAND_INVALID
ATTRIBUTES, XFAM, MAX_VCPUS, L2_VMS, MSR_CTLS = 0, 8, 16, 18, 19
EPTP, FLAGS, TSC = 24, 32, 40
CPUID_CONFIG = 256
DEBUG, ICSSD, LASS, MIGRATABLE, PKS, PERFMON = 1, 1 << 16, 1 << 27, 1 << 29, 1 << 30, 1 << 63


@pytest.fixture(scope="module")
def machine():
    return Machine()


@pytest.fixture(scope="module")
def blank(machine):
    """A TD that every test tries to initialise, and which every test leaves uninitialised."""
    return Td.create(machine, initialize=False)


def changed(at: int, form: str, *values: int) -> bytes:
    """TD_PARAMS of a small TD with something else at an offset."""
    params = bytearray(td_params())
    struct.pack_into(f"<{form}", params, at, *values)
    return bytes(params)


def configured(leaf: int, subleaf: int | None, register: int, value: int, base: bytes | None = None) -> bytes:
    """TD_PARAMS with one configured CPUID register."""
    row = cpuid.find(leaf, subleaf)
    assert row is not None
    assert row.config_index is not None
    params = bytearray(base or td_params())
    struct.pack_into("<I", params, CPUID_CONFIG + 16 * row.config_index + 4 * register, value)
    return bytes(params)


def initialize(machine, td, params: bytes, **operands: int):
    machine.host_write(BUFFER, params)
    return machine.call(Leaf.MNG_INIT, rcx=operands.pop("rcx", td.tdr), rdx=BUFFER, **operands)


REFUSED = [
    ("ATTRIBUTES bit that is none", changed(ATTRIBUTES, "Q", 1 << 1), Operand.ATTRIBUTES),
    ("ATTRIBUTES.MIGRATABLE with DEBUG", changed(ATTRIBUTES, "Q", MIGRATABLE | DEBUG), Operand.ATTRIBUTES),
    ("ATTRIBUTES.MIGRATABLE with PERFMON", changed(ATTRIBUTES, "Q", MIGRATABLE | PERFMON), Operand.ATTRIBUTES),
    ("ATTRIBUTES.PERFMON with ICSSD", changed(ATTRIBUTES, "Q", PERFMON | ICSSD), Operand.ATTRIBUTES),
    ("XFAM without x87", changed(XFAM, "Q", 2), Operand.XFAM),
    ("XFAM without SSE", changed(XFAM, "Q", 1), Operand.XFAM),
    ("XFAM bit that is none", changed(XFAM, "Q", 3 | 1 << 63), Operand.XFAM),
    ("XFAM with MPX", changed(XFAM, "Q", 3 | 3 << 3), Operand.XFAM),
    ("XFAM AVX-512 without AVX", changed(XFAM, "Q", 3 | 0xE0), Operand.XFAM),
    ("XFAM half of AVX-512", changed(XFAM, "Q", 7 | 0x60), Operand.XFAM),
    ("XFAM half of CET", changed(XFAM, "Q", 3 | 1 << 11), Operand.XFAM),
    ("XFAM half of AMX", changed(XFAM, "Q", 7 | 1 << 17), Operand.XFAM),
    ("no vCPU", changed(MAX_VCPUS, "H", 0), Operand.MAX_VCPUS),
    ("too many vCPUs", changed(MAX_VCPUS, "H", 577), Operand.MAX_VCPUS),
    ("too many L2 VMs", changed(L2_VMS, "B", 4), Operand.NUM_L2_VMS),
    ("reserved byte 20", changed(20, "B", 1), Operand.RDX),
    ("reserved byte 23", changed(23, "B", 0x80), Operand.RDX),
    ("CONFIG_FLAGS bit that is none", changed(FLAGS, "Q", 1 << 5), Operand.EXEC_CONTROLS),
    ("CONFIG_FLAGS MAXPA and MAXGPA", changed(FLAGS, "Q", 0x18), Operand.EXEC_CONTROLS),
    ("EPTP uncached", changed(EPTP, "Q", 0 | 3 << 3), Operand.EPTP_CONTROLS),
    ("EPTP three levels", changed(EPTP, "Q", 6 | 2 << 3), Operand.EPTP_CONTROLS),
    ("EPTP six levels", changed(EPTP, "Q", 6 | 5 << 3), Operand.EPTP_CONTROLS),
    ("EPTP accessed and dirty bits", changed(EPTP, "Q", 6 | 3 << 3 | 1 << 6), Operand.EPTP_CONTROLS),
    ("EPTP supervisor shadow stack", changed(EPTP, "Q", 6 | 3 << 3 | 1 << 7), Operand.EPTP_CONTROLS),
    ("EPTP address", changed(EPTP, "Q", 6 | 3 << 3 | 1 << 12), Operand.EPTP_CONTROLS),
    ("wide GPA with four levels", changed(FLAGS, "Q", 1), Operand.EPTP_CONTROLS),
    ("TSC too slow", changed(TSC, "H", 3), Operand.TSC_FREQUENCY),
    ("TSC too fast", changed(TSC, "H", 401), Operand.TSC_FREQUENCY),
    ("reserved byte 42", changed(42, "B", 1), Operand.RDX),
    ("reserved byte 79", changed(79, "B", 1), Operand.RDX),
    ("MSR controls bit that is none", changed(MSR_CTLS, "B", 2), Operand.RDX),
    ("reserved byte 232", changed(232, "B", 1), Operand.RDX),
    ("reserved byte 255", changed(255, "B", 1), Operand.RDX),
    ("a CPUID bit that is not configurable", configured(1, None, 3, 1 << 20), Operand.CPUID_CONFIG),
    ("another family", configured(1, None, 0, 0x50650), Operand.CPUID_CONFIG),
    ("a bit of leaf 7 that is not configurable", configured(7, 0, 1, 2), Operand.CPUID_CONFIG),
    ("reserved byte 704+", changed(1016, "B", 1), Operand.RDX),
    ("reserved last byte", changed(1023, "B", 1), Operand.RDX),
    ("ARCH_CAPABILITIES without its control", changed(224, "Q", 1), Operand.IA32_ARCH_CAPABILITIES_CONFIG),
]
IN_ORDER = [row for row in REFUSED if row[0] != "wide GPA with four levels"]


@pytest.mark.parametrize(("name", "params", "operand"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_td_params_may_not_say(machine, blank, name, params, operand):
    regs = initialize(machine, blank, params)
    assert status(regs.rax) == (INVALID, operand), name
    assert machine.call(Leaf.MNG_RD, rcx=blank.tdr, rdx=0x1110_0003_0000_0000).rax == int(Status.OP_STATE_INCORRECT)


def test_of_two_faults_the_first_field_is_named(machine, blank):
    good = td_params()
    for number, (first, one, operand) in enumerate(IN_ORDER):
        for second, other, _ in IN_ORDER[number + 1 :]:
            touched = {at for at in range(len(good)) if one[at] != good[at]}
            if touched & {at for at in range(len(good)) if other[at] != good[at]}:
                continue
            both = bytes(one[at] if at in touched else other[at] for at in range(len(good)))
            assert status(initialize(machine, blank, both).rax) == (INVALID, operand), f"{first}, {second}"


@pytest.mark.parametrize("l2_vms", [1, 2, 3])
def test_l2_vms_need_more_control_pages(machine, blank, l2_vms):
    regs = initialize(machine, blank, changed(L2_VMS, "B", l2_vms))
    assert status(regs.rax) == (Status.TDCS_NOT_ALLOCATED, 0)


def test_the_refused_cpuid_leaf_is_named_in_rcx(machine, blank):
    regs = initialize(machine, blank, configured(7, 0, 1, 2))
    assert regs.rcx == 7
    regs = initialize(machine, blank, configured(1, None, 0, 0x50650))
    assert regs.rcx == 0xFFFF_FFFF_0000_0001


@pytest.mark.parametrize(
    ("filters", "want", "detail"),
    [
        ([0xFFFF_0000_0000_0000 | 1 << 8], Status.EVENT_FILTER_INVALID, 0),
        ([0xFFFF_0000_0000_0001, 0xFFFF_0100_0000_0001], Status.EVENT_FILTER_INVALID, 1),
        ([0xFFFE_0000_0000_0001], Status.EVENT_FILTER_INVALID, 0),
        ([0xFFFF_0000_0000_0002, 0xFFFF_0000_0000_0001], Status.EVENT_FILTER_ORDER_INVALID, 1),
        ([0xFFFF_0000_0000_0002] * 2, Status.EVENT_FILTER_ORDER_INVALID, 1),
    ],
)
def test_event_filters_are_simple_and_sorted(machine, blank, filters, want, detail):
    page = BUFFER + 4 * PAGE
    machine.host_write(page, struct.pack(f"<{len(filters)}Q", *filters))
    regs = initialize(machine, blank, changed(ATTRIBUTES, "Q", PERFMON), rcx=blank.tdr | 1, r8=page | len(filters))
    assert status(regs.rax) == (want, detail)


@pytest.mark.parametrize("r8", [BUFFER, BUFFER | 513, BUFFER | 1 << 52 | 1, BUFFER | 33 << 46 | 1])
def test_event_filters_have_a_number_and_a_shared_page(machine, blank, r8):
    regs = initialize(machine, blank, changed(ATTRIBUTES, "Q", PERFMON), rcx=blank.tdr | 1, r8=r8)
    assert status(regs.rax) == (INVALID, Operand.R8)


def test_event_filters_are_not_looked_at_without_perfmon(machine):
    td = Td.create(machine, initialize=False)
    assert initialize(machine, td, td_params(), rcx=td.tdr | 1, r8=0xDEAD_BEEF).rax == 0


# --- what becomes of it
def field(machine, td, at: int, form: str):
    memory, shift = machine.platform.memory, machine.module.g.hkid_shift
    page = td.tdcx[at // PAGE] | td.hkid << shift
    return struct.unpack(f"<{form}", memory.read(page + at % PAGE, struct.calcsize(f"<{form}"), seam=True))


def virtual_cpuid(machine, td, leaf: int, subleaf: int | None = None):
    row = cpuid.find(leaf, subleaf)
    assert row is not None
    return field(machine, td, tdcs.CPUID_VALUES + 16 * row.index, "4I")


def test_measured_identities_are_kept(machine):
    identities = bytes(range(144))
    params = bytearray(td_params())
    params[80:224] = identities
    td = Td.create(machine, params=bytes(params))
    found = b"".join(bytes(field(machine, td, at, "48B")) for at in (tdcs.MRCONFIGID, tdcs.MROWNER, tdcs.MROWNERCONFIG))
    assert found == identities


def test_the_tsc_runs_at_the_configured_frequency(machine):
    td = Td.create(machine, params=changed(TSC, "H", 123))
    (multiplier,) = field(machine, td, tdcs.TSC_MULTIPLIER, "Q")
    assert multiplier == (123 * 25_000_000 << 48) // machine.platform.description.tsc_hz
    assert virtual_cpuid(machine, td, 0x15)[:3] == (1, 123, 25_000_000)


@pytest.mark.parametrize(
    ("xfam", "leaf", "subleaf", "there"),
    [
        (3, 0xD, 2, False),
        (7, 0xD, 2, True),
        (7 | 0xE0, 0xD, 5, True),
        (3, 0x14, 0, False),
        (3, 0x1C, None, False),
        (3, 0x1D, 1, False),
        (7 | 3 << 17, 0xD, 18, True),
    ],
)
def test_extended_features_show_in_cpuid_as_xfam_says(machine, xfam, leaf, subleaf, there):
    td = Td.create(machine, params=changed(XFAM, "Q", xfam))
    assert any(virtual_cpuid(machine, td, leaf, subleaf)) is there


@pytest.mark.parametrize(("attributes", "there"), [(0, False), (PERFMON, True)])
def test_performance_counters_show_in_cpuid_as_attributes_say(machine, attributes, there):
    td = Td.create(machine, params=changed(ATTRIBUTES, "Q", attributes))
    assert any(virtual_cpuid(machine, td, 0xA)) is there


@pytest.mark.parametrize(("attributes", "pks"), [(0, 0), (PKS, 1)])
def test_protection_keys_show_in_cpuid_as_attributes_say(machine, attributes, pks):
    td = Td.create(machine, params=changed(ATTRIBUTES, "Q", attributes))
    assert virtual_cpuid(machine, td, 7, 0)[2] >> 31 == pks


def test_a_configurable_bit_is_what_the_host_says_and_an_allowed_one_at_most_what_the_machine_has(machine):
    zero = Td.create(machine)
    for row in cpuid.configurable():
        values = virtual_cpuid(machine, zero, row.leaf, row.subleaf)
        if row.leaf in (1, 0x1F, 0x8000_0008):
            continue
        for value, direct, allow in zip(values, row.config_direct, row.allow_direct, strict=True):
            assert not value & (direct | allow), hex(row.leaf)


@pytest.mark.parametrize(
    ("flags", "eax", "want"),
    [(0, 0, (52, 0)), (8, 0, (48, 0)), (8, 46, (46, 0)), (16, 0, (52, 48))],
)
def test_physical_address_width_as_the_td_sees_it(machine, flags, eax, want):
    params = configured(0x8000_0008, None, 0, eax, changed(FLAGS, "Q", flags))
    td = Td.create(machine, params=params)
    value = virtual_cpuid(machine, td, 0x8000_0008)[0]
    assert (value & 0xFF, value >> 16 & 0xFF) == want


@pytest.mark.parametrize("eax", [44, 49, 52])
def test_a_physical_address_width_out_of_range_is_refused(machine, blank, eax):
    params = configured(0x8000_0008, None, 0, eax, changed(FLAGS, "Q", 8))
    assert status(initialize(machine, blank, params).rax) == (INVALID, Operand.CPUID_CONFIG)
