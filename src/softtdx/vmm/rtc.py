"""The CMOS clock (MC146818) as much of it as an operating system reads at boot: the date, without alarms."""

import time
from collections.abc import Callable

__all__ = ["INDEX_PORT", "CmosClock"]

INDEX_PORT = 0x70
_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR = 0, 2, 4, 6, 7, 8, 9
_STATUS_A, _STATUS_B, _STATUS_C, _STATUS_D = 10, 11, 12, 13
_CENTURY = 0x32
_A_DIVIDER = 0x26  # 32.768 kHz, 1024 Hz; no update in progress
_B_24_HOURS, _B_BINARY = 0x02, 0x04
_D_POWER_GOOD = 0x80
_NMI_DISABLE = 0x80


class CmosClock:
    """Ports 0x70 (index) and 0x71 (data). The date is the host's, in UTC; the guest cannot set it."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        """`now` gives seconds since 1970."""
        self._now = now
        self._index = 0
        self._memory = bytearray(128)
        self._memory[_STATUS_B] = _B_24_HOURS

    def write(self, port: int, value: int) -> None:
        """A byte written to one of the two ports."""
        if port == INDEX_PORT:
            self._index = value & ~_NMI_DISABLE
        elif self._index == _STATUS_B or self._index > _STATUS_D:
            self._memory[self._index] = value

    def read(self, port: int) -> int:
        """A byte read from one of them; the index port floats."""
        if port == INDEX_PORT:
            return 0xFF
        date = time.gmtime(self._now())
        fields = {
            _SECONDS: date.tm_sec,
            _MINUTES: date.tm_min,
            _HOURS: date.tm_hour,
            _WEEKDAY: (date.tm_wday + 1) % 7 + 1,
            _DAY: date.tm_mday,
            _MONTH: date.tm_mon,
            _YEAR: date.tm_year % 100,
            _CENTURY: date.tm_year // 100,
        }
        if self._index in fields:
            value = fields[self._index]
            return value if self._memory[_STATUS_B] & _B_BINARY else value // 10 << 4 | value % 10
        fixed = {_STATUS_A: _A_DIVIDER, _STATUS_C: 0, _STATUS_D: _D_POWER_GOOD}
        return fixed.get(self._index, self._memory[self._index])
