"""Attacks on the control structures: TDR, TDCS, TDVPS, PAMT, KeyIDs."""

from collections.abc import Callable
from typing import TypeVar

from softtdx.abi import sept, vmcs
from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.attack.lab import Observation, Outcome, attack
from softtdx.attack.scene import LINE, PAGE, SECRET, SECRET_GPA, SPARE_GPA, Scene, Seen, Victim, judge, say
from softtdx.hw import DramLine, LogicalProcessor
from softtdx.vmm.python_guest import PythonGuest, Td

__all__: list[str] = []

_FORGED = b"a page of the attacker's making ".ljust(LINE) * (PAGE // LINE)
_VMCS = "an ordinary VM, whose VMCS the host writes"
_STATE = "an ordinary VM, whose registers the host keeps"
_PRIVATE = "The structure is private memory of the TDX module: what the host wrote there is met with a machine check."
_LEVELS = (3, 2, 1, 0)
_RSI = 6
_PAGES_OF_A_LINE = 4  # PAMT entries in a cache line
_SECOND_GPA = SPARE_GPA + PAGE
_GPR_LINE, _SEPT_ROOT = 0x980, 3  # in the TDVPR page; among the TDCS pages


def _own_tables(scene: Scene, victim: Victim) -> int:
    """An EPT of the attacker's own: as the host's, but the secret's GPA leads to a forged page. Its root."""
    memory, ept = scene.host.memory, victim.machine.vm.ept
    assert ept is not None
    table, link, root, entry = ept.root, 0, 0, 0
    for level in _LEVELS:
        copy = memory.alloc()
        memory.write(copy, memory.read(table, PAGE))
        if link:
            memory.wr64(link, copy | sept.RWX)
        root, link = root or copy, copy + 8 * sept.entry_index(SECRET_GPA, level)
        entry = memory.rd64(link)
        table = entry & sept.HPA_MASK
    page = memory.alloc()
    memory.write(page, _FORGED)
    memory.wr64(link, page | entry & ~sept.HPA_MASK)
    return root


def _while_outside(
    scene: Scene, protected: Callable[[Victim], None], ordinary: Callable[[Victim], None]
) -> Observation:
    """What the host does between exit and entry; the guest keeps eight bytes of the secret in RSI meanwhile."""

    def act(victim: Victim) -> Seen:
        change = protected if scene.protected else ordinary
        kept = int.from_bytes(SECRET[:8], "little")
        regs = victim.outside(lambda _: change(victim), rsi=kept)
        victim.td.store(SECRET_GPA, regs.rsi)
        return Seen(note="the guest was entered again")

    return scene.under_attack(act)


@attack(
    "tdr-overwrite",
    "control",
    title="The host overwrites the TDR",
    promise=_PRIVATE,
    expected=Outcome.DETECTED,
    unprotected=_VMCS,
)
def tdr_overwrite(scene: Scene) -> Observation:
    """The root of the guest's control state is replaced while the guest is out.

    In a TD that is the TDR, which names the KeyID and the TDCS; the host stores over it with KeyID 0. In an ordinary
    VM it is the EPT pointer of the VMCS, which the host leads to page tables of its own.
    """

    def ordinary(victim: Victim) -> None:
        root, lp = _own_tables(scene, victim), victim.td.processor
        lp.core.vmwrite(vmcs.EPTP, root | lp.core.vmread(vmcs.EPTP) & (PAGE - 1))

    return _while_outside(scene, lambda victim: scene.memory.write(victim.tdx().require_tdr(), bytes(LINE)), ordinary)


@attack(
    "tdcs-overwrite",
    "control",
    title="The host overwrites the root of the page tables in the TDCS",
    promise=_PRIVATE,
    expected=Outcome.DETECTED,
    unprotected="an ordinary VM, whose EPT the host writes",
)
def tdcs_overwrite(scene: Scene) -> Observation:
    """The host puts an entry of its own into the root table: in a TD a page of the TDCS, in a VM the top of the EPT."""

    def protected(victim: Victim) -> None:
        scene.memory.write(victim.tdx().tdcs[_SEPT_ROOT], bytes(LINE))
        victim.flush()

    def ordinary(victim: Victim) -> None:
        ept = victim.machine.vm.ept
        assert ept is not None
        scene.host.memory.wr64(ept.root, scene.host.memory.rd64(_own_tables(scene, victim)))
        victim.flush()

    return _while_outside(scene, protected, ordinary)


@attack(
    "registers-overwrite",
    "control",
    title="The host overwrites the saved registers of a vCPU",
    promise=_PRIVATE,
    expected=Outcome.DETECTED,
    unprotected=_STATE,
)
def registers_overwrite(scene: Scene) -> Observation:
    """The guest keeps a value in a register while it exits; the host changes it where it was saved."""

    def ordinary(victim: Victim) -> None:
        victim.vmx_vcpu().gprs[_RSI] = 0

    return _while_outside(scene, lambda victim: scene.memory.write(victim.tdvpr() + _GPR_LINE, bytes(128)), ordinary)


@attack(
    "vmcs-overwrite",
    "control",
    title="The host overwrites the TD VMCS",
    promise=_PRIVATE,
    expected=Outcome.DETECTED,
    unprotected=_VMCS,
)
def vmcs_overwrite(scene: Scene) -> Observation:
    """The host has the VMCS written back and changes it in memory.

    TDH.VP.FLUSH (VMCLEAR in an ordinary VM) puts the VMCS into its page. The attacker overwrites it there: in a TD
    with KeyID 0; in a VM by what the host may write anyway, an EPT pointer of its own.
    """

    def protected(victim: Victim) -> None:
        vcpu = victim.tdx_vcpu()
        vcpu.flush()
        scene.memory.write(vcpu.tdcx[0], bytes(PAGE))

    def ordinary(victim: Victim) -> None:
        vcpu, lp, root = victim.vmx_vcpu(), victim.td.processor, _own_tables(scene, victim)
        vcpu.flush()
        vcpu.load(lp)
        lp.core.vmwrite(vmcs.EPTP, root | lp.core.vmread(vmcs.EPTP) & (PAGE - 1))

    return _while_outside(scene, protected, ordinary)


def _pamt_line(scene: Scene, page: int) -> int:
    """Where the line lies that holds the PAMT entry of a 4 KiB page, as the host knows: it gave the memory."""
    tdx = scene.host.tdx
    assert tdx is not None
    tdmr = next(t for t in tdx.tdmrs if t.base <= page < t.base + t.size)
    return tdmr.pamt[0][0] + (page - tdmr.base) // PAGE * tdx.sysinfo.pamt_entry_size[0] & -LINE


_Line = TypeVar("_Line")


def _stale_pamt(scene: Scene, record: Callable[[int], _Line], put_back: Callable[[int, _Line], None]) -> Observation:
    """The PAMT line of the victim's page is recorded while the page is free, and put back when it is the victim's."""
    page = scene.host.memory.alloc(_PAGES_OF_A_LINE, align=_PAGES_OF_A_LINE * PAGE)
    line = _pamt_line(scene, page)
    old = record(line)

    def act(victim: Victim) -> Seen:
        victim.put_at(SPARE_GPA, page)
        victim.touch(SPARE_GPA)
        victim.td.write(SPARE_GPA, victim.td.read(SECRET_GPA, PAGE))
        put_back(line, old)
        regs = scene.seamcall(Leaf.MEM_PAGE_AUG, rcx=_SECOND_GPA, rdx=victim.tdx().require_tdr(), r8=page)
        if not regs.rax:
            victim.td.accept(_SECOND_GPA)
        victim.td.write(SECRET_GPA, victim.td.read(SPARE_GPA, PAGE))
        return Seen(note=f"{say(Leaf.MEM_PAGE_AUG, regs)} of a page that is mapped already")

    return scene.under_attack(act)


@attack(
    "pamt-overwrite",
    "control",
    title="The host rewrites the PAMT, so that a TD's page looks free",
    promise="The PAMT is private memory of the module: it takes a machine check when it looks the page up.",
    expected=Outcome.DETECTED,
    unprotected="a TD on a platform whose memory has no integrity, neither MACs nor TD-owner bits",
)
def pamt_overwrite(scene: Scene) -> Observation:
    """The host loads the line with a page's PAMT entry while the page is free, and stores it back when it is a TD's.

    Then it maps the page once more, at another GPA of the TD: accepting it there wipes what it holds. It needs no key:
    what it loaded through KeyID 0 is noise, but stored through KeyID 0 it becomes the old ciphertext again.
    """
    scene.bare_td = True
    return _stale_pamt(scene, lambda line: scene.memory.read(line, LINE), scene.memory.write)


@attack(
    "pamt-replay",
    "control",
    title="An old line of the PAMT is put back",
    promise="None: MKTME-i has no freshness, for the PAMT no more than for a TD's memory.",
    expected=Outcome.CORRUPTED,
    unprotected="a TD on a platform whose memory has no integrity, neither MACs nor TD-owner bits",
)
def pamt_replay(scene: Scene) -> Observation:
    """An interposer on the bus puts back, MAC and all, the PAMT line of when the page was free.

    A limit of the real scheme. The module believes that nobody owns the page, and maps it once more.
    """
    scene.bare_td = True
    return _stale_pamt(scene, scene.dram.record, lambda _, lines: scene.dram.replay(lines))


@attack(
    "tdvps-replay",
    "control",
    title="An old line of a vCPU's saved registers is put back",
    promise="None: MKTME-i has no freshness, for control structures no more than for the TD's memory.",
    expected=Outcome.CORRUPTED,
    unprotected=_STATE,
)
def tdvps_replay(scene: Scene) -> Observation:
    """An interposer on the bus records the saved registers at one exit and puts them back at a later one.

    A limit of the real scheme: the line is genuine, at its address, under the right key. Only its time is wrong.
    """
    recorded: list[DramLine] = []

    def act(victim: Victim) -> Seen:
        def record(_: LogicalProcessor) -> None:
            if scene.protected:
                recorded.extend(scene.dram.record(victim.tdvpr() + _GPR_LINE & -LINE, 2 * LINE))

        def put_back(_: LogicalProcessor) -> None:
            if scene.protected:
                scene.dram.replay(recorded)
            else:
                victim.vmx_vcpu().gprs[_RSI] = 0

        victim.outside(record, rsi=0)
        regs = victim.outside(put_back, rsi=int.from_bytes(SECRET[:8], "little"))
        victim.td.store(SECRET_GPA, regs.rsi)
        return Seen(note="the registers of an earlier exit were put back")

    return scene.under_attack(act)


@attack(
    "tdvps-read",
    "control",
    title="The host reads the pages in which a vCPU's state is saved",
    promise="The TDVPS is private memory: a load gives zeroes, the bus ciphertext.",
    expected=Outcome.STOPPED,
    unprotected=_STATE,
)
def tdvps_read(scene: Scene) -> Observation:
    """The guest exits with a part of the secret in its registers; the host looks where they were saved."""
    learned = b""

    def look(victim: Victim) -> None:
        nonlocal learned
        if not scene.protected:
            learned = b"".join(value.to_bytes(8, "little") for value in victim.vmx_vcpu().gprs)
            return
        for page in (victim.tdvpr(), *victim.tdx_vcpu().tdcx):
            learned += scene.memory.read(page, PAGE) + scene.dram.read(page, PAGE)

    def act(victim: Victim) -> Seen:
        low, high = (int.from_bytes(SECRET[at : at + 8], "little") for at in (0, 8))
        victim.outside(lambda _: look(victim), rsi=low, rdi=high)
        return Seen(learned, f"looked through {len(learned)} bytes")

    return scene.under_attack(act)


@attack(
    "snapshot-rollback",
    "control",
    title="The host takes the guest back to an earlier state",
    promise="The host can save only what it can read, and what it writes back is not the TD's any more.",
    expected=Outcome.DETECTED,
    unprotected="an ordinary VM, which any hypervisor can snapshot",
)
def snapshot_rollback(scene: Scene) -> Observation:
    """A snapshot of the guest's page, taken before an update, is restored after it: attempts start anew."""

    def act(victim: Victim) -> Seen:
        victim.td.write(SECRET_GPA, bytes(PAGE))
        snapshot = scene.memory.read(victim.pa(), PAGE)
        victim.td.write(SECRET_GPA, SECRET)
        scene.memory.write(victim.pa(), snapshot)
        return Seen(note="the page as it was before the update was written back")

    return scene.under_attack(act)


@attack(
    "kill-and-read",
    "control",
    title="The host kills the guest and searches what it leaves behind",
    promise="None for service: the host may end a TD at any time. What is left is noise.",
    expected=Outcome.DENIED,
    unprotected="an ordinary VM, whose memory stays as it was",
)
def kill_and_read(scene: Scene) -> Observation:
    """The guest is stopped for good between two instructions. Then the host tears it down and reads its page."""
    place = 0

    def program(td: Td) -> None:
        nonlocal place
        place = Victim(guest, td).pa()
        guest.machine.stop()
        while True:
            td.hold()

    with PythonGuest(scene.host, program, scene.config()) as guest:
        guest.run()
    seen = Seen(scene.memory.read(place, PAGE) + scene.dram.read(place, PAGE), "the guest never ran again")
    return judge(seen, SECRET, "") if seen.has_secret else Observation(Outcome.DENIED, seen.note)


@attack(
    "add-after-finalize",
    "control",
    title="The host adds to a guest that was measured already",
    promise="TDH.MR.FINALIZE ends building: PAGE.ADD and MR.EXTEND give OP_STATE_INCORRECT.",
    expected=Outcome.STOPPED,
    unprotected="an ordinary VM, whose image the host may patch whenever it likes",
)
def add_after_finalize(scene: Scene) -> Observation:
    """The host changes the guest's initial image after its measurement was closed."""

    def act(victim: Victim) -> Seen:
        if not scene.protected:
            scene.memory.write(victim.pa(), _FORGED)
            return Seen(note="the image was patched")
        tdr, page, source = victim.tdx().require_tdr(), scene.host.memory.alloc(), scene.host.memory.alloc()
        scene.memory.write(source, _FORGED)
        said = []

        def add(_: LogicalProcessor) -> None:
            for leaf, operands in (
                (Leaf.MEM_PAGE_ADD, {"rcx": SECRET_GPA, "rdx": tdr, "r8": page, "r9": source}),
                (Leaf.MR_EXTEND, {"rcx": SECRET_GPA, "rdx": tdr}),
                (Leaf.MR_FINALIZE, {"rcx": tdr}),
            ):
                said.append(say(leaf, scene.seamcall(leaf, **operands)))

        victim.outside(add)
        return Seen(note=", ".join(said))

    return scene.under_attack(act)
