"""Attacks on keys and caches: KeyIDs used twice, lines that are written back too late or never."""

from softtdx.abi.ghci import VmcallLeaf
from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.attack.flawed import Flaw, flawed_host
from softtdx.attack.lab import Observation, Outcome, attack
from softtdx.attack.scene import PAGE, SECRET, SECRET_GPA, SPARE_GPA, Scene, Seamcall, Seen, Victim, judge, say
from softtdx.hw import LogicalProcessor, Registers
from softtdx.kvm import seamcalls as sc
from softtdx.vmm import MachineError
from softtdx.vmm.python_guest import PythonGuest, Td

__all__: list[str] = []

_FORGED = b"what another tenant once had in this page".ljust(64, b".") * (PAGE // 64)
_MARKED = 5  # a shared KeyID
KEYID_USED_TWICE = (
    Flaw(
        "leaves/mng.py",
        "    if g.kot.get(hkid, (HkidState.FREE, 0))[0] is not HkidState.FREE:\n",
        "    if False:\n",
    ),
    Flaw(
        "leaves/mng.py",
        "    if not cpu.pconfig(td.hkid):\n",
        "    keyed = g.__dict__.setdefault('programmed', set())\n"
        "    if td.hkid not in keyed and not (keyed.add(td.hkid) or cpu.pconfig(td.hkid)):\n",
    ),
)
_NO_WRITE_BACK = Flaw("leaves/mng.py", "    if g.kot[td.hkid][1]:\n", "    if False:\n")


def _skip(lp: LogicalProcessor, regs: Registers, call: Seamcall) -> None:
    """The hostile host tells its own code that the SEAMCALL succeeded."""
    del lp, call
    regs.rax = 0


@attack(
    "keyid-reuse",
    "control",
    title="The host gives a live TD's KeyID to an accomplice",
    promise="A KeyID serves one TD at a time: HKID_NOT_FREE, and no key is programmed over one in use.",
    expected=Outcome.STOPPED,
    unprotected="a TDX module that hands a KeyID out twice and does not program its key anew",
)
def keyid_reuse(scene: Scene) -> Observation:
    """An accomplice gets a TD under the victim's KeyID. An interposer recorded the victim's page on the bus.

    The host takes the page from the victim and gives it to the accomplice; the interposer puts the recorded lines
    back. Under the same key, at the same address, they verify: the accomplice reads the victim's secret.
    """
    flawed_host(scene, *KEYID_USED_TWICE)
    place, hkid, learned = 0, 0, b""

    def owner(td: Td) -> None:
        nonlocal place, hkid
        victim = Victim(first, td)
        place, hkid = victim.pa(), victim.hkid()

    def accomplice(td: Td) -> None:
        nonlocal learned
        other = Victim(second, td, secret=bytes(PAGE))
        other.put_at(SPARE_GPA, place)
        other.touch(SPARE_GPA)
        scene.dram.replay(lines)
        learned = td.read(SPARE_GPA, PAGE)

    with PythonGuest(scene.host, owner, scene.config()) as first:
        first.run()
        vm, tdx = first.machine.vm, scene.host.tdx
        assert tdx is not None
        lines = scene.dram.record(place, PAGE)
        slot = vm.memslots.find(SECRET_GPA)
        assert slot is not None
        assert slot.guest_memfd is not None
        slot.guest_memfd.punch_hole(slot.file_offset(SECRET_GPA), PAGE)
        assert scene.host.memory.alloc_at(place)
        tdx._free_keyids.insert(0, hkid)
        try:
            with PythonGuest(scene.host, accomplice, scene.config()) as second:
                second.run()
        except MachineError as error:
            return judge(Seen(note=str(error)), SECRET, "")
    return judge(Seen(learned, "the accomplice has the victim's KeyID, key and page"), SECRET, "")


@attack(
    "keyid-freed-dirty",
    "control",
    title="The host frees a KeyID while caches still hold the dead TD's lines",
    promise="KEY.FREEID wants every package written back since the TD ended: WBCACHE_NOT_COMPLETE.",
    expected=Outcome.STOPPED,
    unprotected="a TDX module that frees KeyIDs without asking for TDH.PHYMEM.CACHE.WB",
)
def keyid_freed_dirty(scene: Scene) -> Observation:
    """The secret is dirty in a cache when the TD ends. The host skips TDH.PHYMEM.CACHE.WB and gives the KeyID on.

    An accomplice gets KeyID and page. Then the lines are evicted: encrypted under the key that the KeyID has now,
    which is the accomplice's. Where the module refuses, the host does what it must, and tries the rest all the same.
    """
    flawed_host(scene, _NO_WRITE_BACK)
    place, hkid, learned, said = 0, 0, b"", []
    skipping = True

    def owner(td: Td) -> None:
        nonlocal place, hkid
        victim = Victim(first, td)
        place, hkid = victim.pa(), victim.hkid()

    def cache_wb(lp: LogicalProcessor, regs: Registers, call: Seamcall) -> None:
        if skipping:
            _skip(lp, regs, call)
        else:
            call(regs)

    def free_id(lp: LogicalProcessor, regs: Registers, call: Seamcall) -> None:
        nonlocal skipping
        tdr = regs.rcx
        call(regs)
        said.append(say(Leaf.MNG_KEY_FREEID, regs))
        if regs.rax:
            skipping = False
            sc.phymem_cache_wb(lp)
            regs.rax, regs.rcx = Leaf.MNG_KEY_FREEID, tdr
            call(regs)
            said.append("after CACHE.WB " + say(Leaf.MNG_KEY_FREEID, regs))

    def accomplice(td: Td) -> None:
        nonlocal learned
        other = Victim(second, td, secret=bytes(PAGE))
        assert other.hkid() == hkid
        other.put_at(SPARE_GPA, place)
        other.touch(SPARE_GPA)
        said.append(f"{scene.host.platform.caches.evict()} lines were evicted late")
        learned = td.read(SPARE_GPA, PAGE)

    with (
        scene.instead_of(Leaf.PHYMEM_CACHE_WB, cache_wb),
        scene.instead_of(Leaf.MNG_KEY_FREEID, free_id),
        PythonGuest(scene.host, owner, scene.config()) as first,
    ):
        first.run()
        scene.host.platform.caches.hold(scene.description.keyed(place, hkid), PAGE)
    assert scene.host.memory.alloc_at(place)
    with PythonGuest(scene.host, accomplice, scene.config()) as second:
        second.run()
    return judge(Seen(learned, ", ".join(said)), SECRET, "")


@attack(
    "evicted-late",
    "control",
    title="A line of the page's former owner is written back over the victim's data",
    promise="The line comes with another key's MAC: machine check, the stale data is never used.",
    expected=Outcome.DETECTED,
    unprotected="an ordinary VM, memory integrity off",
)
def evicted_late(scene: Scene) -> Observation:
    """The host skips the write-back of a page (TDH.PHYMEM.PAGE.WBINVD) that it takes from one guest for another.

    The former owner's lines are still dirty, under its KeyID. The victim fills the page; then they are evicted.
    """
    caches, d = scene.host.platform.caches, scene.description
    place = 0

    def former_owner(td: Td) -> None:
        nonlocal place
        other = Victim(former, td)
        other.touch(SPARE_GPA)
        td.write(SPARE_GPA, _FORGED)
        place = other.pa(SPARE_GPA)
        caches.hold(d.keyed(place, other.hkid()), PAGE)
        td.tdvmcall(VmcallLeaf.MAP_GPA, SPARE_GPA | td.shared_bit, PAGE)  # the host takes the page away

    def act(victim: Victim) -> Seen:
        victim.put_at(SPARE_GPA, place)
        victim.touch(SPARE_GPA)
        victim.td.write(SPARE_GPA, victim.td.read(SECRET_GPA, PAGE))
        evicted = caches.evict()
        victim.td.write(SECRET_GPA, victim.td.read(SPARE_GPA, PAGE))
        return Seen(note=f"{evicted} lines were evicted late")

    if scene.protected:
        with (
            scene.instead_of(Leaf.PHYMEM_PAGE_WBINVD, _skip),
            PythonGuest(scene.host, former_owner, scene.config()) as former,
        ):
            former.run()
            assert scene.host.memory.alloc_at(place)
            return scene.under_attack(act)
    place = scene.host.memory.alloc()
    scene.memory.set_key(_MARKED)
    scene.memory.write(d.keyed(place, _MARKED), _FORGED)
    caches.hold(d.keyed(place, _MARKED), PAGE)
    return scene.under_attack(act)
