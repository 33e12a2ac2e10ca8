"""A guest can make any VM exit with any registers: the module answers, and the host sees what it may and no more."""

from guest_script import Engine, Exit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tdx_machine import Leaf, Machine, Td

from softtdx.abi.exits import ExitReason as R
from softtdx.abi.msrs import policy
from softtdx.abi.status import FATAL, NON_RECOVERABLE, Status
from softtdx.hw import Registers
from softtdx.hw.registers import GPR_NAMES
from softtdx.module import vmcs

U64 = (1 << 64) - 1
SECRET = 0x5EC2_E7C0_DE00_0000  # the guest's registers hold it, with their number
PASSED = {"rax", "rcx", "rdx", "r8", "r9"}
# The processor does not report these of a TD: no misconfigured secure EPT, no MTF but the module's own, no PML.
IMPOSSIBLE = {R.EPT_MISCONFIGURATION, R.MONITOR_TRAP_FLAG, R.PML_FULL, R.TDCALL}
MC = 18
ERROR_VECTORS = {8, 10, 11, 12, 13, 14, 17, 21}

words = st.one_of(st.integers(0, U64), st.sampled_from([0, 1, U64, 1 << 47, 1 << 51, 0xFFFF_FFFF, 0x8000_0000]))


def event(draw_vector: int, kind: int, extra: int) -> int:
    """Interruption information that a processor could have written."""
    vector = 2 if kind == 2 else draw_vector % 32 if kind == 3 else draw_vector
    code = 1 << 11 if kind == 3 and vector in ERROR_VECTORS else 0
    return 1 << 31 | kind << 8 | vector | code | (extra & 1) << 12


def never_exits(msr: int, *, write: bool) -> bool:
    """Whether the MSR bitmaps of every TD let accesses to the MSR through."""
    row = policy(msr)
    return row is not None and (row.wr_action if write else row.rd_action) == "FATAL_ERROR"


@st.composite
def exits(draw):
    """One exit: anything in the registers, anything plausible in the VMCS."""
    reason = draw(st.sampled_from(sorted(set(R) - IMPOSSIBLE)))
    gprs = {name: SECRET | n for n, name in enumerate(GPR_NAMES) if name != "rsp"}
    gprs |= {name: draw(words) for name in ("rax", "rcx", "rdx", "rbx")}
    if reason in (R.RDMSR, R.WRMSR) and never_exits(gprs["rcx"] & 0xFFFF_FFFF, write=reason == R.WRMSR):
        gprs["rcx"] = 0
    fields = {
        vmcs.EXIT_QUALIFICATION: draw(words),
        vmcs.LINEAR_ADDRESS: draw(words),
        vmcs.PHYSICAL_ADDRESS: draw(words) & (1 << 52) - 1,
        vmcs.INSTRUCTION_LENGTH: draw(st.integers(0, 15)),
        vmcs.INSTRUCTION_INFO: draw(words) & 0xFFFF_FFFF,
        vmcs.SS_ACCESS_RIGHTS: 0xC093 | draw(st.integers(0, 3)) << 5,
    }
    if reason == R.EXCEPTION_OR_NMI:
        # The exception bitmap of a TD has one bit: #MC.
        nmi = event(2, 2, draw(st.integers(0, 1)))
        fields[vmcs.EXIT_INTERRUPTION_INFO] = draw(st.sampled_from([nmi, event(MC, 3, 0)]))
    if draw(st.booleans()) and reason in (R.EPT_VIOLATION, R.TASK_SWITCH):
        fields[vmcs.IDT_VECTORING_INFO] = event(draw(st.integers(0, 255)), draw(st.sampled_from([0, 2, 3, 4])), 0)
    return Exit(reason, gprs, fields)


class Victim:
    """A TD to try things on; a new one when it is beyond entering."""

    def __init__(self) -> None:
        self.machine = Machine()
        self._make()

    def _make(self) -> None:
        self.td = Td.create(self.machine)
        self.td.finalize()

    def enter(self, script: list[Exit]) -> Registers:
        lp = self.machine.lps[0]
        lp.guest_engine = Engine(script)
        try:
            return lp.seamcall(Registers(rax=Leaf.VP_ENTER, rcx=self.td.vcpu_pages[0], rbp=0xB0, r12=0x12))
        finally:
            lp.guest_engine = None

    def renew(self) -> None:
        if self.machine.next_hkid > 60:
            self.machine = Machine()
        self._make()


def test_whatever_exits_a_guest_makes_the_module_answers_and_tells_no_secret():
    victim = Victim()

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(script=st.lists(exits(), min_size=1, max_size=6))
    def play(script: list[Exit]) -> None:
        regs = victim.enter(script)
        low, high = regs.rax & 0xFFFF_FFFF, regs.rax & ~0xFFFF_FFFF
        assert low & 0xFFFF in set(R)
        for name, value in regs.items():
            if name not in PASSED:
                assert value == 0, f"{name}={value:#x} after exit {low}"
        assert regs.r8 & 0xFFF == 0
        Status(high)
        if high & (NON_RECOVERABLE | FATAL):
            victim.renew()

    play()
