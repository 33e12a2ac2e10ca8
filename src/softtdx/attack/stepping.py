"""Side channels of a host that interrupts and unmaps: single steps, zero steps, the trace of pages.

The instruments are the laboratory's: a counter of exits, and a probe that sees a register with noise each time the
processor tries an instruction.
"""

import random
from collections.abc import Callable
from statistics import fmean

from softtdx.abi.exits import ExitReason
from softtdx.abi.fields import table
from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.leaves import TdcallLeaf
from softtdx.abi.vmcs import EXIT_REASON, GUEST_PHYSICAL_ADDRESS
from softtdx.attack.lab import Observation, Outcome, attack
from softtdx.attack.scene import PAGE, SECRET, SPARE_GPA, Scene, Seen, Victim
from softtdx.hw import LogicalProcessor
from softtdx.vmm.python_guest import VeError

__all__: list[str] = []

_ORDINARY = "an ordinary VM, which the host may step as it likes"
_KEY_SIZE = 16
_KEY = int.from_bytes(SECRET[:_KEY_SIZE], "little")
_BITS = 8 * _KEY_SIZE
_CODE = SPARE_GPA
_TABLE = SPARE_GPA + 0x10_000  # 16 pages
_STEP = bytes.fromhex("eb00")  # jmp to the next instruction
_SHORT, _LONG, _VERY_LONG = 1, 4, 400  # instructions of the guest's paths
_REPLAYS = 400
_NOISE = 2.0  # of the probe, where a bit of the register is 0 or 1
_INTERRUPTS = frozenset({ExitReason.EXTERNAL_INTERRUPT, ExitReason.EXCEPTION_OR_NMI})


def _reason(scene: Scene, victim: Victim, lp: LogicalProcessor) -> int:
    """The basic exit reason that the host sees."""
    rax = victim.tdx_vcpu().regs.rax if scene.is_td else lp.core.vmread(EXIT_REASON)
    return rax & 0xFFFF


def _count_exits(scene: Scene, interrupt: Callable[[LogicalProcessor], None], longer: int = _LONG) -> Observation:
    """Between two hypercalls the guest takes a short or a long path by a bit of its key; the host interrupts it.

    `interrupt` is called before each entry. The host counts how often it gets the guest back before the hypercall.
    """
    counts: list[int] = []

    def act(victim: Victim) -> Seen:
        ops, td = victim.machine.vcpus[0].ops, victim.td
        enter, answer = ops.run, ops.handle_exit
        victim.touch(_CODE)
        short, long = (_STEP * n + td.escape for n in (_SHORT, longer))
        td.write(_CODE, short.ljust(64, b"\xcc") + long)

        def run(lp: LogicalProcessor) -> None:
            interrupt(lp)
            enter(lp)

        def handle_exit(lp: LogicalProcessor) -> bool:
            if _reason(scene, victim, lp) in _INTERRUPTS:
                counts[-1] += 1
                lp.acknowledge_interrupt()
                return True
            counts.append(0)
            return answer(lp)

        counts.append(0)
        ops.run, ops.handle_exit = run, handle_exit  # type: ignore[method-assign]
        victim.leave()
        for bit in range(_BITS):
            td.execute(_CODE + 64 * (_KEY >> bit & 1))
            victim.leave()
        del ops.run, ops.handle_exit
        td.processor.core.set_host_timer(None)
        seen = counts[1 : _BITS + 1]
        between = (min(seen) + max(seen)) / 2
        key = sum((count > between) << bit for bit, count in enumerate(seen))
        return Seen(key.to_bytes(_KEY_SIZE, "little"), f"{sum(seen)} exits, {min(seen)} to {max(seen)} a key bit")

    return scene.under_attack(act)


def _after_one_instruction(lp: LogicalProcessor) -> None:
    lp.core.set_host_timer(lp.core.rdtsc() + 1)


@attack(
    "interrupt-storm",
    "control",
    title="The host interrupts the guest after each instruction and counts",
    promise="An interrupt after one instruction is held back for a random number of instructions, 1 to 32.",
    expected=Outcome.STOPPED,
    unprotected=_ORDINARY,
)
def interrupt_storm(scene: Scene) -> Observation:
    """The processor's timer fires one instruction after each entry. The number of exits is that of instructions.

    The guest executes three instructions more for a one of its key than for a zero.
    """
    return _count_exits(scene, _after_one_instruction)


@attack(
    "coarse-step",
    "control",
    title="The host counts interrupts where the guest's paths differ by hundreds of instructions",
    promise="None: interrupts held back for 1 to 32 instructions blur short paths, not long ones.",
    expected=Outcome.LEAKED,
    unprotected=_ORDINARY,
)
def coarse_step(scene: Scene) -> Observation:
    """The same as `interrupt-storm`, to a guest that executes hundreds of instructions more for a one of its key.

    A limit of the real scheme: how long a TD takes between two exits, in time or in exits, is for the host to see.
    """
    return _count_exits(scene, _after_one_instruction, _VERY_LONG)


@attack(
    "nmi-storm",
    "control",
    title="The host sends an NMI at each entry and traces the guest",
    promise="An NMI is treated as an interrupt is: held back for a random number of instructions; no RIP is shown.",
    expected=Outcome.STOPPED,
    unprotected=_ORDINARY,
)
def nmi_storm(scene: Scene) -> Observation:
    """An NMI waits at each entry, and the timer one instruction behind it. The guest gets on all the same."""
    odd = False

    def interrupt(lp: LogicalProcessor) -> None:
        nonlocal odd
        odd = not odd
        if odd:
            lp.core.set_host_timer(lp.core.rdtsc() + 1)
        else:
            lp.nmi()

    return _count_exits(scene, interrupt)


def _take_away(scene: Scene, victim: Victim, page: int) -> None:
    """The host unmaps a page, so that the next access is an EPT violation."""
    if scene.is_td:
        tdr = victim.tdx().require_tdr()
        scene.seamcall(Leaf.MEM_RANGE_BLOCK, rcx=page, rdx=tdr)
        scene.seamcall(Leaf.MEM_TRACK, rcx=tdr)
        victim.leave()
        return
    ept = victim.machine.vm.ept
    assert ept is not None
    ept.unmap(page, page + PAGE)
    victim.flush()


def _give_back(scene: Scene, victim: Victim, page: int) -> None:
    if scene.is_td:
        scene.seamcall(Leaf.MEM_RANGE_UNBLOCK, rcx=page, rdx=victim.tdx().require_tdr())
        return
    ept = victim.machine.vm.ept
    assert ept is not None
    ept.map(page, victim.pa(page))


def _replay_access(scene: Scene, victim: Victim, access: Callable[[], object]) -> tuple[bytes, str]:
    """The guest's `access` to a page that was taken away is tried again and again, and each try is looked at.

    Returns what the probe made of the key in XMM0, and how often it looked. The page is given back in the end.
    """
    ops = victim.machine.vcpus[0].ops
    enter, answer = ops.run, ops.handle_exit
    looks: list[list[float]] = []
    noise = random.Random(7)
    before = entered = 0

    def run(lp: LogicalProcessor) -> None:
        nonlocal before
        before = lp.core.counters()["exits"]
        enter(lp)

    def handle_exit(lp: LogicalProcessor) -> bool:
        nonlocal entered
        if _reason(scene, victim, lp) != ExitReason.EPT_VIOLATION:
            return answer(lp)
        if entered == _REPLAYS:
            _give_back(scene, victim, _TABLE)
            return True
        entered += 1
        if lp.core.counters()["exits"] > before:  # the processor was in the guest, and tried the instruction
            looks.append([(_KEY >> bit & 1) + noise.gauss(0, _NOISE) for bit in range(_BITS)])
        return True

    victim.td.processor.core.set_xmm(0, _KEY)
    ops.run, ops.handle_exit = run, handle_exit  # type: ignore[method-assign]
    try:
        access()
    finally:
        del ops.run, ops.handle_exit
    averages = [fmean(look[bit] for look in looks) for bit in range(_BITS)]
    key = sum((average > 1 / 2) << bit for bit, average in enumerate(averages))
    return key.to_bytes(_KEY_SIZE, "little"), f"{len(looks)} looks in {entered} entries"


@attack(
    "zero-step",
    "control",
    title="The host has the guest try one instruction over and over",
    promise="After six EPT violations at one RIP the vCPU is not entered any more until the page is mapped.",
    expected=Outcome.STOPPED,
    unprotected=_ORDINARY,
)
def zero_step(scene: Scene) -> Observation:
    """The guest holds a key in XMM0 when it touches a page that the host took away. The host enters it again and again.

    Each try gives a probe (power, electromagnetic emanation) one more look at the key, in noise twice as strong as the
    difference of a bit. Hundreds of looks average the noise out, seven do not.
    """

    def act(victim: Victim) -> Seen:
        victim.touch(_TABLE)
        _take_away(scene, victim, _TABLE)
        return Seen(*_replay_access(scene, victim, lambda: victim.td.load(_TABLE)))

    return scene.under_attack(act)


@attack(
    "zero-step-notified",
    "control",
    title="The same to a guest that wants to be told",
    promise="With NOTIFY_ENABLES the TD gets a #VE before it goes on, and can give up the key that was looked at.",
    expected=Outcome.DETECTED,
    unprotected=_ORDINARY,
)
def zero_step_notified(scene: Scene) -> Observation:
    """Seven looks at each access add up, over many accesses. A TD that set NOTIFY_ENABLES learns of the first seven."""
    told = ""

    def act(victim: Victim) -> Seen:
        nonlocal told
        td = victim.td
        victim.touch(_TABLE)
        if td.is_td:
            field = table("td")["NOTIFY_ENABLES"].field_id
            assert td.tdcall(TdcallLeaf.VM_WR, rdx=field, r8=1, r9=1).rax == 0
        _take_away(scene, victim, _TABLE)
        try:
            return Seen(*_replay_access(scene, victim, lambda: td.load(_TABLE)))
        except VeError:
            info = td.ve_info()
            told = f"#VE for exit reason {info.rcx & 0xFFFF} at GPA {info.r9:#x}: the guest uses its key no more"
        return Seen(note=told)

    seen = scene.under_attack(act)
    return Observation(Outcome.DETECTED, told) if told and not seen.outcome.attacker_won else seen


@attack(
    "page-trace",
    "control",
    title="The host takes pages away and sees which of them the guest touches",
    promise="None: an EPT violation of a TD names the page. Code with secrets must touch the same pages always.",
    expected=Outcome.LEAKED,
    unprotected=_ORDINARY,
)
def page_trace(scene: Scene) -> Observation:
    """The guest looks up a table of 16 pages by four bits of its key at a time, as careless code does.

    The host blocks the pages before each look-up, and gives back the one that the EPT violation names: a controlled
    channel. A limit of the real scheme: only repeated faults at one instruction are noticed (`zero-step`).
    """
    touched: list[int] = []
    pages = range(_TABLE, _TABLE + 16 * PAGE, PAGE)

    def act(victim: Victim) -> Seen:
        ops, td = victim.machine.vcpus[0].ops, victim.td
        answer = ops.handle_exit
        for page in pages:
            victim.touch(page)
        places = [victim.pa(page) for page in pages]
        tdr = victim.tdx().require_tdr() if scene.is_td else 0
        ept = victim.machine.vm.ept
        assert ept is not None

        def handle_exit(lp: LogicalProcessor) -> bool:
            if _reason(scene, victim, lp) != ExitReason.EPT_VIOLATION:
                take_away()
                return answer(lp)
            gpa = victim.tdx_vcpu().regs.r8 if scene.is_td else lp.core.vmread(GUEST_PHYSICAL_ADDRESS)
            page = gpa & -PAGE
            if page not in pages:
                return answer(lp)
            touched.append(page)
            if scene.is_td:
                scene.seamcall(Leaf.MEM_RANGE_UNBLOCK, rcx=page, rdx=tdr)
            else:
                ept.map(page, places[pages.index(page)])
            return True

        def take_away() -> None:
            if scene.is_td:
                for page in pages:
                    scene.seamcall(Leaf.MEM_RANGE_BLOCK, rcx=page, rdx=tdr)
                scene.seamcall(Leaf.MEM_TRACK, rcx=tdr)
            else:
                ept.unmap(pages.start, pages.stop)
                victim.flush()

        ops.handle_exit = handle_exit  # type: ignore[method-assign]
        for shift in range(0, _BITS, 4):
            victim.leave()
            td.load(pages[_KEY >> shift & 15])
        ops.handle_exit = answer  # type: ignore[method-assign]
        for page in pages if scene.is_td else ():
            scene.seamcall(Leaf.MEM_RANGE_UNBLOCK, rcx=page, rdx=tdr)
        key = sum(pages.index(page) << 4 * i for i, page in enumerate(touched)) & (1 << _BITS) - 1
        return Seen(key.to_bytes(_KEY_SIZE, "little"), f"{len(touched)} pages were seen")

    return scene.under_attack(act)
