"""Attacks from the wrong mode: SEAM's instructions where they do not exist, and the range of memory that is SEAM's."""

from collections.abc import Callable

from softtdx.abi import vmcs
from softtdx.abi.exits import ExitReason
from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.structs import SysInfoTable
from softtdx.attack.lab import Observation, Outcome, attack
from softtdx.attack.scene import LINE, PAGE, SECRET, SECRET_GPA, SPARE_GPA, Scene, Seen, Victim, judge
from softtdx.hw import LogicalProcessor, Mode, Platform, Registers, preset
from softtdx.hw.faults import GeneralProtection, UndefinedOpcode, VmFail
from softtdx.kvm import Host
from softtdx.kvm import seamcalls as sc
from softtdx.seamldr import development_release
from softtdx.vmm import MachineConfig
from softtdx.vmm.python_guest import GuestException, PythonGuest, Td

__all__: list[str] = []

_SEAMCALL, _SEAMRET = bytes.fromhex("660f01cf"), bytes.fromhex("660f01cd")
_SEAMOPS, _TDCALL = bytes.fromhex("660f01ce"), bytes.fromhex("660f01cc")
_UD_VECTOR = 6
_RAX, _R8 = 0, 8


def _mem_rd(victim: Victim, at: int) -> Registers:
    """The registers of the SEAMCALL that reads eight bytes of a debug TD."""
    return Registers(rax=Leaf.MEM_RD, rcx=SECRET_GPA + at, rdx=victim.tdx().require_tdr())


def _fault(action: Callable[[], object]) -> str:
    """What the instruction raised; "nothing" if it was executed."""
    try:
        action()
    except UndefinedOpcode:
        return "#UD"
    except GeneralProtection:
        return "#GP"
    except VmFail:
        return "VMfailInvalid"
    return "nothing"


@attack(
    "seamcall-wrong-mode",
    "control",
    title="Software without the right to it executes SEAMCALL",
    promise="SEAMCALL is for CPL 0 in VMX root operation: #GP at CPL 3, #UD before VMXON, after VMXOFF and in SMM.",
    expected=Outcome.STOPPED,
    unprotected="a host kernel with a driver that executes the SEAMCALLs of its processes for them",
)
def seamcall_wrong_mode(scene: Scene) -> Observation:
    """A process of the host reads a debug TD by TDH.MEM.RD. It tries at CPL 3, outside VMX operation and in SMM.

    It tries SEAMRET, SEAMOPS and TDCALL as well, and SEAMCALL before SEAMRR is set up and before a module is loaded.
    """
    scene.always_debug = True

    def act(victim: Victim) -> Seen:
        learned, said = b"", []
        with scene.host.cpus.run() as lp:
            for at in range(0, LINE, 8):
                regs = _mem_rd(victim, at)
                if not scene.protected:
                    sc.enter(lp, regs)
                elif at == 0:
                    said = [_try_everything(lp, mode, regs) for mode in (Mode.USER, Mode.OUTSIDE_VMX, Mode.SMM)]
                learned += regs.r8.to_bytes(8, "little")
        if scene.protected:
            said.append(_too_early())
        return Seen(learned, "; ".join(said))

    return scene.under_attack(act)


def _try_everything(lp: LogicalProcessor, mode: Mode, regs: Registers) -> str:
    with lp.executing_in(mode):
        call = _fault(lambda: lp.seamcall(regs))
        others = {_fault(other) for other in (lp.seamret, lp.seamops, lp.tdcall)}
    assert call == ("#GP" if mode is Mode.USER else "#UD"), f"SEAMCALL in {mode.value} mode: {call}"
    assert others == {"#UD"}, others
    return f"SEAMCALL in {mode.value} mode: {call}"


def _too_early() -> str:
    """On a machine that has just been powered on."""
    platform = Platform(preset("spr"))
    lp = platform.lps[0]
    without_module = _fault(lambda: lp.seamcall(Registers(rax=Leaf.SYS_INFO)))
    platform.seam.enabled = False
    without_seamrr = _fault(lambda: lp.seamcall(Registers(rax=Leaf.SYS_INFO)))
    assert (without_module, without_seamrr) == ("VMfailInvalid", "#GP"), (without_module, without_seamrr)
    return "without a module VMfailInvalid, without SEAMRR #GP"


def _machine_code(td: Td, code: bytes, registers: Registers) -> Registers | GuestException:
    td.write(SPARE_GPA, code + td.escape)
    try:
        return td.execute(SPARE_GPA, **dict(registers.items()))
    except GuestException as exception:
        return exception


@attack(
    "seamcall-by-guest",
    "control",
    title="A guest executes SEAMCALL, to command the TDX module itself",
    promise="SEAMCALL in a VM exits to its host, which gives #UD; in a TD it is #UD by the module.",
    expected=Outcome.STOPPED,
    unprotected="a hypervisor that executes the SEAMCALLs of its VMs for them",
)
def seamcall_by_guest(scene: Scene) -> Observation:
    """A neighbour of the victim, which is a debug TD, executes SEAMCALL with the operands of TDH.MEM.RD.

    On the protected side another TD tries the same, and both try SEAMRET and SEAMOPS, the VM also TDCALL.
    """
    scene.always_debug = True
    learned, said = b"", []

    def neighbour(td: Td, guest: PythonGuest, victim: Victim) -> None:
        nonlocal learned
        Victim(guest, td, secret=bytes(PAGE)).touch(SPARE_GPA)
        if not scene.protected:
            _pass_on(guest)
        for at in range(0, LINE, 8) if not scene.protected else (0,):
            result = _machine_code(td, _SEAMCALL, _mem_rd(victim, at))
            if isinstance(result, Registers):
                learned += result.r8.to_bytes(8, "little")
            else:
                said.append(f"SEAMCALL in a {'TD' if td.is_td else 'VM'}: {result}")
        if scene.protected:
            for code in (_SEAMCALL, _SEAMRET, _SEAMOPS, *(() if td.is_td else (_TDCALL,))):
                result = _machine_code(td, code, Registers())
                assert isinstance(result, GuestException), code.hex()
                assert result.vector == _UD_VECTOR, result

    def start_neighbour(victim: Victim, *, vm: bool) -> None:
        config = MachineConfig(memory=1 << 20, vm=vm)
        with PythonGuest(scene.host, lambda td: neighbour(td, guest, victim), config) as guest:
            guest.run()

    place: list[Victim] = []

    def owner(td: Td) -> None:
        place.append(Victim(first, td))

    # The victim has done its work and is still there when the neighbour starts.
    with PythonGuest(scene.host, owner, scene.config()) as first:
        first.run()
        for vm in (True, False) if scene.protected else (True,):
            start_neighbour(place[0], vm=vm)
    return judge(Seen(learned, "; ".join(said) or "the hypervisor passed the VM's SEAMCALLs on"), SECRET, "")


def _pass_on(guest: PythonGuest) -> None:
    """A hypervisor that means well: SEAMCALL exits, and is executed with the VM's registers."""
    ops = guest.machine.vcpus[0].ops
    answer = ops.handle_exit

    def handle_exit(lp: LogicalProcessor) -> bool:
        if lp.core.vmread(vmcs.EXIT_REASON) & 0xFFFF != ExitReason.SEAMCALL:
            return answer(lp)
        gprs = ops.gprs  # type: ignore[attr-defined]
        regs = Registers(rax=gprs[0], rcx=gprs[1], rdx=gprs[2])
        sc.enter(lp, regs)
        gprs[_RAX], gprs[_R8] = regs.rax, regs.r8
        ops._skip(lp)  # type: ignore[attr-defined]
        return True

    ops.handle_exit = handle_exit  # type: ignore[method-assign]


@attack(
    "seamrr-write",
    "control",
    title="The host rewrites what lies in SEAMRR",
    promise="Only SEAM mode reaches SEAMRR: a load of the host gives all ones, a store is dropped.",
    expected=Outcome.STOPPED,
    unprotected="a platform whose firmware left SEAMRR without protection",
)
def seamrr_write(scene: Scene) -> Observation:
    """Firmware left the list of convertible memory there, for loader and module. The host adds a range to it.

    Memory outside of the list is not protected: a device, a riser with somebody's own controller. With the list as it
    was, the module refuses a TDMR there.
    """
    host = Host(Platform(scene.description))
    platform, seam = host.platform, host.platform.seam
    if not scene.protected:
        platform.memory.set_seamrr(0, 0)
    found = platform.memory.read(seam.base, SysInfoTable.SIZE)
    table = SysInfoTable(bytearray(found))
    base, size = scene.description.cmrs[-1]
    outside = -(-(base + size) >> 30 << 30) + (1 << 30)
    number = len(scene.description.cmrs)
    table.cmr_data[number].base, table.cmr_data[number].size = outside, 1 << 30
    platform.memory.write(seam.base, bytes(table.view))
    said = "loads of SEAMRR give all ones, " if found == b"\xff" * len(found) else ""
    tdx = host.enable_tdx(development_release())
    known = [start for start, length in tdx.sysinfo.cmrs if length]
    if outside in known:
        return Observation(Outcome.CORRUPTED, f"the module takes {outside:#x} for convertible memory")
    assert len(known) == number
    return Observation(Outcome.STOPPED, f"{said}and the module knows {number} range(s), as before")
