"""The devices of the machine: what answers on its I/O ports.

0x3F8 to 0x3FF COM1; 0x501 exit: a byte written ends the machine with that status; 0x510 park: a read waits until
another vCPU writes; 0x512 the launcher's agent, if there is one. Nothing answers elsewhere: reads float high, writes
are lost.
"""

from collections.abc import Callable
from threading import Condition

from softtdx.kvm.uapi import IoExit
from softtdx.vmm.agent import AGENT_PORT
from softtdx.vmm.serial import Serial16550

__all__ = ["PortBus"]

SERIAL_BASE = 0x3F8
EXIT_PORT = 0x501
PARK_PORT = 0x510


class PortBus:
    """Dispatches KVM_EXIT_IO. `park(vcpu)` blocks its thread, `wake` ends that for all."""

    def __init__(
        self,
        console: Callable[[bytes], None],
        end: Callable[[int], None],
        park: Callable[[int], None],
        wake: Callable[[], None],
        agent: Callable[[int, IoExit], None] | None = None,
    ) -> None:
        """`console` gets serial output, `end` the exit status, `agent` accesses of its port."""
        self.serial = Serial16550(console)
        self._lock = Condition()
        self._end = end
        self._park = park
        self._wake = wake
        self._agent = agent

    def access(self, vcpu: int, io: IoExit) -> None:
        """One port access of a vCPU; a value read is left in `io`. Wider ones touch neighbouring byte registers."""
        if io.port == PARK_PORT:
            if io.write:
                self._wake()
            else:
                self._park(vcpu)
                io.value = 0
        elif io.port == AGENT_PORT and self._agent is not None:
            self._agent(vcpu, io)
        elif io.port == EXIT_PORT:
            if io.write:
                self._end(io.value & 0xFF)
            else:
                io.value = 0
        elif SERIAL_BASE <= io.port < SERIAL_BASE + 8:
            self._serial(io)
        elif not io.write:
            io.value = (1 << 8 * io.size) - 1

    def _serial(self, io: IoExit) -> None:
        value = 0
        with self._lock:
            for i in range(io.size):
                register = io.port - SERIAL_BASE + i
                if io.write and register < 8:
                    self.serial.write(register, io.value >> 8 * i & 0xFF)
                elif not io.write:
                    value |= (self.serial.read(register) if register < 8 else 0xFF) << 8 * i
        if not io.write:
            io.value = value
