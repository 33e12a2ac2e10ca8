"""TDG.VP.* and TDG.MR.*: operands, refusals in the order of the checks, and what crosses between TD and host."""

import hashlib

import pytest
from guest_script import GP, Engine, Exit, Run, interrupt, run, tdcall
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tdx_machine import HOST, Leaf, Machine, Td, status, td_params

from softtdx.abi import fields
from softtdx.abi.exits import ExitReason as R
from softtdx.abi.leaves import TdcallLeaf as T
from softtdx.abi.msrs import Msr
from softtdx.abi.status import Operand, Status
from softtdx.abi.structs import ConfigFlags
from softtdx.hw import Registers
from softtdx.hw.registers import GPR_NAMES
from softtdx.module import vmcs

DATA = 0x20_0000  # private pages of the TD
SHARED = 1 << 47
BEYOND = 1 << 48
U64 = (1 << 64) - 1
PASSABLE = [name for name in GPR_NAMES if name not in ("rax", "rcx", "rsp")]
HINT = 1 << 52
UNSUPPORTED = 0xFFFF


def build(machine: Machine, config_flags: int = 0, pages: int = 3) -> Td:
    """A TD with pages at DATA."""
    params = bytearray(td_params())
    params[32:40] = config_flags.to_bytes(8, "little")
    td = Td.create(machine, params=bytes(params))
    td.add_path(DATA)
    for index in range(pages):
        td.add_page(DATA + 0x1000 * index, bytes([index + 1]) * 4096)
    td.finalize()
    return td


@pytest.fixture(scope="module")
def td():
    return build(Machine())


def enter(td: Td, *exits: Exit, **host) -> Run:
    return run(td.machine.lps[0], td.vcpu_pages[0], *exits, **host)


def call(td: Td, leaf: T, version: int = 0, **operands: int):
    """One TDCALL that does not leave: the guest's registers after it."""
    result = enter(td, tdcall(leaf, version, **operands))
    assert result.seen, f"left with {result.host.rax:#x}"
    return result.seen[0].regs


def refused(td: Td, want: Status, operand: int, leaf: T, version: int = 0, **operands: int) -> None:
    """The status, and every register but RAX as it was."""
    regs = call(td, leaf, version, **operands)
    assert status(regs.rax) == (want, operand), f"{leaf.name} {operands}"
    left = {name: value for name, value in regs.items() if value and name != "rax"}
    assert left == {name: value for name, value in operands.items() if value}


# --- RAX
@pytest.mark.parametrize("rax", [UNSUPPORTED, 13, 1 << 16 | 1, 3 << 16, 1 << 24, 1 << 63, 1 << 32 | 1])
def test_an_unknown_leaf_version_or_reserved_bit_is_an_invalid_rax(td, rax):
    exit_ = tdcall(T.VP_INFO)
    exit_.gprs["rax"] = rax
    regs = enter(td, exit_).seen[0].regs
    assert status(regs.rax) == (Status.OPERAND_INVALID, Operand.RAX)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rax=st.integers(0, U64), rcx=st.integers(0, U64), rdx=st.integers(0, U64), r8=st.integers(0, U64))
def test_no_tdcall_a_guest_can_make_breaks_the_module(td, rax, rcx, rdx, r8):
    """Any registers: the answer is a status, or a TD exit that the host may see."""
    exit_ = tdcall(T.VP_INFO)
    exit_.gprs = {"rax": rax, "rcx": rcx, "rdx": rdx, "r8": r8}
    small = tdcall(T.VP_INFO)
    small.gprs = {"rax": rax % 32 | rax & 0x3_0000, "rcx": rcx, "rdx": rdx, "r8": r8}
    for attempt in (exit_, small):
        result = enter(td, attempt)
        assert result.host.rax & 0xFFFF in (R.EXTERNAL_INTERRUPT, R.EPT_VIOLATION, R.EPT_MISCONFIGURATION, R.TDCALL)
        assert not result.host.rax >> 63


# --- TDG.VP.VMCALL
@pytest.mark.parametrize("bit", [0, 1, 4, 32, 33, 47, 63])
def test_vmcall_refuses_registers_that_cannot_be_passed(td, bit):
    refused(td, Status.OPERAND_INVALID, Operand.RCX, T.VP_VMCALL, rcx=1 << bit | 1 << 10, r10=5)


def test_vmcall_gives_the_host_exactly_the_registers_of_the_mask(td):
    secret = {name: 0x1000 + n for n, name in enumerate(GPR_NAMES)}
    for number in (2, 3, 5, *range(6, 16)):
        mask = 1 << number
        exit_ = tdcall(T.VP_VMCALL)
        exit_.gprs = secret | {"rax": 0, "rcx": mask}
        host = enter(td, exit_, **dict.fromkeys(PASSABLE, 0xBAD)).host
        shown = {name: value for name, value in host.items() if value and name != "rsp"}
        assert shown == {"rax": R.TDCALL, "rcx": mask, GPR_NAMES[number]: secret[GPR_NAMES[number]]}


def test_the_guest_gets_back_exactly_the_registers_of_the_mask(td):
    own = {name: 0x2000 + n for n, name in enumerate(GPR_NAMES)}
    exit_ = tdcall(T.VP_VMCALL)
    mask = 1 << 10 | 1 << 11 | 1 << 15
    exit_.gprs = own | {"rax": 0, "rcx": mask}
    enter(td, exit_)
    answer = {name: 0x3000 + n for n, name in enumerate(GPR_NAMES) if name not in ("rax", "rcx", "rsp")}
    entry = enter(td, **answer).entry
    want = own | {"rax": 0, "rcx": mask, "rsp": entry.regs.rsp} | {n: answer[n] for n in ("r10", "r11", "r15")}
    assert dict(entry.regs.items()) == want
    assert entry.rip == 0x1004


def test_registers_come_back_once_only(td):
    exit_ = tdcall(T.VP_VMCALL, rcx=1 << 10)
    enter(td, exit_)
    assert enter(td, r10=7).entry.regs.r10 == 7
    assert enter(td, r10=9).entry.regs.r10 == 0  # the interrupt's registers, which the host cannot touch


def test_xmm_registers_cross_by_their_own_mask(td):
    mask = 1 << 16 | 1 << (16 + 9) | 1 << 10

    def fill(core):
        for index in range(16):
            core.set_xmm(index, 0x1111 * (index + 1))

    exit_ = tdcall(T.VP_VMCALL, rcx=mask)
    exit_.act = fill
    host = enter(td, exit_).host
    assert host.rcx == mask
    assert [value for value in host.xmm if value] == [0x1111, 0x1111 * 10]
    seen: list[int] = []
    look = interrupt()
    look.act = lambda core: seen.extend(core.xmm(index) for index in range(16))
    lp = td.machine.lps[0]
    regs = Registers(rax=0, rcx=td.vcpu_pages[0])
    regs.xmm[0], regs.xmm[5], regs.xmm[9] = 0xAAAA, 0xBBBB, 0xCCCC
    lp.guest_engine = Engine([look])
    lp.seamcall(regs)
    lp.guest_engine = None
    assert seen[0] == 0xAAAA
    assert seen[9] == 0xCCCC
    assert seen[5] == 0x1111 * 6


def test_rbp_never_crosses_when_the_td_was_built_so(machine):
    td = build(machine, int(ConfigFlags.NO_RBP_MOD))
    refused(td, Status.OPERAND_INVALID, Operand.RCX, T.VP_VMCALL, rcx=1 << 5)
    exit_ = tdcall(T.VP_VMCALL, rcx=1 << 10, rbp=0x5EC2E7)
    host = enter(td, exit_, rbp=0x1234).host
    assert host.rbp == 0x1234
    assert enter(td, rbp=0x9999).entry.regs.rbp == 0x5EC2E7
    assert enter(td, rbp=0x4321).host.rbp == 0x4321


# --- nothing of the guest stays behind
def test_the_host_finds_no_state_of_the_guest_after_a_td_exit(td):
    secret = 0x5EC2E75EC2E7
    scrubbed = (Msr.STAR, Msr.LSTAR, Msr.KERNEL_GS_BASE, Msr.TSC_AUX)

    def leave_traces(core):
        for index in range(16):
            core.set_xmm(index, secret)
        core.dr = [secret, secret, secret, secret, 0xFFFF_0FF1]
        core.cr2 = secret
        for msr in scrubbed:
            core.wrmsr(msr, secret & 0xFFFF_FFFF)

    lp = td.machine.lps[0]
    for exit_ in (interrupt(), tdcall(T.VP_VMCALL, rcx=1 << 10), Exit(R.TASK_SWITCH)):
        exit_.gprs = dict.fromkeys(GPR_NAMES, secret) | exit_.gprs
        exit_.gprs.pop("rsp")
        if exit_.reason == R.TDCALL:
            exit_.gprs["r10"] = 1
        exit_.act = leave_traces
        host = enter(td, exit_).host
        core = lp.core
        assert secret not in host.values()
        assert not any(core.xmm(index) for index in range(16))
        assert core.dr[:4] == (0, 0, 0, 0) or list(core.dr[:4]) == [0, 0, 0, 0]
        assert core.cr2 == 0
        assert [core.rdmsr(msr) for msr in scrubbed] == [0] * len(scrubbed)
        found = {}
        look = interrupt()
        look.act = lambda core, found=found: found.update(
            dr=list(core.dr), cr2=core.cr2, xmm=core.xmm(3), lstar=core.rdmsr(Msr.LSTAR)
        )
        enter(td, look)
        assert found == {
            "dr": [secret] * 4 + [0xFFFF_0FF1], "cr2": secret, "xmm": secret, "lstar": secret & 0xFFFF_FFFF
        }  # fmt: skip


# --- TDG.VP.VEINFO.GET
def test_veinfo_get_by_version(td):
    cause = Exit(R.IO_INSTRUCTION, fields={
        vmcs.EXIT_QUALIFICATION: 0x3F8_0008, vmcs.INSTRUCTION_LENGTH: 1, vmcs.INSTRUCTION_INFO: 0x77,
        vmcs.INTERRUPTIBILITY: 1,
    })  # fmt: skip
    for version in (0, 1, 2):
        regs = enter(td, cause, tdcall(T.VP_VEINFO_GET, version, r11=5, r12=6)).seen[1].regs
        assert regs.rax == 0
        assert regs.rcx == R.IO_INSTRUCTION | (0x11 << 32 if version else 0)
        assert (regs.rdx, regs.r8, regs.r9, regs.r10) == (0x3F8_0008, 0, 0, 1 | 0x77 << 32)
        assert (regs.r11, regs.r12) == ((0, 1) if version == 2 else (5, 6))


def test_veinfo_get_without_a_ve_clears_its_outputs(td):
    junk = {"rcx": 1, "rdx": 2, "r8": 3, "r9": 4, "r10": 5}
    for version, want in ((0, (Status.NO_VALID_VE_INFO, 0)), (3, (Status.OPERAND_INVALID, Operand.RAX))):
        regs = call(td, T.VP_VEINFO_GET, version, **junk)
        assert status(regs.rax) == want
        assert {name for name, value in regs.items() if value} == {"rax"}


# --- RTMR
def rtmr(td: Td, index: int) -> bytes:
    """The RTMR, by the report."""
    return report(td)[512 + 208 + 48 * index :][:48]


def report(td: Td) -> bytes:
    """TDG.MR.REPORT through the TD's own memory."""
    regs = call(td, T.MR_REPORT, rcx=DATA + 0x1000, rdx=DATA + 0x2000, r8=0)
    assert regs.rax == 0, hex(regs.rax)
    page = find_page(td, DATA + 0x1000)
    return td.machine.platform.memory.read(page, 1024, seam=True)


def find_page(td: Td, gpa: int) -> int:
    """The bus address behind a private page."""
    entry, _, _ = td.entry(gpa)
    return td.machine.platform.description.keyed(entry & 0x000F_FFFF_FFFF_F000 & ~(0x3F << 46), td.hkid)


@pytest.mark.parametrize(
    ("operands", "operand"),
    [({"rcx": DATA + 1, "rdx": 9}, Operand.RCX), ({"rcx": DATA + 32}, Operand.RCX),
     ({"rcx": SHARED | DATA}, Operand.RCX), ({"rcx": BEYOND}, Operand.RCX), ({"rcx": DATA, "rdx": 4}, Operand.RDX),
     ({"rcx": DATA, "rdx": U64}, Operand.RDX)],
)  # fmt: skip
def test_rtmr_extend_refusals(td, operands, operand):
    refused(td, Status.OPERAND_INVALID, operand, T.MR_RTMR_EXTEND, **operands)


def test_rtmr_extend_hashes_the_old_value_and_the_new():
    td = build(Machine())
    value = bytes(48)
    for _ in range(3):
        assert call(td, T.MR_RTMR_EXTEND, rcx=DATA, rdx=3).rax == 0
        value = hashlib.sha384(value + b"\1" * 48).digest()
        assert rtmr(td, 3) == value
    assert rtmr(td, 0) == bytes(48)


@pytest.mark.parametrize("gpa", [0x4000_0000, 0x7FFF_FFFF_F000])
def test_an_operand_that_nothing_maps_is_an_ept_violation(td, gpa):
    host = enter(td, tdcall(T.MR_RTMR_EXTEND, rcx=gpa, rdx=9)).host
    assert (host.rax, host.r8) == (R.EPT_VIOLATION, gpa)
    # Nothing of the TDCALL has happened: the guest stands before it.
    entry = enter(td).entry
    assert (entry.rip, entry.regs.rax) == (0x1000, T.MR_RTMR_EXTEND)


# --- TDG.MR.REPORT and VERIFYREPORT
@pytest.mark.parametrize(
    ("operands", "operand"),
    [({"rcx": DATA + 512, "rdx": 1, "r8": 1}, Operand.RCX), ({"rcx": DATA, "rdx": DATA + 32, "r8": 1}, Operand.RDX),
     ({"rcx": BEYOND, "rdx": BEYOND, "r8": 1}, Operand.RDX), ({"rcx": BEYOND, "rdx": DATA, "r8": 1}, Operand.R8),
     ({"rcx": BEYOND, "rdx": DATA}, Operand.RCX)],
)  # fmt: skip
def test_mr_report_refusals_in_order(td, operands, operand):
    refused(td, Status.OPERAND_INVALID, operand, T.MR_REPORT, **operands)


def test_a_report_verifies_and_every_bit_of_its_head_counts():
    td = build(Machine())
    body = report(td)
    assert body[0] == 0x81
    assert body[128:192] == b"\3" * 64
    assert hashlib.sha384(body[512:]).digest() == body[80:128]
    page = find_page(td, DATA + 0x1000)
    memory = td.machine.platform.memory
    assert call(td, T.MR_VERIFYREPORT, rcx=DATA + 0x1000).rax == 0
    for bit in range(0, 256 * 8, 37):
        forged = bytearray(body[:256])
        forged[bit // 8] ^= 1 << bit % 8
        memory.write(page, bytes(forged), seam=True)
        assert call(td, T.MR_VERIFYREPORT, rcx=DATA + 0x1000).rax & ~0xFFFF_FFFF in (
            Status.INVALID_REPORTMACSTRUCT,
            Status.INVALID_CPUSVN,
        )


@pytest.mark.parametrize("rcx", [DATA + 128, BEYOND, SHARED | DATA])
def test_verifyreport_refusals(td, rcx):
    refused(td, Status.OPERAND_INVALID, Operand.RCX, T.MR_VERIFYREPORT, rcx=rcx)


# --- the host's own tables as memory operands
def shared_ept(td: Td, page: int) -> None:
    """One shared page of the host at SHARED | 0x5000, behind three levels of tables at HOST + 0x10000."""
    m = td.machine
    base = HOST + 0x10000
    for level in range(3):
        table = base + 0x1000 * level
        m.host_write(table, bytes(4096))
        m.host_write(
            table + 8 * ((SHARED | 0x5000) >> (39 - 9 * level) & 511), (table + 0x1000 | 7).to_bytes(8, "little")
        )
    m.host_write(base + 0x3000, bytes(4096))
    m.host_write(base + 0x3000 + 5 * 8, (page | 0x37).to_bytes(8, "little"))
    field = next(row for row in fields.table("vmcs").fields if row.vmcs_encoding == vmcs.SHARED_EPTP)
    m.ok(Leaf.VP_WR, rcx=td.vcpu_pages[0], rdx=field.field_id, r8=base, r9=U64)


def test_a_report_can_go_to_shared_memory(machine):
    td = build(machine)
    page = HOST + 0x20000
    shared_ept(td, page)
    machine.host_write(page + 0x800, b"\x42" * 64)
    assert call(td, T.MR_REPORT, rcx=SHARED | 0x5000, rdx=SHARED | 0x5800, r8=0).rax == 0
    body = machine.lps[0].read(page, 1024)
    assert body[0] == 0x81
    assert body[128:192] == b"\x42" * 64


@pytest.mark.parametrize(
    ("entry", "reason"),
    [(0, R.EPT_VIOLATION), (1 << 63, R.EPT_VIOLATION), (HOST + 0x20000 | 1 | 0x30 | 1 << 63, R.EPT_VIOLATION),
     (HOST + 0x20000 | 2, R.EPT_MISCONFIGURATION), (HOST + 0x20000 | 7 | 2 << 3, R.EPT_MISCONFIGURATION),
     (1 << 51 | 0x37, R.EPT_MISCONFIGURATION), (0x100_0000 | 33 << 46 | 0x37, R.EPT_MISCONFIGURATION)],
)  # fmt: skip
def test_a_bad_shared_mapping_is_the_hosts_business(machine, entry, reason):
    """Not present, read-only, write without read, reserved memory type, no such memory, a private KeyID."""
    td = build(machine)
    shared_ept(td, HOST + 0x20000)
    machine.host_write(HOST + 0x13000 + 5 * 8, entry.to_bytes(8, "little"))
    result = enter(td, tdcall(T.MR_REPORT, rcx=SHARED | 0x5000, rdx=DATA, r8=0))
    if entry == 0:  # #VE is not suppressed: the guest's handler gets it
        assert result.seen[0].vector == 20
        return
    assert (result.host.rax, result.host.r8) == (reason, SHARED | 0x5000)


def test_gp_is_what_real_mode_software_gets(td):
    exit_ = tdcall(T.VP_INFO)
    exit_.fields[vmcs.EFER] = 0
    assert enter(td, exit_).seen[0].vector == GP


def test_the_recoverability_hint_is_refused_after_an_interrupt(td):
    """It is about a TDCALL that needs the host's help, and an interrupt is none."""
    enter(td, interrupt())
    result = enter(td, rcx=td.vcpu_pages[0] | HINT)
    assert status(result.host.rax) == (Status.OPERAND_INVALID, Operand.RCX)
