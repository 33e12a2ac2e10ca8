"""Races: a second processor changes what a leaf function is reading, or what two vCPUs are asking for."""

import threading

from softtdx.abi.ghci import VmcallLeaf
from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.status import Status, status_of
from softtdx.abi.structs import Attributes
from softtdx.attack.flawed import Flaw, attackers_key, flawed_host, host_without_module, image_with, signed
from softtdx.attack.lab import Observation, Outcome, attack
from softtdx.attack.mapping import drop_and_give_anew
from softtdx.attack.scene import LINE, PAGE, SECRET, SECRET_GPA, SPARE_GPA, Scene, Seamcall, Seen, Victim, judge, say
from softtdx.hw import LogicalProcessor, Registers
from softtdx.kvm.uapi import HypercallExit
from softtdx.seamldr import development_release
from softtdx.vmm import GuestError
from softtdx.vmm.launcher import FIRMWARE_BASE
from softtdx.vmm.python_guest import PythonGuest, Td, VeError

__all__: list[str] = []

_TICK = 0.01  # seconds between two looks at whether a machine has ended
_TDMR_INFO_HEAD, _TDMR_INFO = 64, 512  # before the reserved areas; in all
_BACK_DOOR = b"a back door in the image"
_AT = FIRMWARE_BASE + 0x800  # in the image's first page, where nothing is
_RESERVED = 1  # page type in the PAMT

_ATTRIBUTES_TWICE = (
    Flaw(
        "leaves/mng_init.py",
        "    td.wr64(tdcs.ATTRIBUTES, attributes)\n",
        "    td.wr64(tdcs.ATTRIBUTES, attributes)\n"
        "    if call.cpu.rd64(call.regs.rdx) & 1:\n"
        "        call.g.__dict__.setdefault('debugged', set()).add(td.pa)\n",
    ),
    Flaw(
        "leaves/mem_rw.py",
        "    if not td.rd64(tdcs.ATTRIBUTES) & DEBUG:",
        "    if td.pa not in call.g.__dict__.get('debugged', ()):",
    ),
)
_SOURCE_TWICE = (
    Flaw(
        "leaves/mem_page.py",
        "    cpu.copy_page(target, source)\n",
        "    cpu.copy_page(target, source)\n    call.g.__dict__.setdefault('sources', {})[target] = source\n",
    ),
    Flaw(
        "leaves/mr.py",
        "    source = sept.leaf_hpa(entry, gpa, level)\n",
        "    source = sept.leaf_hpa(entry, gpa, level)\n"
        "    source = call.g.sources[source & ~0xFFF] | source & 0xFFF\n",
    ),
)
_TDMR_TWICE = Flaw(
    "leaves/sys_config.py",
    "    g.tdmrs = [_tdmr(index, info) for index, info in enumerate(infos)]\n",
    "    again = [TdmrInfo.parse(cpu.read(cpu.rd64(array + 8 * i), TDMR_INFO.size)) for i in range(count)]\n"
    "    g.tdmrs = [_tdmr(index, info) for index, info in enumerate(again)]\n",
)


@attack(
    "race-td-params",
    "control",
    title="A second processor sets ATTRIBUTES.DEBUG while TDH.MNG.INIT reads TD_PARAMS",
    promise="The module copies TD_PARAMS once, and checks, measures and uses the copy.",
    expected=Outcome.STOPPED,
    unprotected="a TDX module that reads ATTRIBUTES once for the report and again for its own decisions",
)
def race_td_params(scene: Scene) -> Observation:
    """The bit is set right behind the module's first load of TD_PARAMS: the TD reports that nobody can debug it.

    Then the host reads the secret by the debug interface, TDH.MEM.RD.
    """
    flawed_host(scene, *_ATTRIBUTES_TWICE)

    def mng_init(lp: LogicalProcessor, regs: Registers, call: Seamcall) -> None:
        params = regs.rdx

        def set_debug() -> None:
            attributes = int.from_bytes(scene.memory.read(params, 8), "little") | Attributes.DEBUG
            scene.memory.write(params, attributes.to_bytes(8, "little"))

        with lp.platform.after_load(params, 8, set_debug):
            call(regs)

    def act(victim: Victim) -> Seen:
        tdr = victim.tdx().require_tdr()
        reported = victim.tdx().read_td_field("ATTRIBUTES")
        results = [scene.seamcall(Leaf.MEM_RD, rcx=SECRET_GPA + at, rdx=tdr) for at in range(0, LINE, 8)]
        note = f"ATTRIBUTES are {reported:#x}, {say(Leaf.MEM_RD, results[0])}"
        return Seen(b"".join(regs.r8.to_bytes(8, "little") for regs in results), note)

    with scene.instead_of(Leaf.MNG_INIT, mng_init):
        return scene.under_attack(act)


@attack(
    "race-page-source",
    "control",
    title="A second processor exchanges the source page while TDH.MEM.PAGE.ADD copies it",
    promise="MRTD is extended with the TD's own copy: whatever was copied is what is measured.",
    expected=Outcome.DETECTED,
    unprotected="a TDX module whose MR.EXTEND measures the source page instead of the copy",
)
def race_page_source(scene: Scene) -> Observation:
    """The source holds a back door while the module copies it, and the genuine page when it is measured."""
    flawed_host(scene, *_SOURCE_TWICE)
    found = b""

    def program(td: Td) -> None:
        nonlocal found
        found = td.read(_AT, len(_BACK_DOOR))

    def page_add(lp: LogicalProcessor, regs: Registers, call: Seamcall) -> None:
        source = regs.r9
        if regs.rcx & -PAGE != FIRMWARE_BASE:
            call(regs)
            return
        genuine = scene.memory.read(source, PAGE)
        scene.memory.write(source + _AT - FIRMWARE_BASE, _BACK_DOOR)
        with lp.platform.after_load(source, PAGE, lambda: scene.memory.write(source, genuine)):
            call(regs)

    with PythonGuest(scene.host, program, scene.config()) as guest:
        genuine_mrtd = guest.machine.mrtd()
    with scene.instead_of(Leaf.MEM_PAGE_ADD, page_add), PythonGuest(scene.host, program, scene.config()) as guest:
        mrtd = guest.machine.mrtd()
        guest.run()
    if found != _BACK_DOOR:
        return Observation(Outcome.STOPPED, "the back door is not in the TD")
    if mrtd != genuine_mrtd:
        return Observation(Outcome.DETECTED, "the back door is in the TD, and in MRTD")
    return Observation(Outcome.CORRUPTED, "the back door is in the TD, and MRTD is that of the genuine image")


@attack(
    "race-tdmr-info",
    "control",
    title="A second processor empties the reserved areas while TDH.SYS.CONFIG reads TDMR_INFO",
    promise="The module copies TDMR_INFO once: its PAMT can never become memory that it hands out.",
    expected=Outcome.STOPPED,
    unprotected="a TDX module that reads TDMR_INFO once to check it and again to use it",
)
def race_tdmr_info(scene: Scene) -> Observation:
    """The PAMT must lie in a reserved area of its TDMR. The host drops the areas once they are checked.

    Then it asks the module what a page of the PAMT is.
    """
    scene.always_td = True
    scene.host = host = host_without_module(scene)
    release = development_release() if scene.protected else signed(image_with(_TDMR_TWICE), attackers_key())

    def sys_config(lp: LogicalProcessor, regs: Registers, call: Seamcall) -> None:
        infos = [scene.host.memory.rd64(regs.rcx + 8 * i) for i in range(regs.rdx)]

        def empty() -> None:
            for info in infos:
                scene.memory.write(info + _TDMR_INFO_HEAD, bytes(_TDMR_INFO - _TDMR_INFO_HEAD))

        with lp.platform.after_load(infos[-1], _TDMR_INFO, empty):
            call(regs)

    with scene.instead_of(Leaf.SYS_CONFIG, sys_config):
        tdx = host.enable_tdx(release)
    pamt = tdx.tdmrs[0].pamt[0][0]
    regs = scene.seamcall(Leaf.PHYMEM_PAGE_RDMD, rcx=pamt)
    if regs.rcx == _RESERVED and status_of(regs.rax) is Status.SUCCESS:
        return Observation(Outcome.STOPPED, f"the PAMT's own page at {pamt:#x} is of type RSVD")
    return Observation(Outcome.CORRUPTED, f"the PAMT's own page at {pamt:#x} is of type {regs.rcx}: a TD may have it")


@attack(
    "lazy-accept",
    "mapping",
    title="A guest that accepts whatever is pending is given a fresh page for one it had",
    promise="With ATTRIBUTES.SEPT_VE_DISABLE, which is attested, a page that went away ends the TD instead of a #VE.",
    expected=Outcome.DETECTED,
    unprotected="a TD that the host built without SEPT_VE_DISABLE, whose #VE handler accepts what is pending",
)
def lazy_accept(scene: Scene) -> Observation:
    """The host removes the secret's page and gives a fresh one. The guest's handler of #VE accepts pages lazily."""
    scene.always_td = True

    def mng_init(lp: LogicalProcessor, regs: Registers, call: Seamcall) -> None:
        del lp
        if not scene.protected:
            attributes = int.from_bytes(scene.memory.read(regs.rdx, 8), "little") & ~int(Attributes.SEPT_VE_DISABLE)
            scene.memory.write(regs.rdx, attributes.to_bytes(8, "little"))
        call(regs)

    def act(victim: Victim) -> Seen:
        said = drop_and_give_anew(scene, victim)
        try:
            victim.td.load(SECRET_GPA)
        except VeError:
            gpa = victim.td.ve_info().r9
            victim.td.accept(gpa & -PAGE)
            said += f"; the guest accepted {gpa & -PAGE:#x} in its #VE handler"
        return Seen(note=said)

    with scene.instead_of(Leaf.MNG_INIT, mng_init):
        return scene.under_attack(act)


@attack(
    "mapgpa-race",
    "mapping",
    title="A page becomes shared while another vCPU writes a secret into it",
    promise="A private GPA never leads to shared memory, whatever the host does meanwhile.",
    expected=Outcome.DETECTED,
    unprotected="an ordinary VM, whose memory is the host's all the time",
)
def mapgpa_race(scene: Scene) -> Observation:
    """One vCPU asks to have a page shared (MapGPA). The host converts it, and before it answers lets the other run.

    That one does not know yet, and stores the secret by the page's private address. Then the host reads its page.
    """
    learned = b""
    converted, stored = threading.Event(), threading.Event()

    def ask(td: Td) -> None:
        Victim(guest, td).touch(SPARE_GPA)
        services = guest.machine._services
        convert = services.hypercall

        def convert_and_wait(request: HypercallExit) -> None:
            convert(request)
            wait()

        def wait() -> None:
            converted.set()
            while not stored.wait(_TICK) and guest.machine._ending is None:
                pass

        if td.is_td:
            services.hypercall = convert_and_wait  # type: ignore[method-assign]
            td.tdvmcall(VmcallLeaf.MAP_GPA, SPARE_GPA | td.shared_bit, PAGE)
        else:
            wait()

    def store(td: Td) -> None:
        while not converted.is_set():
            td.hold()
        td.write(SPARE_GPA, SECRET)
        stored.set()

    guest = PythonGuest(scene.host, [ask, store], scene.config())
    death = ""
    try:
        guest.run()
    except GuestError as error:
        death = str(error)
    finally:
        slot = guest.machine.vm.memslots.find(SPARE_GPA)
        assert slot is not None
        learned = guest.machine.kvm.mm.read(slot.hva(SPARE_GPA), PAGE)
        guest.close()
    return judge(Seen(learned, "the host read the page it had shared"), SECRET, death)


def _say_done(request: HypercallExit) -> None:
    """Whatever was asked: it is done, says the host."""
    request.ret = 0


@attack(
    "mapgpa-lie",
    "mapping",
    title="The host says that a page is private and goes on sharing it",
    promise="What a page is, the guest says by the address it uses: a private one goes through the S-EPT.",
    expected=Outcome.STOPPED,
    unprotected="an ordinary VM, whose memory is the host's all the time",
)
def mapgpa_lie(scene: Scene) -> Observation:
    """A page was shared for a buffer. The guest has it made private again; the host answers SUCCESS, and does nothing.

    The guest puts its secret there, and the host reads the page that it shares.
    """

    def act(victim: Victim) -> Seen:
        td, machine = victim.td, victim.machine
        slot = machine.vm.memslots.find(SPARE_GPA)
        assert slot is not None
        if td.is_td:
            td.tdvmcall(VmcallLeaf.MAP_GPA, SPARE_GPA | td.shared_bit, PAGE)
            td.store(td.shared(SPARE_GPA), 1)
            machine._services.hypercall = _say_done  # type: ignore[method-assign]
            answer = td.tdvmcall(VmcallLeaf.MAP_GPA, SPARE_GPA, PAGE).r10
            victim.touch(SPARE_GPA)
        else:
            victim.touch(SPARE_GPA)
            answer = 0
        td.write(SPARE_GPA, td.read(SECRET_GPA, PAGE))
        return Seen(machine.kvm.mm.read(slot.hva(SPARE_GPA), PAGE), f"MapGPA was answered with {answer}")

    return scene.under_attack(act)
