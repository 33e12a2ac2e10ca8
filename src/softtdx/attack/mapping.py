"""Attacks on where memory lies: remapping, aliasing, sharing, dropping and reusing a guest's pages."""

from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.status import Status, status_of
from softtdx.attack.lab import Observation, Outcome, attack
from softtdx.attack.scene import LINE, PAGE, SECRET, SECRET_GPA, SPARE_GPA, Scene, Seen, Victim, judge, say
from softtdx.vmm import MachineConfig
from softtdx.vmm.python_guest import PythonGuest, Td

__all__: list[str] = []

_FORGED = b"a page of the attacker's making ".ljust(LINE) * (PAGE // LINE)
_FAR_TABLE = 1 << 39 | 3  # the S-EPT page below the second entry of the root: not there yet
_EPT = "an ordinary VM, whose EPT the host writes"


def _map_ordinary(victim: Victim, gpa: int, hpa: int) -> None:
    """What the host of an ordinary VM can do: write an EPT entry and flush."""
    ept = victim.machine.vm.ept
    assert ept is not None
    ept.map(gpa, hpa)
    victim.flush()


def _forged_page(scene: Scene) -> int:
    page = scene.host.memory.alloc()
    scene.memory.write(page, _FORGED)
    return page


def drop_and_give_anew(scene: Scene, victim: Victim) -> str:
    """BLOCK, TRACK, an exit, REMOVE, and AUG of the same page: what the secret's GPA leads to is pending now."""
    tdr, old = victim.tdx().require_tdr(), victim.pa()
    before = [(Leaf.MEM_RANGE_BLOCK, {"rcx": SECRET_GPA, "rdx": tdr}), (Leaf.MEM_TRACK, {"rcx": tdr})]
    after = [
        (Leaf.MEM_PAGE_REMOVE, {"rcx": SECRET_GPA, "rdx": tdr}),
        (Leaf.MEM_PAGE_AUG, {"rcx": SECRET_GPA, "rdx": tdr, "r8": old}),
    ]
    said = [say(leaf, scene.seamcall(leaf, **operands)) for leaf, operands in before]
    victim.leave()
    said += [say(leaf, scene.seamcall(leaf, **operands)) for leaf, operands in after]
    return ", ".join(said)


@attack(
    "sept-overwrite",
    "mapping",
    title="The host writes an entry of the S-EPT",
    promise="S-EPT pages are private memory of the TD: an entry that the host wrote is met with a machine check.",
    expected=Outcome.DETECTED,
    unprotected=_EPT,
)
def sept_overwrite(scene: Scene) -> Observation:
    """The host knows where the page tables lie and writes an entry that leads to a page of its own making."""

    def act(victim: Victim) -> Seen:
        page = _forged_page(scene)
        if not scene.protected:
            _map_ordinary(victim, SECRET_GPA, page)
            return Seen(note="the EPT entry leads to the attacker's page")
        table = victim.tdx().secure.table_page(SECRET_GPA, 1)
        assert table is not None
        scene.memory.write(table + 8 * (SECRET_GPA >> 12 & 511), (page | 0xF7).to_bytes(8, "little"))
        victim.flush()
        return Seen(note="wrote 8 bytes into the S-EPT page")

    return scene.under_attack(act)


@attack(
    "sept-replay",
    "mapping",
    title="An old entry of the S-EPT is put back when its page is somebody else's",
    promise="The entry verifies, there is no freshness; but what its new owner wrote is not the TD's: machine check.",
    expected=Outcome.DETECTED,
    unprotected=_EPT,
)
def sept_replay(scene: Scene) -> Observation:
    """The host takes the page away in the order that the module demands and writes into it what it likes.

    Then an interposer puts the line of the S-EPT back in which the page was mapped.
    """

    def act(victim: Victim) -> Seen:
        page = victim.pa()
        if not scene.protected:
            _map_ordinary(victim, SECRET_GPA, _forged_page(scene))
            return Seen(note="the EPT entry leads to the attacker's page")
        table = victim.tdx().secure.table_page(SECRET_GPA, 1)
        assert table is not None
        entry = table + 8 * (SECRET_GPA >> 12 & 511)
        old = scene.dram.record(entry & -LINE)
        tdr = victim.tdx().require_tdr()
        scene.seamcall(Leaf.MEM_RANGE_BLOCK, rcx=SECRET_GPA, rdx=tdr)
        scene.seamcall(Leaf.MEM_TRACK, rcx=tdr)
        victim.leave()
        remove = scene.seamcall(Leaf.MEM_PAGE_REMOVE, rcx=SECRET_GPA, rdx=tdr)
        assert remove.rax == 0
        scene.memory.write(page, _FORGED)
        scene.dram.replay(old)
        victim.flush()
        return Seen(note=f"{say(Leaf.MEM_PAGE_REMOVE, remove)}, the old entry is back")

    return scene.under_attack(act)


@attack(
    "remap",
    "mapping",
    title="The host gives the guest another page under the same GPA",
    promise="A mapped S-EPT entry takes no other page: EPT_ENTRY_STATE_INCORRECT.",
    expected=Outcome.STOPPED,
    unprotected=_EPT,
)
def remap(scene: Scene) -> Observation:
    """The host asks for its own page, filled with what it likes, to be mapped where the secret lies."""

    def act(victim: Victim) -> Seen:
        page = _forged_page(scene)
        if not scene.protected:
            _map_ordinary(victim, SECRET_GPA, page)
            return Seen(note="the EPT entry leads to the attacker's page")
        tdr = victim.tdx().require_tdr()
        aug = scene.seamcall(Leaf.MEM_PAGE_AUG, rcx=SECRET_GPA, rdx=tdr, r8=page)
        add = scene.seamcall(Leaf.MEM_PAGE_ADD, rcx=SECRET_GPA, rdx=tdr, r8=page, r9=page)
        scene.host.memory.free(page)
        return Seen(note=f"{say(Leaf.MEM_PAGE_AUG, aug)}, {say(Leaf.MEM_PAGE_ADD, add)}")

    return scene.under_attack(act)


@attack(
    "drop-and-replace",
    "mapping",
    title="The host takes a page away and gives a fresh one",
    promise="A fresh page is pending: the TD must accept it anew, and never reads silent zeroes.",
    expected=Outcome.DETECTED,
    unprotected=_EPT,
)
def drop_and_replace(scene: Scene) -> Observation:
    """The host removes the page in the order that the module demands, then adds a new one under the same GPA."""

    def act(victim: Victim) -> Seen:
        if not scene.protected:
            page = scene.host.memory.alloc(zero=True)
            _map_ordinary(victim, SECRET_GPA, page)
            return Seen(note="a page of zeroes is mapped instead")
        return Seen(note=drop_and_give_anew(scene, victim))

    return scene.under_attack(act)


@attack(
    "remove-without-tracking",
    "mapping",
    title="The host takes a page while its translation still lives in a TLB",
    promise="PAGE.REMOVE wants the TLB epoch over: TLB_TRACKING_NOT_DONE until every vCPU has left the TD.",
    expected=Outcome.STOPPED,
    unprotected="an ordinary VM, whose host forgets INVEPT",
)
def remove_without_tracking(scene: Scene) -> Observation:
    """The host unmaps a page without a TLB shootdown and gives it to somebody else; the guest still reads it.

    Here the guest is the attacker and the next owner of the page the victim.
    """

    def act(victim: Victim) -> Seen:
        td = victim.td
        victim.touch(SPARE_GPA)
        td.store(SPARE_GPA, 1)  # the translation is in the TLB
        page = victim.pa(SPARE_GPA)
        if scene.protected:
            tdr = victim.tdx().require_tdr()
            block = scene.seamcall(Leaf.MEM_RANGE_BLOCK, rcx=SPARE_GPA, rdx=tdr)
            remove = scene.seamcall(Leaf.MEM_PAGE_REMOVE, rcx=SPARE_GPA, rdx=tdr)
            if not remove.rax:
                scene.memory.write(page, SECRET)
            note = f"{say(Leaf.MEM_RANGE_BLOCK, block)}, {say(Leaf.MEM_PAGE_REMOVE, remove)}"
        else:
            ept = victim.machine.vm.ept
            assert ept is not None
            ept.unmap(SPARE_GPA, SPARE_GPA + PAGE)
            scene.memory.write(page, SECRET)
            note = "the EPT entry is gone, the TLB entry is not"
        return Seen(td.read(SPARE_GPA, PAGE), note)

    return scene.under_attack(act)


@attack(
    "alias",
    "mapping",
    title="One page under two GPAs",
    promise="A page belongs to one S-EPT entry: PAGE_METADATA_INCORRECT for the second.",
    expected=Outcome.STOPPED,
    unprotected=_EPT,
)
def alias(scene: Scene) -> Observation:
    """The host maps the secret's page a second time; what the guest writes there changes the secret."""

    def act(victim: Victim) -> Seen:
        if not scene.protected:
            victim.touch(SPARE_GPA)
            _map_ordinary(victim, SPARE_GPA, victim.pa())
            victim.td.store(SPARE_GPA, 0)
            return Seen(note="the guest wrote through the alias")
        regs = scene.seamcall(Leaf.MEM_PAGE_AUG, rcx=SPARE_GPA, rdx=victim.tdx().require_tdr(), r8=victim.pa())
        return Seen(note=say(Leaf.MEM_PAGE_AUG, regs))

    return scene.under_attack(act)


@attack(
    "two-guests-one-page",
    "mapping",
    title="The same page is fed to two guests",
    promise="PAMT holds one owner for a page: no other TD gets it.",
    expected=Outcome.STOPPED,
    unprotected=_EPT,
)
def two_guests_one_page(scene: Scene) -> Observation:
    """The host starts a second guest, its accomplice, and maps the first one's page into it."""
    page, said, learned = 0, "", b""
    config = MachineConfig(memory=1 << 20, vm=not scene.protected)

    def owner(td: Td) -> None:
        nonlocal page
        page = Victim(first, td).pa()

    def accomplice(td: Td) -> None:
        nonlocal said, learned
        other = Victim(second, td, secret=bytes(PAGE))
        if scene.protected:
            regs = scene.seamcall(Leaf.MEM_PAGE_AUG, rcx=SPARE_GPA, rdx=other.tdx().require_tdr(), r8=page)
            said = say(Leaf.MEM_PAGE_AUG, regs)
            if regs.rax:
                return
            td.accept(SPARE_GPA)
        else:
            other.touch(SPARE_GPA)
            _map_ordinary(other, SPARE_GPA, page)
            said = "the accomplice read the page"
        learned = td.read(SPARE_GPA, PAGE)

    # The owner has done its work and is still there, with the secret in its page, when the accomplice starts.
    with PythonGuest(scene.host, owner, config) as first:
        first.run()
        with PythonGuest(scene.host, accomplice, config) as second:
            second.run()
    return judge(Seen(learned, said), SECRET, "")


@attack(
    "page-as-control-structure",
    "mapping",
    title="A TD's page is offered as a control structure of another TD",
    promise="A page that is not free becomes no TDR, no S-EPT page and no other GPA's page: PAGE_METADATA_INCORRECT.",
    expected=Outcome.STOPPED,
    unprotected=_EPT,
)
def page_as_control_structure(scene: Scene) -> Observation:
    """The host gives the secret's page once more, as every kind of page the module takes, hoping to have it wiped."""

    def act(victim: Victim) -> Seen:
        page = victim.pa()
        if not scene.protected:
            scene.memory.write(page, bytes(PAGE))
            return Seen(note="the host wiped its own page")
        tdr = victim.tdx().require_tdr()
        tries = {
            Leaf.MNG_CREATE: {"rcx": page, "rdx": scene.description.first_private_keyid + 9},
            Leaf.MEM_SEPT_ADD: {"rcx": _FAR_TABLE, "rdx": tdr, "r8": page},
            Leaf.MEM_PAGE_AUG: {"rcx": SPARE_GPA, "rdx": tdr, "r8": page},
        }
        results = {leaf: scene.seamcall(leaf, **operands) for leaf, operands in tries.items()}
        assert all(status_of(regs.rax) is Status.PAGE_METADATA_INCORRECT for regs in results.values()), results
        return Seen(note=", ".join(say(leaf, regs) for leaf, regs in results.items()))

    return scene.under_attack(act)


@attack(
    "read-after-reclaim",
    "mapping",
    title="The host reads a guest's pages once they are its own again",
    promise="What a TD leaves behind is ciphertext under a key that is gone.",
    expected=Outcome.STOPPED,
    unprotected="an ordinary VM, whose memory is freed as it was",
)
def read_after_reclaim(scene: Scene) -> Observation:
    """The guest ends, the host takes its pages back and reads them before it gives them to anybody."""
    place = 0

    def program(td: Td) -> None:
        nonlocal place
        place = Victim(guest, td).pa()

    with PythonGuest(scene.host, program, MachineConfig(memory=1 << 20, vm=not scene.protected)) as guest:
        guest.run()
    data = scene.memory.read(place, PAGE) + scene.dram.read(place, PAGE)
    return judge(Seen(data, "the page was read on the bus and by load"), SECRET, "")


@attack(
    "reclaim-while-alive",
    "mapping",
    title="The host reclaims a page of a TD that runs",
    promise="Reclaiming is for TDs whose key is gone: LIFECYCLE_STATE_INCORRECT.",
    expected=Outcome.STOPPED,
    unprotected=_EPT,
)
def reclaim_while_alive(scene: Scene) -> Observation:
    """The host calls the leaves of teardown on a TD that is alive: reclaim, free the KeyID, mark it flushed."""

    def act(victim: Victim) -> Seen:
        if not scene.protected:
            return Seen(scene.memory.read(victim.pa(), PAGE), "the page is the host's all the time")
        tdr = victim.tdx().require_tdr()
        tries = {
            Leaf.PHYMEM_PAGE_RECLAIM: {"rcx": victim.pa()},
            Leaf.MNG_KEY_FREEID: {"rcx": tdr},
            Leaf.MNG_VPFLUSHDONE: {"rcx": tdr},
        }
        results = {leaf: scene.seamcall(leaf, **operands) for leaf, operands in tries.items()}
        assert all(status_of(regs.rax) is not Status.SUCCESS for regs in results.values())
        said = ", ".join(say(leaf, regs) for leaf, regs in results.items())
        return Seen(scene.memory.read(victim.pa(), PAGE), said)

    return scene.under_attack(act)
