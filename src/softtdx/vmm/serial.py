"""A 16550 serial port, as much of it as software uses that polls it."""

from collections.abc import Callable

__all__ = ["Serial16550"]

_DATA, _IER, _IIR_FCR, _LCR, _MCR, _LSR, _MSR, _SCRATCH = range(8)
_DLAB = 0x80
_LSR_EMPTY = 0x60  # transmitter and holding register
_LSR_DATA_READY = 0x01
_IIR_NONE, _IIR_EMPTY, _IIR_DATA = 0x01, 0x02, 0x04
_IER_DATA, _IER_EMPTY = 0x01, 0x02
_IIR_FIFO = 0xC0
_MSR_READY = 0xB0  # CD, DSR, CTS
_LOOPBACK = 0x10


class Serial16550:
    """COM1: `write` and `read` are accesses to its eight registers; transmission takes no time."""

    def __init__(self, output: Callable[[bytes], None]) -> None:
        """`output` gets every byte sent."""
        self._output = output
        self._input = bytearray()
        self._registers = bytearray(8)
        self._divisor = bytearray(2)
        self._fifo = False
        self._became_empty = False  # since IIR was last read: transmission takes no time

    def feed(self, data: bytes) -> None:
        """Bytes arriving on the line."""
        self._input += data

    def write(self, register: int, value: int) -> None:
        """The guest writes a register (0 to 7)."""
        divisor_open = self._registers[_LCR] & _DLAB
        if register in (_DATA, _IER) and divisor_open:
            self._divisor[register] = value
        elif register == _DATA:
            if self._registers[_MCR] & _LOOPBACK:
                self._input.append(value)
            else:
                self._output(bytes([value]))
                self._became_empty = True
        elif register == _IIR_FCR:
            self._fifo = bool(value & 1)
        elif register not in (_LSR, _MSR):
            if register == _IER and value & _IER_EMPTY:
                self._became_empty = True
            self._registers[register] = value

    def read(self, register: int) -> int:
        """The guest reads a register."""
        if register in (_DATA, _IER) and self._registers[_LCR] & _DLAB:
            return self._divisor[register]
        if register == _DATA:
            return self._input.pop(0) if self._input else 0
        if register == _IIR_FCR:
            return self._interrupt() | (_IIR_FIFO if self._fifo else 0)
        if register == _LSR:
            return _LSR_EMPTY | (_LSR_DATA_READY if self._input else 0)
        if register == _MSR:
            return _MSR_READY
        return self._registers[register]

    def _interrupt(self) -> int:
        """What IIR shows: no interrupt line leads anywhere, but a driver that polls looks here."""
        enabled = self._registers[_IER]
        if enabled & _IER_DATA and self._input:
            return _IIR_DATA
        if enabled & _IER_EMPTY and self._became_empty:
            self._became_empty = False
            return _IIR_EMPTY
        return _IIR_NONE
