"""The user's terminal as a machine's console: raw input, Ctrl-] to leave, a progress line while nothing is printed."""

import contextlib
import os
import select
import sys
import termios
import threading
import time
import tty
from typing import Any

from softtdx.vmm.linux.machine import LinuxMachine, Stage

__all__ = ["Terminal"]

_LEAVE = b"\x1d"  # Ctrl-]
_INTERVAL = 0.25
_TEXT = {
    Stage.OFF: "building the machine",
    Stage.STARTED: "firmware: accepting memory",
    Stage.MEMORY: "firmware: measuring kernel and initrd",
    Stage.MEASURED: "firmware: entering the kernel",
    Stage.KERNEL: "kernel: unpacking and starting",
    Stage.CONSOLE: "kernel: starting drivers",
    Stage.USERSPACE: "userspace",
}


class Terminal:
    """Use it in a with statement around the machine's life. `output` is the machine's console."""

    def __init__(self, *, quiet: bool, interactive: bool) -> None:
        """`quiet`: print nothing. `interactive`: what is typed goes to the guest, if stdin is a terminal."""
        self._quiet = quiet
        self.interactive = interactive and sys.stdin.isatty()
        self._progress = sys.stderr.isatty()
        self._printed = False
        self._done = threading.Event()
        self._machine: LinuxMachine | None = None
        self._saved: list[Any] | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Terminal":
        """Raw mode."""
        if self.interactive:
            self._saved = termios.tcgetattr(sys.stdin)
            tty.setraw(sys.stdin)
        return self

    def __exit__(self, *exc: object) -> None:
        """The terminal as it was."""
        self._done.set()
        for thread in self._threads:
            thread.join()
        self._clear()
        if self._saved is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._saved)

    def output(self, data: bytes) -> None:
        """What the guest prints."""
        if self._quiet:
            return
        if not self._printed:
            self._clear()
            self._printed = True
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

    def attach(self, machine: LinuxMachine) -> None:
        """The machine is about to run."""
        self._machine = machine
        if self._progress:
            self._start(self._show_progress)
        if self.interactive:
            self._start(self._read_input)

    def _start(self, function: Any) -> None:
        thread = threading.Thread(target=function, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _show_progress(self) -> None:
        assert self._machine is not None
        start = time.perf_counter()
        while not self._done.wait(_INTERVAL) and not self._printed:
            text = _TEXT.get(self._machine.stage, "")
            line = f"{text} · {self._machine.instructions() // 1_000_000} M instructions · "
            sys.stderr.write(f"\r\x1b[K{line}{time.perf_counter() - start:.0f} s")
            sys.stderr.flush()

    def _clear(self) -> None:
        if self._progress:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _read_input(self) -> None:
        assert self._machine is not None
        while not self._done.is_set():
            if not select.select([sys.stdin], [], [], _INTERVAL)[0]:
                continue
            data = os.read(sys.stdin.fileno(), 1024)
            if not data or _LEAVE in data:
                self._machine.stop()
                return
            self._machine.type(data)
