"""Attacks with events: interrupts and exceptions of every class that never happened, and the #VE information."""

from softtdx.abi import vmcs
from softtdx.abi.exits import ExitReason
from softtdx.abi.fields import table
from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.msrs import Msr
from softtdx.abi.status import Status, status_of
from softtdx.attack.lab import Observation, Outcome, attack
from softtdx.attack.scene import LINE, PAGE, SECRET_GPA, SPARE_GPA, Scene, Seen, Victim
from softtdx.hw import LogicalProcessor
from softtdx.vmm.python_guest import VeError

__all__: list[str] = []

_INJECTS = "an ordinary VM, whose host sets the VM-entry interruption information"
_U64 = (1 << 64) - 1
_VALID, _ERROR_CODE = 1 << 31, 1 << 11
_EXTERNAL, _NMI, _HARDWARE, _SOFTWARE, _PRIVILEGED, _TRAP = 0, 2, 3, 4, 5, 6  # interruption types
_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17})
_IF = 1 << 9
_INT_LENGTH = 2  # of INT n

_IDT, _POINTER = SPARE_GPA, SPARE_GPA + 0x3000
_STUBS, _STUB_SIZE = SPARE_GPA + PAGE, 16
_LIDT, _TAKE_INTERRUPTS = _POINTER + 0x40, _POINTER + 0x80
_GATE, _CODE_SELECTOR = 0x8E00, 0x10
_HANDLED = 0xFFFF_FFFF  # RSI, where it was 0 before
_SYSTEM_CALL = 0x80
_EXCEPTIONS = 31  # vectors that are, or may become, exceptions
_MSI = 0xFEE0_0000
_PARAVIRT_MSR = 0x4B56_4D00  # nobody has it: a #VE in a TD


def _classes() -> list[tuple[int, int]]:
    """(type, vector) of every event that the field can name and a processor takes in 64-bit mode."""
    return [
        *((_EXTERNAL, vector) for vector in range(256)),
        (_NMI, 2),
        *((_HARDWARE, vector) for vector in range(32) if vector != 2),
        *((_SOFTWARE, vector) for vector in range(256)),
        (_PRIVILEGED, 1),
        (_TRAP, 3),
    ]


def _gate(handler: int) -> bytes:
    words = (handler & 0xFFFF, _CODE_SELECTOR, _GATE, handler >> 16 & 0xFFFF)
    return b"".join(word.to_bytes(2, "little") for word in words) + (handler >> 32).to_bytes(8, "little")


def _install_handlers(victim: Victim) -> None:
    """An IDT of 256 gates: the handler of vector n gives control back with RAX = n, and ESI inverted."""
    td = victim.td
    for page in range(_IDT, _POINTER + PAGE, PAGE):
        victim.touch(page)
    gates, stubs = b"", b""
    for vector in range(256):
        gates += _gate(_STUBS + vector * _STUB_SIZE)
        stub = b"\xb8" + vector.to_bytes(4, "little") + b"\xf7\xd6" + td.escape  # mov eax, vector; not esi
        stubs += stub.ljust(_STUB_SIZE, b"\xcc")
    td.write(_IDT, gates)
    td.write(_STUBS, stubs)
    td.write(_POINTER, (PAGE - 1).to_bytes(2, "little") + _IDT.to_bytes(8, "little"))
    td.write(_LIDT, b"\x0f\x01\x1f" + td.escape)  # lidt [rdi]
    td.write(_TAKE_INTERRUPTS, b"\xfb\x90\x90\xfa\x31\xc0" + td.escape)  # sti; nop; nop; cli; xor eax, eax
    td.execute(_LIDT, rdi=_POINTER)


@attack(
    "inject-every-class",
    "control",
    title="The host injects every event that there is",
    promise="Nothing but posted interrupts and a pending NMI: the injection fields are METADATA_FIELD_NOT_WRITABLE.",
    expected=Outcome.STOPPED,
    unprotected=_INJECTS,
)
def inject_every_class(scene: Scene) -> Observation:
    """External interrupts and INT n of every vector, NMI, every exception, INT1 and INT3, one at each exit.

    A guest takes what its handlers are told for true: that a page faulted, that a user asked for a system call.
    """
    statuses: set[Status] = set()

    def act(victim: Victim) -> Seen:
        td, believed, events = victim.td, 0, _classes()
        _install_handlers(victim)
        for kind, vector in events:
            event = _VALID | kind << 8 | vector
            if kind == _HARDWARE and vector in _WITH_ERROR_CODE:
                event |= _ERROR_CODE

            def inject(lp: LogicalProcessor, event: int = event) -> None:
                if scene.is_td:
                    field = table("vmcs")["VM-entry interruption information"].field_id
                    regs = scene.seamcall(Leaf.VP_WR, rcx=victim.tdvpr(), rdx=field, r8=event, r9=_U64)
                    statuses.add(status_of(regs.rax))
                    return
                core = lp.core
                core.vmwrite(vmcs.ENTRY_INTERRUPTION_INFO, event)
                core.vmwrite(vmcs.ENTRY_EXCEPTION_ERROR_CODE, 0)
                core.vmwrite(vmcs.ENTRY_INSTRUCTION_LENGTH, _INT_LENGTH)
                core.vmwrite(vmcs.GUEST_RFLAGS, core.vmread(vmcs.GUEST_RFLAGS) | _IF)
                core.vmwrite(vmcs.GUEST_INTERRUPTIBILITY, 0)

            regs = victim.outside(inject, rsi=0)
            believed += (regs.rax, regs.rsi) == (vector, _HANDLED)
        if believed:
            assert believed == len(events), f"{believed} of {len(events)} events were taken"
            td.store(SECRET_GPA, 0)
        said = ", ".join(f"TDH.VP.WR: {status.name}" for status in statuses)
        return Seen(note=f"{len(events)} events tried, {believed} believed; {said}".rstrip("; "))

    return scene.under_attack(act)


@attack(
    "fake-system-call",
    "control",
    title="The host injects INT 80h, as if the guest's user had asked for a system call",
    promise="A posted interrupt shows in the virtual APIC's ISR, which is the module's: the guest can tell it apart.",
    expected=Outcome.STOPPED,
    unprotected=_INJECTS,
)
def fake_system_call(scene: Scene) -> Observation:
    """The guest's handler of vector 80h does what RAX says, with the guest's highest rights (CVE-2024-25744, Heckler).

    In a TD the host can only post the interrupt. A handler that looks into the ISR first, as Linux does since, sees
    that it came from outside. In an ordinary VM the host injects the software interrupt itself.
    """

    def act(victim: Victim) -> Seen:
        td = victim.td
        _install_handlers(victim)

        def inject(lp: LogicalProcessor) -> None:
            if scene.is_td:
                assert victim.machine.vm.signal_msi(_MSI, _SYSTEM_CALL)
                return
            lp.core.vmwrite(vmcs.ENTRY_INTERRUPTION_INFO, _VALID | _SOFTWARE << 8 | _SYSTEM_CALL)
            lp.core.vmwrite(vmcs.ENTRY_INSTRUCTION_LENGTH, _INT_LENGTH)

        regs = victim.outside(inject, rsi=0)
        if scene.is_td:
            regs = td.execute(_TAKE_INTERRUPTS, rsi=0)
        assert (regs.rax, regs.rsi) == (_SYSTEM_CALL, _HANDLED), "the handler never ran"
        if td.rdmsr(Msr.X2APIC_ISR0 + _SYSTEM_CALL // 32) >> _SYSTEM_CALL % 32 & 1:
            td.wrmsr(Msr.X2APIC_EOI, 0)
            return Seen(note="the handler ran, and saw in the ISR that an interrupt had come from outside")
        td.store(SECRET_GPA, 0)
        return Seen(note="the handler took it for a system call")

    return scene.under_attack(act, interrupts=True)


@attack(
    "post-exceptions",
    "control",
    title="The host posts interrupts with the vectors of exceptions",
    promise="In SEAM non-root mode the processor drops what is posted with vectors 0 to 30.",
    expected=Outcome.STOPPED,
    unprotected="an ordinary VM, where a posted interrupt may have any vector from 16 on",
)
def post_exceptions(scene: Scene) -> Observation:
    """The host sets the bits of vectors 0 to 30 in the posted-interrupt descriptor: #MC, #CP, #VE that never happened.

    The guest takes interrupts; what it takes by such a vector it believes to be an exception.
    """

    def act(victim: Victim) -> Seen:
        td, believed = victim.td, []
        _install_handlers(victim)
        apic = victim.machine.vcpus[0].apic
        assert apic is not None
        for vector in range(_EXCEPTIONS):
            victim.outside(lambda _, vector=vector: apic.post(vector))  # type: ignore[misc]
            regs = td.execute(_TAKE_INTERRUPTS, rsi=0)
            if regs.rsi == _HANDLED:
                believed.append(regs.rax)
                td.wrmsr(Msr.X2APIC_EOI, 0)
        victim.outside(lambda _: apic.post(_EXCEPTIONS))
        regs = td.execute(_TAKE_INTERRUPTS, rsi=0)
        assert (regs.rax, regs.rsi) == (_EXCEPTIONS, _HANDLED), "the first vector that may be posted does not arrive"
        if believed:
            td.store(SECRET_GPA, 0)
        return Seen(note=f"{len(believed)} of {_EXCEPTIONS} vectors arrived, and then vector {_EXCEPTIONS}")

    return scene.under_attack(act, interrupts=True)


@attack(
    "ve-info",
    "control",
    title="The host rewrites what the guest is told of its #VE",
    promise="The #VE information lies in the TDVPS, which is private memory: machine check when the TD asks for it.",
    expected=Outcome.DETECTED,
    unprotected="a TD on a platform whose memory has no integrity, neither MACs nor TD-owner bits",
)
def ve_info(scene: Scene) -> Observation:
    """The guest's #VE handler does what TDG.VP.VEINFO.GET says. The host puts back the line of an earlier #VE.

    The guest wrote an MSR that matters; it is told that it executed CPUID, and so the write is never made.
    """
    scene.bare_td = True

    def act(victim: Victim) -> Seen:
        td = victim.td
        line = victim.tdvpr()
        try:
            td.cpuid(0x4000_0001)
        except VeError:
            old = scene.memory.read(line, LINE)
            assert td.ve_info().rcx & 0xFFFF == ExitReason.CPUID
        try:
            td.wrmsr(_PARAVIRT_MSR, 1)
        except VeError:
            scene.memory.write(line, old)
            reason = td.ve_info().rcx & 0xFFFF
            if reason != ExitReason.WRMSR:
                td.store(SECRET_GPA, 0)
            return Seen(note=f"the guest was told of exit reason {reason}")
        return Seen(note="there was no #VE")

    return scene.under_attack(act)
