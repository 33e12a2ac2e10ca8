"""The machine under attack: a victim that holds a secret in its memory, and what an attacker can reach.

The victim is a Python guest: its loads and stores go through the interpreter, the page tables and the encryption
engine like those of any guest. The attacker acts between two of its instructions, from another processor.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType

from softtdx._silicon import Memory
from softtdx.abi.ghci import VmcallLeaf
from softtdx.abi.leaves import LEAF_MASK, SeamcallLeaf
from softtdx.abi.status import status_of
from softtdx.attack.lab import Observation, Outcome, Side
from softtdx.attack.probe import page_of
from softtdx.hw import Dram, LogicalProcessor, PlatformDescription, Registers, preset
from softtdx.hw.faults import MachineCheck
from softtdx.kvm import Host, KvmError
from softtdx.kvm.memory import PAGE
from softtdx.kvm.seamcalls import seamcall
from softtdx.kvm.tdx import TdxVm
from softtdx.kvm.tdx_vcpu import TdxVcpu
from softtdx.kvm.vmx import VmxVcpu
from softtdx.vmm import GuestError, Machine, MachineConfig
from softtdx.vmm.boot import boot_host
from softtdx.vmm.python_guest import PythonGuest, Td

__all__ = ["LINE", "PAGE", "SECRET", "SECRET_GPA", "SPARE_GPA", "Scene", "Seen", "Victim", "judge", "say"]

LINE = 64
SECRET_GPA = 0x40_000
SPARE_GPA = 0x50_000
SECRET = hashlib.shake_256(b"what only the guest knows").digest(PAGE)
_MEMORY = 1 << 20
_ALL_CONTEXTS = 2
_ENOUGH = 16  # bytes of the secret in a row: by chance they occur nowhere


Seamcall = Callable[[Registers], Registers]


@dataclass(frozen=True)
class Seen:
    """What an attacker came away with: bytes he could read, and a line on how it went."""

    learned: bytes = b""
    note: str = ""

    @property
    def has_secret(self) -> bool:
        """Whether a piece of the secret is among what he learned."""
        return any(SECRET[i : i + _ENOUGH] in self.learned for i in range(0, PAGE, _ENOUGH))


class Victim:
    """A guest with the secret at SECRET_GPA, stopped between two instructions."""

    def __init__(self, guest: PythonGuest, td: Td, secret: bytes = SECRET) -> None:
        """Accepts (in a TD) and fills its page."""
        self.machine = guest.machine
        self.td = td
        self.touch(SECRET_GPA)
        td.write(SECRET_GPA, secret)

    def touch(self, gpa: int) -> None:
        """Have a page mapped and zero."""
        if self.td.is_td:
            if self.td.accept(gpa):
                raise GuestError(f"the victim cannot accept its page {gpa:#x}")
        else:
            self.td.store(gpa, 0)

    def pa(self, gpa: int = SECRET_GPA) -> int:
        """The DRAM address behind a page, which the host knows: it gave the page."""
        return page_of(self.machine, gpa)

    def put_at(self, gpa: int, page: int) -> None:
        """The host backs a GPA that the guest has not touched yet with this page, which it allocated."""
        slot = self.machine.vm.memslots.find(gpa)
        assert slot is not None
        if slot.guest_memfd is None:
            ept = self.machine.vm.ept
            assert ept is not None
            ept.map(gpa, page)
            return
        index = slot.file_offset(gpa) // PAGE
        slot.guest_memfd.get_page(index)
        old = slot.guest_memfd.replace(index, page)
        if old is not None:
            self.machine.host.memory.free(old)

    def flush(self) -> None:
        """INVEPT on the processor that the victim stands on."""
        self.td.processor.core.invept(_ALL_CONTEXTS, 0)

    def leave(self) -> None:
        """Let the guest exit once, as a kick does."""
        if self.td.is_td:
            self.td.tdvmcall(VmcallLeaf.GET_TDVMCALL_INFO)
        else:
            self.td.cpuid(0)

    def outside(self, act: Callable[[LogicalProcessor], None], **registers: int) -> Registers:
        """Let the host do `act` while the vCPU is out of the guest: at its next exit, before the host answers it.

        The guest exits with `registers` (see `Td.hold`) and gets back what is returned.
        """
        ops = self.machine.vcpus[0].ops
        answer = ops.handle_exit

        def handle_exit(lp: LogicalProcessor) -> bool:
            del ops.handle_exit
            act(lp)
            return answer(lp)

        ops.handle_exit = handle_exit  # type: ignore[method-assign]
        return self.td.hold(**registers)

    def vmx_vcpu(self) -> VmxVcpu:
        """The host's whole state of an ordinary VM's vCPU."""
        ops = self.machine.vcpus[0].ops
        assert isinstance(ops, VmxVcpu)
        return ops

    def tdx_vcpu(self) -> TdxVcpu:
        """What KVM has of a TD's vCPU."""
        ops = self.machine.vcpus[0].ops
        assert isinstance(ops, TdxVcpu)
        return ops

    def tdvpr(self) -> int:
        """The root page of the vCPU's TDVPS."""
        page = self.tdx_vcpu().tdvpr
        assert page is not None
        return page

    def tdx(self) -> TdxVm:
        """KVM's side of the TD."""
        assert isinstance(self.machine.vm.ops, TdxVm)
        return self.machine.vm.ops

    def hkid(self) -> int:
        """The TD's KeyID, which the host gave it."""
        hkid = self.tdx().hkid
        assert hkid is not None
        return hkid


class Scene:
    """One side of an attack. Use it in a with statement.

    Protected: a TD on a platform with cryptographic integrity. Unprotected: an ordinary VM on a platform without
    integrity; an attack on the DIMMs sets `bare_dram` first, which switches total memory encryption off there too, and
    an attack by way of the TDX module sets `debug_td`, so that the victim there is a TD with ATTRIBUTES.DEBUG.
    With `always_td` it is an ordinary TD there too, and the attack says what else is missing; with `bare_td` that is
    the integrity of memory, its cryptographic and its logical half. With `always_debug` the victim is a debug TD on
    both sides: the call that reads its secret would succeed, if it were let through. With `logical` the protected side
    has logical integrity only, TD-owner bits without MACs.
    """

    def __init__(self, side: Side) -> None:
        """Nothing is built before `host` is asked for."""
        self.side = side
        self.bare_dram = False
        self.debug_td = False
        self.always_td = False
        self.bare_td = False
        self.always_debug = False
        self.logical = False
        self._host: Host | None = None

    def __enter__(self) -> "Scene":
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Forget the machine."""
        self._host = None

    @property
    def protected(self) -> bool:
        """Whether this is the protected side."""
        return self.side is Side.PROTECTED

    @property
    def is_td(self) -> bool:
        """Whether the victim is a TD."""
        return self.protected or self.debug_td or self.always_td or self.bare_td or self.always_debug

    @property
    def description(self) -> PlatformDescription:
        """The machine of this side."""
        # Two guests may stand between two instructions at once, and the attacker needs a processor of his own.
        d = replace(preset("spr"), lps=4)
        if self.bare_td and not self.protected:
            return replace(d, integrity="none")
        if self.logical and self.protected:
            return replace(d, integrity="logical")
        return d if self.is_td else replace(d, integrity="none", tme=not self.bare_dram)

    @property
    def host(self) -> Host:
        """The booted host, which the attacker owns."""
        if self._host is None:
            self._host = boot_host(self.description, tdx=self.is_td)
        return self._host

    @host.setter
    def host(self, host: Host) -> None:
        """Attack a host that was booted in another way."""
        self._host = host

    @property
    def memory(self) -> Memory:
        """Memory as the host's software has it."""
        return self.host.platform.memory

    @property
    def dram(self) -> Dram:
        """The DIMMs, as a probe or an interposer has them."""
        return self.host.platform.dram

    def config(self) -> MachineConfig:
        """The victim's machine."""
        debug = self.always_debug or (self.debug_td and not self.protected)
        return MachineConfig(memory=_MEMORY, vm=not self.is_td, debug_td=debug)

    def seamcall(self, leaf: SeamcallLeaf, **operands: int) -> Registers:
        """A SEAMCALL by the hostile host, on any free processor, its status not looked at."""
        with self.host.cpus.run() as lp:
            return seamcall(lp, leaf, **operands)

    @contextmanager
    def instead_of(
        self, leaf: SeamcallLeaf, act: Callable[[LogicalProcessor, Registers, Seamcall], None]
    ) -> Iterator[None]:
        """While entered: where the host calls `leaf`, `act` is called instead, with its registers and the real call."""

        def around(lp: LogicalProcessor, call: Seamcall) -> Seamcall:
            def seamcall(regs: Registers) -> Registers:
                if regs.rax & LEAF_MASK == leaf:
                    act(lp, regs, call)
                    return regs
                return call(regs)

            return seamcall

        lps = self.host.platform.lps
        before = [vars(lp).get("seamcall") for lp in lps]  # of another such hook
        for lp in lps:
            lp.seamcall = around(lp, lp.seamcall)  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            for lp, call in zip(lps, before, strict=True):
                if call is None:
                    del lp.seamcall
                else:
                    lp.seamcall = call  # type: ignore[method-assign]

    def under_attack(self, act: Callable[[Victim], Seen], *, interrupts: bool = False) -> Observation:
        """Start a victim, let `act` happen between two of its instructions, then let it read its secret.

        With `interrupts` its vCPU has a local APIC.
        """
        seen, view = Seen(), b""

        def program(td: Td) -> None:
            nonlocal seen, view
            seen = act(Victim(guest, td))
            view = td.read(SECRET_GPA, PAGE)
            if interrupts:  # a guest with a local APIC halts for good, since an interrupt might come
                machine.stop()

        machine = Machine(self.host, self.config())
        if interrupts:
            machine.vm.create_irqchip()
        guest = PythonGuest(self.host, program, machine=machine)
        death = ""
        try:
            guest.run()
        except (GuestError, MachineCheck) as error:
            death = str(error)
        finally:
            try:
                guest.close()
            except (KvmError, MachineCheck) as error:  # the module died with its TDs
                death = death or str(error)
        return judge(seen, view, death)


def judge(seen: Seen, view: bytes, death: str) -> Observation:
    """The outcome: a leak counts before everything, then the victim's death, then what it read."""
    if seen.has_secret:
        return Observation(Outcome.LEAKED, f"the attacker read {SECRET[:8].hex()}…; {seen.note}".rstrip("; "))
    if death:
        return Observation(Outcome.DETECTED, f"{death} ({seen.note})" if seen.note else death)
    if view != SECRET:
        at = next(i for i in range(PAGE) if view[i : i + 1] != SECRET[i : i + 1])
        found = view[at : at + 8].hex()
        return Observation(Outcome.CORRUPTED, f"the victim read {found}… at offset {at}; {seen.note}".rstrip("; "))
    return Observation(Outcome.STOPPED, seen.note or "nothing was read, nothing changed")


def say(leaf: SeamcallLeaf, regs: Registers) -> str:
    """What a SEAMCALL came to, in words."""
    return f"{leaf.mnemonic}: {status_of(regs.rax).name}"
