"""What a TD finds after each VM exit that the module handles by itself (TDX Module Base Spec, "VM Exit Handling")."""

import pytest
from guest_script import GP, PF, RIP, UD, VE, Exit, Run, interrupt, one, run, tdcall
from tdx_machine import ATTRIBUTES_DEBUG, BUFFER, HOST, Leaf, Machine, Td, status

from softtdx.abi import fields
from softtdx.abi.exits import ExitReason as R
from softtdx.abi.exits import VeCategory
from softtdx.abi.leaves import TdcallLeaf
from softtdx.abi.msrs import Msr, policies
from softtdx.abi.status import Status
from softtdx.abi.structs import TdCtls, TdParams
from softtdx.hw import Registers
from softtdx.module import vmcs

NEXT, AGAIN = "next", "again"
PERFMON = 1 << 63
SEPT_VE_DISABLE = 1 << 28
SHARED = 1 << 47


def build(machine: Machine, *, attributes: int = SEPT_VE_DISABLE, xfam: int = 3, config_flags: int = 0) -> Td:
    """A TD that can run, its one vCPU with an x2APIC ID."""
    params = TdParams()
    params.attributes, params.xfam, params.config_flags = attributes, xfam, config_flags
    params.max_vcpus, params.eptp_controls, params.tsc_frequency = 1, 6 | 3 << 3, 100
    td = Td.create(machine, params=bytes(params))
    tdvpr = machine.page()
    td.vcpu_pages.append(tdvpr)
    machine.ok(Leaf.VP_CREATE, rcx=tdvpr, rdx=td.tdr)
    for _ in range(5):
        machine.ok(Leaf.VP_ADDCX, rcx=machine.page(), rdx=tdvpr)
    machine.ok(Leaf.VP_INIT, version=1, rcx=tdvpr, rdx=0, r8=7)
    machine.ok(Leaf.MR_FINALIZE, rcx=td.tdr)
    return td


def enter(td: Td, *exits: Exit, look=(), **host) -> Run:
    return run(td.machine.lps[0], td.vcpu_pages[0], *exits, look=look, **host)


def after(td: Td, exit_: Exit, look=()):
    return one(td.machine.lps[0], td.vcpu_pages[0], exit_, look)


def td_field(name: str) -> int:
    """The field id of a TD-scope field."""
    return next(row for row in fields.table("td").fields if row.name == name).field_id


def set_td_field(td: Td, name: str, bits: int) -> None:
    """TDG.VM.WR by the guest: these bits."""
    seen = enter(td, tdcall(TdcallLeaf.VM_WR, rdx=td_field(name), r8=bits, r9=bits)).seen[0]
    assert seen.regs.rax == 0, f"TDG.VM.WR {name}: {seen.regs.rax:#x}"


VEINFO = tdcall(TdcallLeaf.VP_VEINFO_GET, version=1)


def ve_of(td: Td, exit_: Exit):
    """The #VE that an exit causes: (exit reason, category, qualification, GLA, GPA)."""
    result = enter(td, exit_, VEINFO)
    assert result.seen[0].vector == VE, result.seen[0]
    regs = result.seen[1].regs
    assert regs.rax == 0
    return regs.rcx & 0xFFFF_FFFF, regs.rcx >> 32, regs.rdx, regs.r8, regs.r9


@pytest.fixture(scope="module")
def plain():
    return build(Machine())


@pytest.fixture(scope="module")
def debug():
    return build(Machine(), attributes=ATTRIBUTES_DEBUG | SEPT_VE_DISABLE)


@pytest.fixture(scope="module")
def reduced():
    """A TD that asked for reduced #VE."""
    td = build(Machine())
    set_td_field(td, "TD_CTLS", TdCtls.REDUCE_VE)
    return td


# --- instructions
@pytest.mark.parametrize("reason", [R.IO_INSTRUCTION, R.HLT, R.INVD, R.VMCALL, R.WBINVD, R.APIC_WRITE])
def test_paravirtualised_instructions_give_ve_with_what_the_processor_said(plain, reason):
    exit_ = Exit(reason, fields={vmcs.EXIT_QUALIFICATION: 0x1234_5678})
    assert ve_of(plain, exit_) == (reason, VeCategory.PARAVIRT, 0x1234_5678, 0, 0)


@pytest.mark.parametrize(
    "reason",
    [R.GETSEC, R.RSM, R.VMCLEAR, R.VMLAUNCH, R.VMPTRLD, R.VMPTRST, R.VMREAD, R.VMRESUME, R.VMWRITE, R.VMXOFF, R.VMXON,
     R.INVEPT, R.INVVPID, R.VMFUNC, R.ENCLS, R.ENCLV, R.SEAMCALL, R.MWAIT, R.MONITOR],
)  # fmt: skip
def test_instructions_of_features_that_a_td_has_not_are_undefined(plain, reason):
    seen = after(plain, Exit(reason), look=[vmcs.RFLAGS])
    assert (seen.vector, seen.rip, seen.error) == (UD, RIP, 0)
    assert seen.fields[vmcs.RFLAGS] & 1 << 16  # RF, as a fault sets it


def test_rdpmc_is_a_general_protection_fault_without_perfmon(plain):
    seen = after(plain, Exit(R.RDPMC))
    assert (seen.vector, seen.error) == (GP, 0)


def test_a_second_ve_before_veinfo_get_is_a_double_fault(plain):
    result = enter(plain, Exit(R.HLT), Exit(R.HLT), VEINFO, VEINFO)
    assert [seen.outcome for seen in result.seen] == ["#20", "#8", NEXT, NEXT]
    assert result.seen[2].regs.rax == 0
    assert result.seen[3].regs.rax == Status.NO_VALID_VE_INFO


def test_an_instruction_that_the_module_completed_ends_blocking_by_sti(plain):
    exit_ = Exit(R.CPUID, fields={vmcs.INTERRUPTIBILITY: 1})
    assert after(plain, exit_, look=[vmcs.INTERRUPTIBILITY]).fields[vmcs.INTERRUPTIBILITY] == 0


def test_the_trap_flag_leaves_a_debug_trap_pending_after_an_emulated_instruction(plain):
    exit_ = Exit(R.CPUID, fields={vmcs.RFLAGS: 0x102, vmcs.PENDING_DEBUG: 0})
    assert after(plain, exit_, look=[vmcs.PENDING_DEBUG]).fields[vmcs.PENDING_DEBUG] == 1 << 14


# --- XSETBV
@pytest.mark.parametrize(
    ("xfam", "rcx", "value", "good"),
    [(3, 0, 1, True), (3, 0, 3, True), (3, 0, 0, False), (3, 0, 2, False), (3, 0, 7, False), (3, 1, 1, False),
     (7, 0, 7, True), (7, 0, 5, False), (0xE7, 0, 0xE7, True), (0xE7, 0, 0x27, False), (0xE7, 0, 0xE3, False),
     (0xE7, 0, 7, True), (3, 0, 1 << 63 | 1, False), (3, 0x1_0000_0000, 3, True)],
)  # fmt: skip
def test_xsetbv_follows_xfam(xfam, rcx, value, good):
    td = build(Machine(), xfam=xfam)
    before = after(td, Exit(R.CPUID)).xcr0
    seen = after(td, Exit(R.XSETBV, {"rcx": rcx, "rax": value & 0xFFFF_FFFF, "rdx": value >> 32}))
    assert (seen.outcome, seen.xcr0) == ((NEXT, value) if good else ("#13", before))


# --- control registers
CR0_BASE = 0x8000_0031  # PG NE ET PE
CR4_BASE = 0x2060  # VMXE MCE PAE


def mov_to_cr(number: int, value: int, **state: int) -> Exit:
    where = {"cr0": vmcs.CR0, "cr4": vmcs.CR4, "shadow": vmcs.CR4_READ_SHADOW}
    base = {vmcs.CR0: CR0_BASE, vmcs.CR4: CR4_BASE, vmcs.EXIT_QUALIFICATION: number | 3 << 8}
    return Exit(R.CR_ACCESS, {"rbx": value}, base | {where[name]: bits for name, bits in state.items()})


@pytest.mark.parametrize(
    ("value", "want"),
    [(CR0_BASE | 1 << 16, NEXT), (CR0_BASE | 0xE, NEXT), (CR0_BASE & ~0x8000_0000, NEXT), (0x8000_0020, "#13"),
     (0x20, "#20"), (CR0_BASE | 1 << 30, "#20"), (CR0_BASE | 3 << 29, "#20")],
)  # fmt: skip
def test_mov_to_cr0(plain, value, want):
    result = enter(plain, mov_to_cr(0, value), VEINFO, look=[vmcs.CR0])
    assert result.seen[0].outcome == want
    if want == NEXT:
        assert result.seen[0].fields[vmcs.CR0] == value | 0x10
    if want == "#20":
        assert result.seen[1].regs.rcx == R.CR_ACCESS | VeCategory.UNSUPPORTED_FEATURE << 32


@pytest.mark.parametrize(
    ("value", "want", "category"),
    [(CR4_BASE & ~0x2000, "#20", VeCategory.UNSUPPORTED_FEATURE), (CR4_BASE & ~0x40, "#20",
      VeCategory.CONFIGURABLE_PARAVIRT), (CR4_BASE | 1 << 19, "#13", 0), (CR4_BASE | 1 << 23, "#13", 0),
     (CR4_BASE | 1 << 24, "#13", 0), (CR4_BASE | 1 << 25, "#13", 0), (CR4_BASE | 1 << 22, "#13", 0),
     (CR4_BASE | 1 << 63, "#13", 0)],
)  # fmt: skip
def test_mov_to_cr4_of_what_the_module_owns(plain, value, want, category):
    result = enter(plain, mov_to_cr(4, value), VEINFO)
    assert result.seen[0].outcome == want
    if category:
        assert result.seen[1].regs.rcx == R.CR_ACCESS | category << 32


def test_with_reduced_ve_cr4_mce_is_a_bit_that_the_guest_cannot_set(reduced):
    """CPUID says that there is no MCE; clearing the bit only changes what the guest reads."""
    result = enter(reduced, mov_to_cr(4, CR4_BASE & ~0x40, shadow=0x40), look=[vmcs.CR4_READ_SHADOW, vmcs.CR4])
    assert result.seen[0].outcome == NEXT
    assert result.seen[0].fields == {vmcs.CR4_READ_SHADOW: 0, vmcs.CR4: CR4_BASE}
    assert after(reduced, mov_to_cr(4, CR4_BASE, shadow=0)).outcome == "#13"


def test_lmsw_changes_mp_em_and_ts_only(plain):
    exit_ = Exit(R.CR_ACCESS, fields={vmcs.CR0: CR0_BASE, vmcs.EXIT_QUALIFICATION: 3 << 4 | 0xFFFF << 16})
    assert after(plain, exit_, look=[vmcs.CR0]).fields[vmcs.CR0] == CR0_BASE | 0xE


@pytest.mark.parametrize("qualification", [0 << 4 | 3, 1 << 4 | 3, 0 << 4 | 8, 2 << 4])
def test_cr_accesses_that_no_control_makes_exit_end_the_td(qualification):
    td = build(Machine())
    result = enter(td, Exit(R.CR_ACCESS, fields={vmcs.EXIT_QUALIFICATION: qualification}))
    assert status(result.host.rax) == (Status.NON_RECOVERABLE_TD, R.CR_ACCESS)
    assert result.host.rcx == qualification


# --- MSRs
def msr_exit(msr: int, value: int | None = None) -> Exit:
    if value is None:
        return Exit(R.RDMSR, {"rcx": msr, "rax": 0x5A5A, "rdx": 0xA5A5})
    return Exit(R.WRMSR, {"rcx": msr, "rax": value & 0xFFFF_FFFF, "rdx": value >> 32})


# Rows whose answer is a program: tests of their own below, or none of the two words.
OWN = {
    0x34, 0x3A, 0x4E, 0x79, 0x8B, 0xBD, 0xCE, 0x10A, 0x140, 0x1A0, 0x1D9, 0x345, 0x802, 0xC000_0080, 0xDA0,
    *range(0x186, 0x18E), *range(0x480, 0x493),
}  # fmt: skip
FLAG_IN_DEFAULT_TD = {  # GP_OR_VE_BY_x: whether an unreduced TD keeps the feature
    "EST": False, "TM2": False, "DCA": False, "TSC_DEADLINE": False, "MTRR": True, "MCA": True, "ACPI": False,
    "RDT_M": False, "RDT_A": False, "TME": False, "PCONFIG": False, "CORE_CAPABILITIES": True,
}  # fmt: skip


def exits_always(row, *, write: bool) -> bool:
    return (row.wr_bitmap if write else row.rd_bitmap) == "FIXED_1"


def expected(row, *, write: bool, reduced: bool) -> tuple[str, int]:
    """(outcome, category) by the words of the table."""
    action = row.wr_action if write else row.rd_action
    if action == "VE":
        return "#20", VeCategory.PARAVIRT
    if action == "GP":
        return "#13", 0
    if action in ("GP_OR_VE", "GP_OR_VE_BY_REDUCED_VE", "OTHER"):
        return ("#13", 0) if reduced else ("#20", VeCategory.CONFIGURABLE_PARAVIRT)
    keeps = not reduced and FLAG_IN_DEFAULT_TD[action.removeprefix("GP_OR_VE_BY_")]
    return ("#20", VeCategory.CONFIGURABLE_PARAVIRT) if keeps else ("#13", 0)


@pytest.mark.parametrize("kind", ["plain", "reduced"])
@pytest.mark.parametrize("write", [False, True], ids=["RDMSR", "WRMSR"])
def test_every_row_of_the_msr_table_that_always_exits_does_what_it_says(request, kind, write):
    td = request.getfixturevalue(kind)
    rows = [row for row in policies() if exits_always(row, write=write) and row.first not in OWN]
    assert len(rows) > 250
    exits: list[Exit] = []
    for row in rows:
        exits += [msr_exit(row.first, 0 if write else None), VEINFO, msr_exit(row.last, 0 if write else None), VEINFO]
    seen = enter(td, *exits).seen
    wrong = []
    for number, row in enumerate(rows):
        want, category = expected(row, write=write, reduced=kind == "reduced")
        for msr, faulted, info in ((row.first, *seen[4 * number : 4 * number + 2]),
                                   (row.last, *seen[4 * number + 2 : 4 * number + 4])):  # fmt: skip
            found = faulted.outcome, info.regs.rcx >> 32
            if found != (want, category):
                wrong.append((hex(msr), row.name, found, (want, category)))
            assert (faulted.regs.rax, faulted.regs.rdx) == ((0, 0) if write else (0x5A5A, 0xA5A5))
    assert not wrong


@pytest.mark.parametrize("msr", [0x2000, 0x4000_0000, 0x4B56_4D00, 0xBFFF_FFFF, 0xC000_2000, 0xFFFF_FFFF])
@pytest.mark.parametrize("kind", ["plain", "reduced"])
def test_msrs_beyond_the_bitmaps_are_for_the_ve_handler(request, kind, msr):
    """Hypervisors' own MSRs, too."""
    td = request.getfixturevalue(kind)
    assert ve_of(td, msr_exit(msr))[:2] == (R.RDMSR, VeCategory.PARAVIRT)
    assert ve_of(td, msr_exit(msr, 1))[:2] == (R.WRMSR, VeCategory.PARAVIRT)


@pytest.mark.parametrize("msr", [0x35, 0x1FFF, 0xC000_1FFF])
def test_msrs_that_the_table_does_not_name(plain, reduced, msr):
    assert ve_of(plain, msr_exit(msr))[1] == VeCategory.CONFIGURABLE_PARAVIRT
    assert after(reduced, msr_exit(msr)).outcome == "#13"


@pytest.mark.parametrize(
    ("msr", "value"), [(0x34, 0), (0x3A, 1), (0x4E, 1), (0x8B, 0xFFFF_FFFF), (0xCE, 0), (0x140, 0)]
)
def test_reduced_ve_gives_constants_for_msrs_that_drivers_read(plain, reduced, msr, value):
    assert ve_of(plain, msr_exit(msr))[1] == VeCategory.CONFIGURABLE_PARAVIRT
    seen = after(reduced, msr_exit(msr))
    assert (seen.outcome, seen.regs.rax | seen.regs.rdx << 32) == (NEXT, value)


def test_smi_count_keeps_what_a_reduced_guest_writes(reduced):
    result = enter(reduced, msr_exit(0x34, 0x1_0000_0007), msr_exit(0x34))
    assert result.seen[1].regs.rax | result.seen[1].regs.rdx << 32 == 0x1_0000_0007


def test_the_x2apic_id_is_the_one_that_the_host_named_at_vp_init(plain, reduced):
    assert ve_of(plain, msr_exit(0x802))[1] == VeCategory.CONFIGURABLE_PARAVIRT
    assert after(reduced, msr_exit(0x802)).regs.rax == 7


@pytest.mark.parametrize(
    ("before", "value", "want"),
    [(0x501, 0x500, NEXT), (0x500, 0x501, NEXT), (0x500, 0x100, NEXT), (0x500, 0xD00, "#20"), (0x500, 0x400, "#20"),
     (0x500, 1 << 63 | 0x500, "#20")],
)  # fmt: skip
def test_efer_lets_only_sce_change(plain, before, value, want):
    """LMA is the processor's; LME and NXE are the module's."""
    exit_ = msr_exit(Msr.EFER, value)
    exit_.fields[vmcs.EFER] = before
    result = enter(plain, exit_, VEINFO, look=[vmcs.EFER])
    assert result.seen[0].outcome == want
    assert result.seen[0].fields[vmcs.EFER] == (value | 0x400 if want == NEXT else before)


@pytest.mark.parametrize(
    ("value", "want"),
    [(0, NEXT), (2, NEXT), (1, NEXT), (1 << 3, "#13"), (1 << 6, "#20"), (3 << 6, NEXT), (1 << 14, "#13"),
     (1 << 15, "#13"), (1 << 16, "#13"), (1 << 13, NEXT)],
)  # fmt: skip
def test_debugctl(plain, value, want):
    result = enter(plain, msr_exit(Msr.DEBUGCTL, value), VEINFO, msr_exit(Msr.DEBUGCTL))
    assert result.seen[0].outcome == want
    if want == NEXT:
        assert result.seen[2].regs.rax == value & ~(1 << 13)  # the uncore's bit is the platform's


def test_xss_is_bounded_by_xfam(plain):
    assert after(plain, msr_exit(Msr.XSS, 0)).outcome == NEXT
    for bit in range(64):
        assert after(plain, msr_exit(Msr.XSS, 1 << bit)).outcome == "#13", bit


def test_vmx_capability_msrs_are_read_only_inventions(plain):
    seen = after(plain, msr_exit(Msr.VMX_BASIC))
    assert seen.outcome == NEXT
    assert (seen.regs.rax | seen.regs.rdx << 32) & 0x7FFF_FFFF == 0  # no revision: there is no VMX in a TD
    assert after(plain, msr_exit(Msr.VMX_BASIC, 0)).outcome == "#13"


def test_perfevtsel_is_a_general_protection_fault_without_perfmon(plain):
    assert after(plain, msr_exit(0x186)).outcome == "#13"
    assert after(plain, msr_exit(0x18D, 1)).outcome == "#13"


# --- CPUID
def cpuid(leaf: int, subleaf: int = 0, **state: int) -> Exit:
    return Exit(R.CPUID, {"rax": leaf, "rcx": subleaf} | state)


def regs_of(seen):
    return seen.regs.rax, seen.regs.rbx, seen.regs.rcx, seen.regs.rdx


def test_cpuid_0_is_genuine_intel_and_0x21_is_intel_tdx(plain):
    _, ebx, ecx, edx = regs_of(after(plain, cpuid(0)))
    assert b"".join(r.to_bytes(4, "little") for r in (ebx, edx, ecx)) == b"GenuineIntel"
    _, ebx, ecx, edx = regs_of(after(plain, cpuid(0x21)))
    assert b"".join(r.to_bytes(4, "little") for r in (ebx, edx, ecx)) == b"IntelTDX    "


def test_cpuid_ignores_the_upper_halves_of_its_operands_and_clears_those_of_its_results(plain):
    assert regs_of(after(plain, cpuid(0xFFFF_0000_0000_0000, 0xABCD_0000_0000_0000))) == regs_of(after(plain, cpuid(0)))


@pytest.mark.parametrize("leaf", [0x4000_0000, 0x4000_0001, 0x4FFF_FFFF])
def test_hypervisor_leaves_are_for_the_ve_handler(plain, reduced, leaf):
    for td in (plain, reduced):
        assert ve_of(td, cpuid(leaf))[:2] == (R.CPUID, VeCategory.PARAVIRT)


@pytest.mark.parametrize("leaf", [2, 6, 9, 0xB, 0xF, 0x10, 0x16, 0x17, 0x1B, 0x8000_0002, 0x8000_0004, 0x8000_0005])
def test_leaves_that_an_unreduced_td_cannot_have_virtualised(plain, leaf):
    reason, category, *_ = ve_of(plain, cpuid(leaf))
    assert (reason, category) == (R.CPUID, VeCategory.CONFIGURABLE_PARAVIRT)


@pytest.mark.parametrize("leaf", range(0x24))
def test_a_reduced_td_takes_no_ve_for_any_basic_leaf(reduced, leaf):
    for subleaf in (0, 1, 2, 63, 0xFFFF_FFFF):
        assert after(reduced, cpuid(leaf, subleaf)).outcome == NEXT


def test_cpuid_1_follows_cr4_and_names_the_vcpu(plain, reduced):
    for td, apic_id in ((plain, 0), (reduced, 7)):
        for osxsave in (0, 1 << 18):
            exit_ = cpuid(1)
            exit_.fields[vmcs.CR4] = CR4_BASE | osxsave
            _, ebx, ecx, _ = regs_of(after(td, exit_))
            assert ebx >> 24 == apic_id
            assert ecx >> 27 & 1 == bool(osxsave)


def test_cpuid_7_follows_cr4_pke(plain):
    for pke in (0, 1 << 22):
        exit_ = cpuid(7)
        exit_.fields[vmcs.CR4] = CR4_BASE | pke
        assert regs_of(after(plain, exit_))[2] >> 4 & 1 == bool(pke)


def test_syscall_is_enumerated_in_64_bit_mode_only(plain):
    legacy = cpuid(0x8000_0001)
    legacy.fields |= {vmcs.EFER: 0, vmcs.CS_ACCESS_RIGHTS: 0xC09B}
    assert regs_of(after(plain, legacy))[3] >> 11 & 1 == 0
    assert regs_of(after(plain, cpuid(0x8000_0001)))[3] >> 11 & 1 == 1


def test_leaves_beyond_the_last_are_the_last_basic_leaf(plain, reduced):
    for td in (plain, reduced):
        last = regs_of(after(td, cpuid(0)))[0]
        for leaf in (last + 1, 0x3FFF_FFFF, 0x8000_0009, 0xFFFF_FFFF):
            assert regs_of(after(td, cpuid(leaf))) == regs_of(after(td, cpuid(last)))


def test_cpuidve_set_gives_ve_for_every_leaf_by_privilege(machine):
    td = build(machine)
    user = cpuid(0)
    user.fields[vmcs.SS_ACCESS_RIGHTS] = 0xC0F3
    for control, want in ((0, (NEXT, NEXT)), (1, ("#20", NEXT)), (2, (NEXT, "#20")), (3, ("#20", "#20"))):
        result = enter(td, tdcall(TdcallLeaf.VP_CPUIDVE_SET, rcx=control), cpuid(0), VEINFO, user, VEINFO)
        assert (result.seen[1].outcome, result.seen[3].outcome) == want
    for bit in range(2, 64):
        seen = after(td, tdcall(TdcallLeaf.VP_CPUIDVE_SET, rcx=1 << bit))
        assert status(seen.regs.rax) == (Status.OPERAND_INVALID, 1)


# --- faults and interrupts
def test_an_external_interrupt_leaves_with_its_vector_and_nothing_else(plain):
    marked = interrupt()
    marked.gprs = dict.fromkeys(("rax", "rbx", "rcx", "rdx", "rbp", "rsi", "rdi", "r8", "r15"), 0xDEAD)
    host = enter(plain, marked, rbx=1, rsi=2, r12=3, rbp=4).host
    assert host.rax == R.EXTERNAL_INTERRUPT
    assert host.r9 == 0x8000_0020
    assert all(value == 0 for name, value in host.items() if name not in ("rax", "r9"))


def test_a_triple_fault_disables_the_vcpu_and_not_the_td(machine):
    td = build(machine)
    assert status(enter(td, Exit(R.TRIPLE_FAULT)).host.rax) == (Status.NON_RECOVERABLE_VCPU, R.TRIPLE_FAULT)
    machine.ok(Leaf.MNG_RD, rcx=td.tdr, rdx=td_field("ATTRIBUTES"))


@pytest.mark.parametrize(("reason", "qualification"), [(R.INIT, 0), (R.TASK_SWITCH, 0x28), (R.BUS_LOCK, 0)])
def test_some_exits_are_the_hosts_business_as_they_are(plain, reason, qualification):
    host = enter(plain, Exit(reason, fields={vmcs.EXIT_QUALIFICATION: qualification})).host
    assert (host.rax, host.rcx) == (reason, qualification)


def test_an_unknown_exit_reason_ends_a_td_and_tells_a_debugger(debug):
    td = build(Machine())
    for reason in (37, 51, 57, 61, 78, 0x7FFF):
        if reason == 37:
            continue  # the monitor trap flag belongs to stepping detection
        assert enter(debug, Exit(reason)).host.rax == reason
    assert status(enter(td, Exit(51)).host.rax) == (Status.NON_RECOVERABLE_TD, 51)


def nmi(unblocked_by_iret: int = 0) -> Exit:
    info = 0x8000_0202 | unblocked_by_iret << 12
    return Exit(R.EXCEPTION_OR_NMI, fields={vmcs.EXIT_INTERRUPTION_INFO: info, vmcs.INSTRUCTION_LENGTH: 0})


def test_an_nmi_goes_to_the_host(plain):
    host = enter(plain, nmi()).host
    assert (host.rax, host.r9) == (R.EXCEPTION_OR_NMI, 0x8000_0202)


def test_a_machine_check_in_the_guest_ends_the_td(machine):
    td = build(machine)
    exit_ = Exit(R.EXCEPTION_OR_NMI, fields={vmcs.EXIT_INTERRUPTION_INFO: 0x8000_0312})
    host = enter(td, exit_).host
    assert status(host.rax) == (Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE, R.EXCEPTION_OR_NMI)
    assert machine.call(Leaf.VP_ENTER, rcx=td.vcpu_pages[0]).rax == Status.TD_FATAL
    assert machine.call(Leaf.MNG_RD, rcx=td.tdr, rdx=td_field("ATTRIBUTES")).rax == Status.TD_FATAL


def test_an_event_that_an_exit_interrupted_is_delivered_after_all(plain):
    """An EPT violation on shared memory during the delivery of vector 0x80, software interrupt of length 2."""
    fields_ = {
        vmcs.IDT_VECTORING_INFO: 0x8000_0480,
        vmcs.PHYSICAL_ADDRESS: SHARED | 0x5000,
        vmcs.EXIT_QUALIFICATION: 2,
        vmcs.INSTRUCTION_LENGTH: 2,
    }
    assert enter(plain, Exit(R.EPT_VIOLATION, fields=fields_)).host.rax == R.EPT_VIOLATION
    again = enter(plain, look=[vmcs.ENTRY_INSTRUCTION_LENGTH])
    assert again.entry.event == 0x8000_0480
    assert again.entry.fields[vmcs.ENTRY_INSTRUCTION_LENGTH] == 2


# --- EPT violations
def ept(gpa: int, qualification: int = 0x181) -> Exit:
    return Exit(
        R.EPT_VIOLATION,
        fields={
            vmcs.PHYSICAL_ADDRESS: gpa,
            vmcs.EXIT_QUALIFICATION: qualification,
            vmcs.LINEAR_ADDRESS: 0xABC_D123,
            vmcs.INSTRUCTION_LENGTH: 0,
        },
    )


@pytest.mark.parametrize("gpa", [0x5123, SHARED | 0x5123, SHARED | 0x7FFF_FFFF_F000 | 0xFFF])
def test_an_ept_violation_tells_the_host_the_page_and_the_access_only(plain, gpa):
    host = enter(plain, ept(gpa, 0x181 | 2)).host
    assert (host.rax, host.rcx, host.r8) == (R.EPT_VIOLATION, 3, gpa & ~0xFFF)
    assert all(value == 0 for name, value in host.items() if name not in ("rax", "rcx", "r8"))


def test_a_gpa_with_reserved_bits_is_a_page_fault(plain):
    """48-bit GPAs: bits 51:48 are reserved."""
    for qualification, error in ((0x181, 9), (0x182, 0xB), (0x184, 0x19)):
        seen = after(plain, ept(1 << 48 | 0x1000, qualification))
        assert (seen.vector, seen.error, seen.rip) == (PF, error, RIP)
    user = ept(1 << 50, 0x181)
    user.fields[vmcs.SS_ACCESS_RIGHTS] = 0xC0F3
    assert after(plain, user).error == 0xD


def test_a_pending_page_is_the_guests_or_the_hosts_business_by_td_ctls(machine):
    gpa = 0x4000_0000
    for attributes, wanted in ((SEPT_VE_DISABLE, "host"), (0, "guest")):
        td = build(machine, attributes=attributes)
        td.add_path(gpa)
        td.aug(gpa)
        result = enter(td, ept(gpa | 0x123), VEINFO)
        if wanted == "host":
            assert (result.host.rax, result.host.rdx, result.host.r8) == (R.EPT_VIOLATION, 6, gpa)
        else:
            assert result.seen[0].vector == VE
            regs = result.seen[1].regs
            assert (regs.rcx, regs.r8, regs.r9) == (R.EPT_VIOLATION | 1 << 32, 0xABC_D123, gpa | 0x123)


def test_a_shared_misconfiguration_is_the_hosts(plain):
    exit_ = ept(SHARED | 0x9123)
    exit_.reason = R.EPT_MISCONFIGURATION
    exit_.fields[vmcs.EXIT_REASON] = R.EPT_MISCONFIGURATION
    host = enter(plain, exit_).host
    assert (host.rax, host.rcx, host.r8) == (R.EPT_MISCONFIGURATION, 0, SHARED | 0x9000)


def test_tdcall_outside_64_bit_mode_is_a_general_protection_fault(plain):
    for fields_ in ({vmcs.EFER: 0}, {vmcs.CS_ACCESS_RIGHTS: 0xC09B}):
        exit_ = tdcall(TdcallLeaf.VP_INFO)
        exit_.fields |= fields_
        seen = after(plain, exit_)
        assert (seen.outcome, seen.regs.rax) == ("#13", TdcallLeaf.VP_INFO)


# --- performance monitoring
CYCLES, INSTRUCTIONS, MISSES = 0x003C, 0x00C0, 0x412E
ENABLE = 1 << 22


def perfmon_td(*events: int) -> Td:
    """A TD that may count these events only; all events when there are none."""
    machine = Machine()
    td = Td.create(machine, initialize=False)
    params = TdParams()
    params.attributes, params.xfam, params.max_vcpus = PERFMON | SEPT_VE_DISABLE, 3, 1
    params.eptp_controls, params.tsc_frequency = 6 | 3 << 3, 100
    machine.host_write(BUFFER, bytes(params))
    filters = b"".join((e & 0xFF | e >> 8 << 32 | 0xFFFF << 48).to_bytes(8, "little") for e in sorted(events))
    machine.host_write(HOST + 0x3000, filters.ljust(4096, b"\0"))
    info = HOST + 0x3000 | len(events) if events else 0
    machine.ok(Leaf.MNG_INIT, rcx=td.tdr | bool(events), rdx=BUFFER, r8=info)
    td.finalize()
    return td


def test_a_filtered_event_is_programmed_but_does_not_count():
    td = perfmon_td(CYCLES, INSTRUCTIONS)
    real: list[int] = []
    for event, counts in ((CYCLES, True), (INSTRUCTIONS, True), (MISSES, False), (0x013C, False)):
        wanted = ENABLE | 3 << 16 | event
        read_back = msr_exit(0x187)
        read_back.act = lambda core: real.append(core.rdmsr(0x187))
        # A TD with PERFMON controls its counters, and stepping detection goes by RIP: what follows is let forward.
        seen = enter(td, msr_exit(0x187, wanted), read_back).seen[:2]
        assert [s.outcome for s in seen] == [NEXT, NEXT]
        assert seen[1].regs.rax | seen[1].regs.rdx << 32 == wanted  # the guest sees what it wrote
        assert real.pop() == (wanted if counts else wanted & ~ENABLE)
        # And it is so again after the vCPU was away.
        enter(td, read_back)
        assert real.pop() == (wanted if counts else wanted & ~ENABLE)


def test_a_disabled_counter_may_name_any_event():
    td = perfmon_td(CYCLES)
    assert after(td, msr_exit(0x186, MISSES)).outcome == NEXT


def test_reserved_bits_of_an_event_selector_fault_as_on_the_processor():
    td = perfmon_td(CYCLES)
    for bit in (35, 62, 63):
        assert after(td, msr_exit(0x186, 1 << bit | CYCLES)).outcome == "#13"


def test_the_host_finds_no_counter_of_the_guest():
    td = perfmon_td(CYCLES)
    touched = (0x186, 0xC1, 0x4C1, 0x309, 0x38D)
    exit_ = interrupt()
    exit_.act = lambda core: [core.wrmsr(msr, 0x77) for msr in touched]
    enter(td, exit_)
    core = td.machine.lps[0].core
    assert not any(core.rdmsr(msr) for msr in touched if msr != 0xC1)


# --- a debugger
def vmcs_field(encoding: int) -> int:
    return next(row for row in fields.table("vmcs").fields if row.vmcs_encoding == encoding).field_id


def set_exception_bitmap(td: Td, bits: int) -> None:
    """TDH.VP.WR of the exception bitmap, which the host of a debug TD may write."""
    lp, mask = td.machine.lps[0], (1 << 32) - 1
    where = {"rcx": td.vcpu_pages[0], "rdx": vmcs_field(vmcs.EXCEPTION_BITMAP)}
    assert lp.seamcall(Registers(rax=Leaf.VP_WR, r8=bits, r9=mask, **where)).rax == 0


def test_a_debugger_sees_exceptions_that_the_module_is_about_to_inject():
    td = build(Machine(), attributes=ATTRIBUTES_DEBUG | SEPT_VE_DISABLE)
    set_exception_bitmap(td, 1 << 18 | 1 << UD)
    host = enter(td, Exit(R.GETSEC)).host
    assert (host.rax, host.r9) == (R.EXCEPTION_OR_NMI, 0x8000_0306)
    # It is delivered when the debugger lets the guest go on.
    assert enter(td).entry.vector == UD
    set_exception_bitmap(td, 1 << 18)
    assert after(td, Exit(R.GETSEC)).vector == UD


def test_a_production_tds_exception_bitmap_is_not_the_hosts(plain):
    lp = plain.machine.lps[0]
    regs = Registers(
        rax=Leaf.VP_WR, rcx=plain.vcpu_pages[0], rdx=vmcs_field(vmcs.EXCEPTION_BITMAP), r8=0, r9=(1 << 32) - 1
    )
    assert status(lp.seamcall(regs).rax)[0] == Status.METADATA_FIELD_NOT_WRITABLE


@pytest.mark.parametrize("vector", [1, 3, 13, 14])
def test_a_debug_tds_own_exceptions_are_told_and_kept(debug, vector):
    info = 0x8000_0300 | vector | (1 << 11 if vector in (13, 14) else 0)
    exit_ = Exit(R.EXCEPTION_OR_NMI, fields={vmcs.EXIT_INTERRUPTION_INFO: info})
    host = enter(debug, exit_).host
    assert (host.rax, host.r9) == (R.EXCEPTION_OR_NMI, info)
