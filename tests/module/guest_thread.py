"""A vCPU that does what a test tells it: VP.ENTER on a thread of its own, VM exits made by hand."""

import queue
import threading
from typing import Any

from tdx_machine import Leaf

from softtdx.abi.leaves import TdcallLeaf
from softtdx.hw import Registers
from softtdx.hw.lp import LogicalProcessor
from softtdx.hw.registers import GPR_NAMES

EXTERNAL_INTERRUPT, TDCALL = 1, 77
EXIT_REASON, EXIT_QUALIFICATION, EXIT_INTERRUPTION, INSTRUCTION_LENGTH = 0x4402, 0x6400, 0x4404, 0x440C
CS_AR, EFER = 0x4816, 0x2806
PATIENCE = 60


class GuestThread:
    """One visit to a TD: from VP.ENTER until the TD exit, which `exit` then holds."""

    def __init__(self, lp: LogicalProcessor, tdvpr: int) -> None:
        """Enter; returns when the guest could run its first instruction, or VP.ENTER came back at once."""
        self.lp = lp
        self.exit: Registers | None = None
        self.failure: BaseException | None = None
        self._events: queue.Queue[str] = queue.Queue()
        self._orders: queue.Queue[tuple[int, dict[str, int]] | None] = queue.Queue()
        self.state: dict[str, int] = {}
        lp.guest_engine = self._engine
        self._thread = threading.Thread(target=self._run, args=(tdvpr,), daemon=True)
        self._thread.start()
        self._wait()

    def _run(self, tdvpr: int) -> None:
        try:
            self.exit = self.lp.seamcall(Registers(rax=Leaf.VP_ENTER, rcx=tdvpr))
        except BaseException as failure:  # handed to the test's thread
            self.failure = failure
        self._events.put("out")

    def _engine(self, core: Any, launch: bool) -> int:
        """The processor in non-root mode: reports where it is and makes the VM exit it is told to make."""
        del launch
        core.vmwrite(0x4016, core.vmread(0x4016) & ~(1 << 31))  # the event was delivered
        self.state = dict(zip(GPR_NAMES, core.gprs(), strict=True))
        self._events.put("in")
        order = self._orders.get(timeout=PATIENCE)
        if order is None:
            raise RuntimeError("the test gave the vCPU up")
        reason, operands = order
        gprs = dict.fromkeys(GPR_NAMES, 0) | operands
        core.set_gprs(tuple(gprs[name] for name in GPR_NAMES))
        core.vmwrite(EFER, core.vmread(EFER) | 0x500)
        core.vmwrite(CS_AR, 0xA09B)
        core.vmwrite(EXIT_REASON, reason)
        core.vmwrite(EXIT_QUALIFICATION, 0)
        core.vmwrite(INSTRUCTION_LENGTH, 4 if reason == TDCALL else 0)
        core.vmwrite(EXIT_INTERRUPTION, 0x8000_0020 if reason == EXTERNAL_INTERRUPT else 0)
        return reason

    def _wait(self) -> bool:
        """Until the guest is in (True) or out (False)."""
        event = self._events.get(timeout=PATIENCE)
        if event == "out":
            self._thread.join(PATIENCE)
            self.lp.guest_engine = None
            if self.failure:
                raise self.failure
        return event == "in"

    def order(self, reason: int, **operands: int) -> bool:
        """A VM exit; True when the guest goes on, False when it left to the host."""
        self._orders.put((reason, operands))
        return self._wait()

    def tdcall(self, leaf: TdcallLeaf, **operands: int) -> Registers | None:
        """A TDCALL: the guest's registers behind it, or None after a TD exit."""
        if not self.order(TDCALL, rax=int(leaf), **operands):
            return None
        return Registers(**self.state)

    def interrupt(self) -> Registers:
        """An external interrupt: the TD exits."""
        assert not self.order(EXTERNAL_INTERRUPT)
        assert self.exit is not None
        return self.exit

    def stop(self) -> None:
        """Get out, whatever the guest was doing."""
        if self.exit is None and self.failure is None:
            self.interrupt()
