"""The module's own life: which machines TDH.SYS.INIT and LP.INIT refuse, TDH.SYS.CONFIG's rules, INFO, TDMR.INIT."""

import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from tdx_machine import BUFFER, GIB, GLOBAL_HKID, MIB2, NULL_PA, PAGE, PAMT, Leaf, Machine, status

from softtdx.abi.status import Operand, Status
from softtdx.abi.structs import SysInfoTable, TdmrInfo
from softtdx.hw import Platform, Registers, preset
from softtdx.module import TdxModule
from softtdx.module.state import SysState

INVALID = Status.OPERAND_INVALID
WRONG_MSR = Status.INCORRECT_MSR_VALUE
NO_SUBLEAF = 0xFFFF_FFFF << 32


class Unborn(Machine):
    """A machine whose module was loaded and not yet called. `cpuid`, `msrs`: where the machine differs."""

    def __init__(
        self, *, cpuid=None, msrs=None, table: Callable[[SysInfoTable], None] | None = None, description=None
    ) -> None:
        base = description or preset("spr")
        description = replace(base, cpuid=base.cpuid | (cpuid or {}))
        self.platform = Platform(description)
        self.lps = self.platform.lps
        for msr, value in (msrs or {}).items():
            self.platform.lps[0].wrmsr(msr, value)
        sysinfo = SysInfoTable.parse(self.platform.memory.read(self.platform.seam.base, PAGE, seam=True))
        sysinfo.module_hv = sysinfo.min_update_hv = sysinfo.no_downgrade = 1
        sysinfo.num_handoff_pages = 15
        if table:
            table(sysinfo)
        self.module = TdxModule(self.lps[0]._seam_cpu, bytes(sysinfo))
        self.platform.seam.module = self.module

    @property
    def cpuid(self):
        return self.platform.description.cpuid

    def initialize(self) -> None:
        self.ok(Leaf.SYS_INIT)
        for index in range(len(self.lps)):
            self.ok(Leaf.SYS_LP_INIT, lp=index)


def without(value: int, bit: int) -> int:
    return value & ~(1 << bit)


NATIVE = preset("spr")
MSRS = NATIVE.msrs

# --- SYS.INIT
WRONG_MACHINES = [
    ("no RDCL_NO", {0x10A: without(MSRS[0x10A], 0)}, WRONG_MSR, 0x10A),
    ("RSBA", {0x10A: MSRS[0x10A] | 1 << 2}, WRONG_MSR, 0x10A),
    ("FB_CLEAR_CTRL", {0x10A: MSRS[0x10A] | 1 << 18}, WRONG_MSR, 0x10A),
    ("xAPIC not disabled", {0xBD: 0}, WRONG_MSR, 0xBD),
    ("energy filtering off", {0xBC: 0}, WRONG_MSR, 0xBC),
    ("no freeze while SMM", {0x345: without(MSRS[0x345], 12)}, WRONG_MSR, 0x345),
    ("limited CPUID", {0x1A0: MSRS[0x1A0] | 1 << 22}, Status.LIMIT_CPUID_MAXVAL_SET, 0),
    ("no performance monitoring", {0x1A0: without(MSRS[0x1A0], 7)}, WRONG_MSR, 0x1A0),
    ("no BTS", {0x1A0: MSRS[0x1A0] | 1 << 11}, WRONG_MSR, 0x1A0),
    ("no INS/OUTS information", {0x480: without(MSRS[0x480], 54)}, WRONG_MSR, 0x480),
    ("no true controls", {0x480: without(MSRS[0x480], 55)}, WRONG_MSR, 0x480),
    ("too few CR3 targets", {0x485: MSRS[0x485] & ~(0x1FF << 16) | 3 << 16}, WRONG_MSR, 0x485),
    ("no four-level EPT", {0x48C: without(MSRS[0x48C], 6)}, WRONG_MSR, 0x48C),
    ("no SMRR", {0xFE: without(MSRS[0xFE], 11)}, Status.SMRR_NOT_SUPPORTED, 0),
    ("no SMRR lock", {0xFE: without(MSRS[0xFE], 14)}, Status.SMRR_LOCK_NOT_SUPPORTED, 0),
    ("SMRR not locked", {0x1F3: without(MSRS[0x1F3], 10)}, Status.SMRR_NOT_LOCKED, 0),
    ("SMRR with a hole", {0x1F3: 0xFF7F_0C00}, Status.INVALID_SMRR_CONFIGURATION, 0),
    ("SMRR misaligned", {0x1F2: MSRS[0x1F2] | 0x1000}, Status.INVALID_SMRR_CONFIGURATION, 0),
    ("SMRR over a CMR", {0x1F2: 0x1000_0000}, Status.SMRR_OVERLAPS_CMR, 0),
]


@pytest.mark.parametrize(("name", "msrs", "want", "detail"), WRONG_MACHINES, ids=[row[0] for row in WRONG_MACHINES])
def test_sys_init_refuses_a_machine_that_is_set_up_wrongly(name, msrs, want, detail):
    machine = Unborn(msrs=msrs)
    machine.fails(Leaf.SYS_INIT, want, detail)
    machine.fails(Leaf.SYS_LP_INIT, Status.SYS_LP_INIT_NOT_PENDING)


def test_the_checks_of_msrs_come_in_a_fixed_order():
    merged: dict[int, int] = {}
    for name, msrs, want, detail in reversed(WRONG_MACHINES):
        merged |= msrs
        assert status(Unborn(msrs=merged).call(Leaf.SYS_INIT).rax) == (want, detail), name


def test_sys_init_names_the_cpuid_leaf_that_is_wrong_and_what_it_should_be():
    eax, ebx, ecx, edx = NATIVE.cpuid[7, 0]
    machine = Unborn(cpuid={(7, 0): (eax, without(ebx, 7), ecx, edx)})  # SMEP
    regs = machine.fails(Leaf.SYS_INIT, Status.INCORRECT_CPUID_VALUE)
    assert regs.rcx == 7
    mask, value = regs.rdx, regs.r9
    assert mask >> 32 & 1 << 7
    assert (eax | ebx << 32) & mask == value


@pytest.mark.parametrize(
    ("cpuid", "want", "detail"),
    [
        ({(0, None): (0x1E, 0, 0, 0)}, Status.CPUID_LEAF_NOT_SUPPORTED, 0x1F),
        ({(0x8000_0000, None): (0x8000_0007, 0, 0, 0)}, Status.CPUID_LEAF_NOT_SUPPORTED, 0x8000_0008),
    ],
)
def test_sys_init_needs_certain_cpuid_leaves(cpuid, want, detail):
    leaf = next(iter(cpuid))
    old = NATIVE.cpuid.get(leaf) or NATIVE.cpuid[leaf[0], 0]
    key = leaf if leaf in NATIVE.cpuid else (leaf[0], 0)
    machine = Unborn(cpuid={key: (cpuid[leaf][0], *old[1:])})
    machine.fails(Leaf.SYS_INIT, want, detail)


@pytest.mark.parametrize("rcx", [1, 1 << 63, NULL_PA])
def test_sys_init_reserves_rcx(rcx):
    Unborn().fails(Leaf.SYS_INIT, INVALID, Operand.RCX, rcx=rcx)


@pytest.mark.parametrize("version", [2, 3, 255])
def test_sys_init_looks_at_its_version_first(version):
    regs = Unborn().fails(Leaf.SYS_INIT, INVALID, Operand.RAX, version=version, rcx=1)
    assert regs.rcx == 0


@pytest.mark.parametrize(
    "r8",
    [1, 1 << 5, 1 << 52, 1 << 53, 33 << 46, 0x6000_0000, BUFFER | 1 << 54 | 15 << 56],
)
def test_fatal_error_reporting_has_an_address_of_the_host_and_a_vector(r8):
    Unborn().fails(Leaf.SYS_INIT, INVALID, Operand.R8, version=1, r8=r8)


@pytest.mark.parametrize("r8", [BUFFER, BUFFER | 1 << 54 | 32 << 56, (1 << 52) - 64])
def test_fatal_error_reporting_may_be_asked_for(r8):
    Unborn().ok(Leaf.SYS_INIT, version=1, r8=r8)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: setattr(table, "module_hv", 2),
        lambda table: setattr(table, "no_downgrade", 0),
        lambda table: setattr(table, "num_handoff_pages", 12),
    ],
)
def test_sys_init_refuses_what_its_own_sigstruct_does_not_say(change):
    Unborn(table=change).fails(Leaf.SYS_INIT, Status.SYS_INCOMPATIBLE_SIGSTRUCT)


@pytest.mark.parametrize(
    "cmrs",
    [
        [(0x800, PAGE)],
        [(0, PAGE + 1)],
        [(33 << 46, PAGE)],
        [(GIB, PAGE), (0, PAGE)],
        [(0, 2 * PAGE), (PAGE, PAGE)],
    ],
)
def test_sys_init_refuses_a_list_of_memory_ranges_that_makes_no_sense(cmrs):
    def change(table: SysInfoTable) -> None:
        for entry in table.cmr_data:
            entry.base = entry.size = 0
        for entry, (base, size) in zip(table.cmr_data, cmrs, strict=False):
            entry.base, entry.size = base, size

    Unborn(table=change).fails(Leaf.SYS_INIT, Status.CMR_LIST_INVALID)


def test_sys_init_happens_once():
    machine = Unborn()
    machine.ok(Leaf.SYS_INIT)
    machine.fails(Leaf.SYS_INIT, Status.SYS_INIT_NOT_PENDING)


# --- LP.INIT
def test_lp_init_comes_after_sys_init_and_once_on_each_processor():
    machine = Unborn()
    machine.fails(Leaf.SYS_LP_INIT, Status.SYS_LP_INIT_NOT_PENDING)
    machine.initialize()
    machine.fails(Leaf.SYS_LP_INIT, Status.SYS_LP_INIT_DONE)


@pytest.mark.parametrize(
    "msr", [0xCF, 0x10A, 0xBC, 0x3B, 0xFE, 0x1F2, 0x1F3, 0x480, 0x485, 0x48C, 0x486, 0x489, 0x345, 0x98]
)
def test_lp_init_refuses_a_processor_whose_msr_differs(msr):
    machine = Unborn()
    machine.ok(Leaf.SYS_INIT)
    lp = machine.lps[1]
    lp.wrmsr(msr, lp.rdmsr(msr) ^ 1 << 20)
    machine.fails(Leaf.SYS_LP_INIT, Status.INCONSISTENT_MSR, msr, lp=1)
    machine.ok(Leaf.SYS_LP_INIT, lp=0)


def test_lp_init_names_the_cpuid_leaf_that_differs():
    machine = Unborn()
    machine.ok(Leaf.SYS_INIT)
    eax, ebx, ecx, edx = NATIVE.cpuid[7, 0]
    machine.platform.description = replace(
        machine.platform.description, cpuid=machine.cpuid | {(7, 0): (eax, ebx ^ 1 << 19, ecx, edx)}
    )
    regs = machine.fails(Leaf.SYS_LP_INIT, Status.INCONSISTENT_CPUID_FIELD, lp=1)
    assert regs.rcx == 7
    assert regs.rdx >> 32 & 1 << 19


def test_a_processor_that_was_not_initialised_is_told_nothing():
    machine = Unborn()
    for leaf, operands in ((Leaf.SYS_INFO, {"rcx": BUFFER}), (Leaf.SYS_RD, {}), (Leaf.SYS_RDALL, {"rdx": BUFFER})):
        machine.fails(leaf, Status.SYS_LP_INIT_NOT_DONE, **operands)


# --- the state of the module
NOT_BEFORE_READY = [leaf for leaf in Leaf if not leaf.name.startswith("SYS_") or leaf is Leaf.SYS_SHUTDOWN]


@pytest.mark.parametrize("leaf", NOT_BEFORE_READY, ids=lambda leaf: leaf.name)
def test_leaves_for_tds_need_a_module_that_is_ready(leaf):
    machine = Unborn()
    machine.fails(leaf, Status.SYS_NOT_READY)
    machine.initialize()
    machine.fails(leaf, Status.SYS_NOT_READY)


@pytest.mark.parametrize("rax", [0x1_0000_0000, 1 << 24, 1 << 62, 0x40_0000_0000_0011])
def test_reserved_bits_of_rax_are_refused_before_anything_else(rax):
    machine = Unborn()
    regs = machine.lps[0].seamcall(Registers(rax=rax | Leaf.MNG_CREATE))
    assert status(regs.rax) == (INVALID, Operand.RAX)


def test_unknown_leaves_are_refused_only_when_the_module_is_ready(machine):
    assert status(Unborn().lps[0].seamcall(Registers(rax=200)).rax) == (Status.SYS_NOT_READY, 0)
    assert status(machine.lps[0].seamcall(Registers(rax=200)).rax) == (INVALID, Operand.RAX)


# --- SYS.CONFIG
def tdmr(base: int = 0, size: int = GIB, pamt: int = PAMT, **changes: int) -> TdmrInfo:
    """A TDMR as the machine's own, first MiB reserved, but for `changes`."""
    info = TdmrInfo()
    info.base, info.size = base, size
    info.pamt_1g_base, info.pamt_1g_size = pamt, 0x1000
    info.pamt_2m_base, info.pamt_2m_size = pamt + 0x1000, 0x2000
    info.pamt_4k_base, info.pamt_4k_size = pamt + 0x1_0000, 0x40_0000
    info.reserved_areas[0].offset, info.reserved_areas[0].size = 0, 0x10_0000
    for name, value in changes.items():
        if name.startswith("area"):
            index, field = int(name[4]), name[6:]
            setattr(info.reserved_areas[index], field, value)
        else:
            setattr(info, name, value)
    return info


def configure(machine: Machine, tdmrs: list[TdmrInfo], r8: int = GLOBAL_HKID) -> tuple[Status, int]:
    addresses = [BUFFER + 0x200 * (index + 1) for index in range(len(tdmrs))]
    machine.host_write(BUFFER, struct.pack(f"<{len(addresses)}Q", *addresses))
    for address, info in zip(addresses, tdmrs, strict=True):
        machine.host_write(address, bytes(info))
    return status(machine.call(Leaf.SYS_CONFIG, rcx=BUFFER, rdx=len(tdmrs), r8=r8).rax)


@pytest.fixture(scope="module")
def unconfigured():
    machine = Unborn()
    machine.initialize()
    return machine


PAMT_1G, PAMT_2M, PAMT_4K = 2 << 8, 1 << 8, 0
TDMRS = [
    ("base not 1 GiB aligned", [tdmr(base=MIB2)], Status.INVALID_TDMR, 0),
    ("size not 1 GiB aligned", [tdmr(size=GIB + MIB2)], Status.INVALID_TDMR, 0),
    ("no size", [tdmr(size=0)], Status.INVALID_TDMR, 0),
    ("with a KeyID", [tdmr(base=33 << 46)], Status.INVALID_TDMR, 0),
    ("wraps around", [tdmr(base=-GIB & NULL_PA, size=2 * GIB)], Status.INVALID_TDMR, 0),
    ("not ascending", [tdmr(), tdmr(pamt=PAMT + 0x100_0000)], Status.NON_ORDERED_TDMR, 1),
    ("area misaligned", [tdmr(area1_offset=0x20_0800, area1_size=PAGE)], Status.INVALID_RESERVED_IN_TDMR, 1 << 8),
    ("area of odd size", [tdmr(area1_offset=0x20_0000, area1_size=0x800)], Status.INVALID_RESERVED_IN_TDMR, 1 << 8),
    ("area outside", [tdmr(area1_offset=GIB - PAGE, area1_size=2 * PAGE)], Status.INVALID_RESERVED_IN_TDMR, 1 << 8),
    ("areas overlap", [tdmr(area1_offset=PAGE, area1_size=PAGE)], Status.NON_ORDERED_RESERVED_IN_TDMR, 1 << 8),
    ("area after a gap", [tdmr(area2_offset=MIB2, area2_size=PAGE)], Status.NON_ORDERED_RESERVED_IN_TDMR, 1 << 8),
    ("1G PAMT misaligned", [tdmr(pamt_1g_base=PAMT + 0x800)], Status.INVALID_PAMT, PAMT_1G),
    ("2M PAMT of odd size", [tdmr(pamt_2m_size=0x2001)], Status.INVALID_PAMT, PAMT_2M),
    ("4K PAMT too small", [tdmr(pamt_4k_size=0x40_0000 - PAGE)], Status.INVALID_PAMT, PAMT_4K),
    ("2M PAMT too small", [tdmr(pamt_2m_size=0x1000)], Status.INVALID_PAMT, PAMT_2M),
    ("4K PAMT with a KeyID", [tdmr(pamt_4k_base=PAMT | 33 << 46)], Status.INVALID_PAMT, PAMT_4K),
    ("PAMT areas overlap", [tdmr(pamt_1g_base=PAMT + 0x1000)], Status.PAMT_OVERLAP, PAMT_2M),
    ("PAMT in its own TDMR", [tdmr(pamt_2m_base=0x100_0000)], Status.PAMT_OVERLAP, PAMT_2M),
    ("PAMT outside the CMRs", [tdmr(pamt_1g_base=0x7000_0000)], Status.PAMT_OUTSIDE_CMRS, PAMT_1G),
    ("memory outside the CMRs", [tdmr(area0_size=0)], Status.TDMR_OUTSIDE_CMRS, 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tdmrs", "want", "detail"), TDMRS, ids=[row[0] for row in TDMRS])
def test_rules_for_tdmrs(unconfigured, name, tdmrs, want, detail):
    assert configure(unconfigured, tdmrs) == (want, detail), name
    assert unconfigured.module.g.sys_state is SysState.INIT_DONE


def test_the_pamt_of_one_tdmr_lies_outside_the_other(unconfigured):
    page = 0x1000_0000  # the only one of the second TDMR that is not reserved
    rest = {"area0_size": page, "area1_offset": page + PAGE, "area1_size": GIB - page - PAGE}
    second = tdmr(base=GIB, pamt=PAMT + 0x100_0000, **rest)
    found = configure(unconfigured, [tdmr(pamt_1g_base=GIB + page), second])
    assert found == (Status.PAMT_OVERLAP, 0 | PAMT_1G | 1 << 16)


@pytest.mark.parametrize(
    ("operands", "operand"),
    [
        ({"rcx": BUFFER | 0x100}, Operand.RCX),
        ({"rcx": BUFFER | 33 << 46}, Operand.RCX),
        ({"rcx": 0x6000_0000}, Operand.RCX),
        ({"rdx": 0}, Operand.RDX),
        ({"rdx": 65}, Operand.RDX),
        ({"r8": 31}, Operand.R8),
        ({"r8": 64}, Operand.R8),
        ({"r8": 33 | 1 << 17}, Operand.R8),
        ({"r8": 33 | 1 << 63}, Operand.R8),
    ],
)
def test_operands_of_sys_config(unconfigured, operands, operand):
    good = {"rcx": BUFFER, "rdx": 1, "r8": 33}
    unconfigured.fails(Leaf.SYS_CONFIG, INVALID, operand, **good | operands)


def test_sys_config_needs_every_processor():
    machine = Unborn()
    machine.fails(Leaf.SYS_CONFIG, Status.SYS_CONFIG_NOT_PENDING)
    machine.ok(Leaf.SYS_INIT)
    machine.ok(Leaf.SYS_LP_INIT)
    machine.fails(Leaf.SYS_CONFIG, Status.SYS_CONFIG_NOT_PENDING)


def test_the_global_key_is_configured_once_on_each_package():
    machine = Unborn()
    machine.fails(Leaf.SYS_KEY_CONFIG, Status.SYS_KEY_CONFIG_NOT_PENDING)
    machine.initialize()
    assert configure(machine, [tdmr()])[0] is Status.SUCCESS
    machine.ok(Leaf.SYS_KEY_CONFIG)
    machine.fails(Leaf.SYS_KEY_CONFIG, Status.SYS_KEY_CONFIG_NOT_PENDING)


# --- TDMR.INIT
@pytest.mark.parametrize("rcx", [PAGE, GIB, 1 << 52, 33 << 46, NULL_PA])
def test_tdmr_init_wants_the_base_of_a_tdmr(machine, rcx):
    regs = machine.fails(Leaf.SYS_TDMR_INIT, INVALID, Operand.RCX, rcx=rcx)
    assert regs.rdx == 0


def test_no_page_is_usable_before_its_gibibyte_is_complete():
    machine = Unborn()
    machine.initialize()
    assert configure(machine, [tdmr()])[0] is Status.SUCCESS
    machine.ok(Leaf.SYS_KEY_CONFIG)
    calls = 0
    while True:
        machine.fails(Leaf.PHYMEM_PAGE_RDMD, Status.OPERAND_ADDR_RANGE_ERROR, Operand.RCX, rcx=0x20_0000)
        calls += 1
        if machine.ok(Leaf.SYS_TDMR_INIT, rcx=0).rdx:
            break
    assert calls == 256
    machine.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=0x20_0000)
    machine.fails(Leaf.SYS_TDMR_INIT, Status.TDMR_ALREADY_INITIALIZED, rcx=0)


def test_reserved_areas_are_reserved_in_the_pamt(machine):
    assert machine.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=0xF_F000).rcx == 1
    assert machine.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=0x10_0000).rcx == 0


# --- INFO
def test_sys_info_tells_the_machine(machine):
    regs = machine.ok(Leaf.SYS_INFO, rcx=BUFFER, rdx=1024, r8=BUFFER + 0x400, r9=32)
    assert (regs.rdx, regs.r9) == (1024, 32)
    info = machine.lps[0].read(BUFFER, 1024)
    assert struct.unpack_from("<II", info, 0) == (0, 0x8086)
    base, size = struct.unpack("<QQ", machine.lps[0].read(BUFFER + 0x400, 16))
    assert (base, size) == machine.platform.description.cmrs[0]


@pytest.mark.parametrize(
    ("operands", "operand"),
    [
        ({"rcx": BUFFER | 0x200}, Operand.RCX),
        ({"rcx": BUFFER | 33 << 46}, Operand.RCX),
        ({"rdx": 1023}, Operand.RDX),
        ({"r8": BUFFER | 0x100}, Operand.R8),
        ({"r8": 0x6000_0000}, Operand.R8),
        ({"r9": 31}, Operand.R9),
        ({"rcx": BUFFER | 0x200, "rdx": 0, "r8": 1, "r9": 0}, Operand.RCX),
        ({"rdx": 0, "r8": 1, "r9": 0}, Operand.RDX),
        ({"r8": 1, "r9": 0}, Operand.R8),
    ],
)
def test_operands_of_sys_info(machine, operands, operand):
    good = {"rcx": BUFFER, "rdx": 1024, "r8": BUFFER + 0x400, "r9": 32}
    regs = machine.fails(Leaf.SYS_INFO, INVALID, operand, **good | operands)
    assert (regs.rdx, regs.r9) == (0, 0)
