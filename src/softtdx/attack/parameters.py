"""Attacks by operands: TD_PARAMS that ask for a TD that must not be, addresses that are not the host's to name."""

from collections.abc import Callable

from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.structs import Attributes, TdParams, Xfam
from softtdx.attack.flawed import Flaw, flawed_host
from softtdx.attack.lab import Observation, Outcome, attack
from softtdx.attack.scene import PAGE, SECRET, Scene, Seamcall, Seen, Victim, judge
from softtdx.hw import LogicalProcessor, Registers
from softtdx.vmm import Machine, MachineError
from softtdx.vmm.launcher import FIRMWARE_BASE
from softtdx.vmm.python_guest import PythonGuest, Td

__all__: list[str] = []

_Change = Callable[[TdParams], None]
_AD_BITS, _THREE_LEVELS = 1 << 6, 2 << 3  # of EPTP_CONTROLS: accessed and dirty flags; the walk
_FLAG_UNKNOWN = 1 << 40
_RESERVED = (20, 42, 79, 232, 255, 704, 1023)  # bytes that no field of TD_PARAMS claims


def _unchecked(*checks: str) -> tuple[Flaw, ...]:
    return tuple(Flaw("leaves/mng_init.py", check, "") for check in checks)


_NO_CHECKS = _unchecked(
    "    if not attributes_valid(config.attributes_fixed0, config.attributes_fixed1, attributes):\n"
    "        raise _invalid(Operand.ATTRIBUTES)\n",
    "    if not xfam_valid(config.xcr0_supported | config.xss_supported, xfam):\n"
    "        raise _invalid(Operand.XFAM)\n",
    "    if not config_flags_valid(flags):\n        raise _invalid(Operand.EXEC_CONTROLS)\n",
    "    if not eptp_controls_valid(config.msrs[0x48C], bool(flags & limits.CONFIG_GPAW), eptp):\n"
    "        raise _invalid(Operand.EPTP_CONTROLS)\n",
    "    if not TSC_MIN_UNITS <= tsc_frequency <= TSC_MAX_UNITS:\n        raise _invalid(Operand.TSC_FREQUENCY)\n",
    "    if any(params[20:24]):\n        raise _invalid(Operand.RDX)\n",
    "    if any(params[42:80]):\n        raise _invalid(Operand.RDX)\n",
    "    if msr_ctls & ~1 or any(params[232:256]):\n        raise _invalid(Operand.RDX)\n",
    "    if any(params[704:]):\n        raise _invalid(Operand.RDX)\n",
)
_ANY_SOURCE = Flaw("leaves/mem_page.py", "    check_shared(call.g, source, PAGE, R9)\n", "")


def _set(name: str, value: int) -> _Change:
    return lambda params: setattr(params, name, getattr(params, name) | value)


def _be(name: str, value: int) -> _Change:
    return lambda params: setattr(params, name, value)


def _poke(at: int) -> _Change:
    def change(params: TdParams) -> None:
        params.view[at] |= 1

    return change


_TRICKS: dict[str, _Change] = {
    "reserved ATTRIBUTES": _set("attributes", 1 << 20),
    "a debug TD that can be migrated": _set("attributes", Attributes.DEBUG | Attributes.MIGRATABLE),
    "profiling of a TD that can be migrated": _set("attributes", Attributes.PERFMON | Attributes.MIGRATABLE),
    "XFAM without x87": _be("xfam", int(Xfam.SSE)),
    "half of AVX-512 in XFAM": _set("xfam", int(Xfam.AVX) | 1 << 5),
    "reserved XFAM": _set("xfam", 1 << 40),
    "A/D flags in EPTP_CONTROLS": _set("eptp_controls", _AD_BITS),
    "an uncached EPT": _be("eptp_controls", 3 << 3),
    "an EPT of three levels": _be("eptp_controls", 6 | _THREE_LEVELS),
    "52-bit addresses with four levels": _set("config_flags", 1),
    "reserved CONFIG_FLAGS": _set("config_flags", _FLAG_UNKNOWN),
    "a clock that stands still": _be("tsc_frequency", 0),
    **{f"reserved byte {at}": _poke(at) for at in _RESERVED},
}


@attack(
    "td-params-tricks",
    "control",
    title="The host asks for TDs that must not be",
    promise="TDH.MNG.INIT checks every bit of TD_PARAMS: OPERAND_INVALID, and there is no TD.",
    expected=Outcome.STOPPED,
    unprotected="a TDX module that does not check what the host asks for",
)
def td_params_tricks(scene: Scene) -> Observation:
    """One TD for each trick: reserved bits, combinations that leak, half features, an EPT or a clock that cannot be.

    What the module lets pass is in force: these fields decide what the processor keeps of a TD and shows of it.
    """
    flawed_host(scene, *_NO_CHECKS)
    built, refusals = [], []
    for name, change in _TRICKS.items():

        def mng_init(lp: LogicalProcessor, regs: Registers, call: Seamcall, change: _Change = change) -> None:
            del lp
            params = TdParams(bytearray(scene.memory.read(regs.rdx, TdParams.SIZE)))
            change(params)
            scene.memory.write(regs.rdx, bytes(params.view))
            call(regs)

        with scene.instead_of(Leaf.MNG_INIT, mng_init):
            try:
                Machine(scene.host, scene.config()).close()
            except MachineError as error:
                refusals.append(f"{name}: {error}")
            else:
                built.append(name)
    assert all("OPERAND_INVALID" in refusal for refusal in refusals), refusals
    if not built:
        Machine(scene.host, scene.config()).close()  # the same without a trick
        return Observation(Outcome.STOPPED, f"{len(_TRICKS)} kinds of TD_PARAMS were refused: OPERAND_INVALID")
    assert len(built) == len(_TRICKS), f"refused were {_TRICKS.keys() - set(built)}"
    return Observation(Outcome.CORRUPTED, f"{len(built)} TDs were built, the first with {built[0]}")


@attack(
    "source-of-another",
    "control",
    title="The host names another TD's page as source of a new TD's memory",
    promise="Addresses of host buffers must have a shared KeyID and lie outside SEAMRR: OPERAND_INVALID.",
    expected=Outcome.STOPPED,
    unprotected="a TDX module that reads whatever address it is given",
)
def source_of_another(scene: Scene) -> Observation:
    """SEAM mode may name every KeyID. TDH.MEM.PAGE.ADD is asked to copy the victim's page, with the victim's KeyID.

    The copy is the first page of an accomplice, which reads it: the module as a confused deputy.
    """
    flawed_host(scene, _ANY_SOURCE)
    source, learned = 0, b""

    def owner(td: Td) -> None:
        nonlocal source
        victim = Victim(first, td)
        source = scene.description.keyed(victim.pa(), victim.hkid())

    def accomplice(td: Td) -> None:
        nonlocal learned
        learned = td.read(FIRMWARE_BASE, PAGE)

    def page_add(lp: LogicalProcessor, regs: Registers, call: Seamcall) -> None:
        del lp
        if regs.rcx & -PAGE == FIRMWARE_BASE:
            regs.r9 = source
        call(regs)

    with PythonGuest(scene.host, owner, scene.config()) as first:
        first.run()
        with scene.instead_of(Leaf.MEM_PAGE_ADD, page_add):
            try:
                with PythonGuest(scene.host, accomplice, scene.config()) as second:
                    second.run()
            except MachineError as error:
                return judge(Seen(note=str(error)), SECRET, "")
    return judge(Seen(learned, "the module copied the victim's page into the accomplice"), SECRET, "")
