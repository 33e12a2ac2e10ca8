"""The machines that run under a name: each has a control socket in a folder of its user, which other processes ask.

A name belongs to the process that holds the lock NAME.lock (flock, so it ends with the process, however that ends).
NAME.socket, mode 0600 in a folder of mode 0700, takes one JSON object a connection, on one line, and answers likewise:

    {"ask": "info"}                             -> {"name": ..., "pid": ..., "kind": "TD", ...}
    {"ask": "quote", "report_data": "00..."}    -> {"quote": "base64"}
    anything that cannot be done                -> {"error": "why"}
"""

import base64
import binascii
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softtdx.abi.structs import REPORTDATA_SIZE
from softtdx.attest.sockets import StreamListener, connect
from softtdx.errors import SoftTdxError
from softtdx.vmm import agent
from softtdx.vmm.errors import MachineError

__all__ = ["RunningMachine", "announce", "check_name", "find", "running", "runtime_folder"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")
_MAX_PATH = 107  # sun_path, without the NUL
_MAX_LINE = 256 << 10
_CLIENT_TIMEOUT = 30.0  # of one who connects and says nothing; a busy machine may take seconds to say it
_ANSWER_TIMEOUT = agent.TIMEOUT + 15
_LOCK, _SOCKET = ".lock", ".socket"

Info = Callable[[], dict[str, Any]]
Quote = Callable[[bytes], bytes]


def runtime_folder() -> Path:
    """$XDG_RUNTIME_DIR/softtdx, or `run` in the cache folder ($XDG_CACHE_HOME/softtdx, ~/.cache/softtdx)."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "softtdx"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softtdx" / "run"


def check_name(name: str) -> str:
    """The name, if a machine may have it. MachineError otherwise."""
    if not _NAME.fullmatch(name):
        raise MachineError(
            f"{name!r} is no name for a machine: up to 48 letters, digits, dots, underscores and hyphens, a letter or "
            "digit first"
        )
    return name


# --- the side of the machine
@contextmanager
def announce(name: str | None, info: Info, quote: Quote | None = None) -> Iterator[None]:
    """Answer for a machine under `name` while the block runs; nothing without a name.

    `quote` gives the TD's quote with 64 bytes of report data. MachineError when the name is taken.
    """
    if name is None:
        yield
        return
    base = _own_folder() / check_name(name)
    lock = _lock(base.with_name(name + _LOCK), name)
    started = time.time()

    def facts() -> dict[str, Any]:
        return {"name": name, "pid": os.getpid(), "started": round(started, 3)} | info()

    try:
        path = _short_enough(base.with_name(name + _SOCKET))
        listener = StreamListener(
            "control socket", lambda stream: _serve(stream, facts, quote), path, timeout_s=_CLIENT_TIMEOUT
        )
        path.chmod(0o600)
        with listener:
            yield
    finally:
        base.with_name(name + _LOCK).unlink(missing_ok=True)
        os.close(lock)


def _own_folder() -> Path:
    folder = runtime_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid != os.getuid():
            raise MachineError(f"the folder {folder} for control sockets belongs to another user; set XDG_RUNTIME_DIR")
        folder.chmod(0o700)
    except OSError as error:
        raise MachineError(f"no control socket can be made in {folder}: {error.strerror}") from None
    return folder


def _short_enough(path: Path) -> Path:
    if len(os.fsencode(path)) > _MAX_PATH:
        raise MachineError(
            f"the control socket {path} would have a path of more than {_MAX_PATH} bytes, which no Unix socket can "
            "have; choose a shorter name, or set XDG_RUNTIME_DIR to a shorter folder"
        )
    return path


def _lock(path: Path, name: str) -> int:
    """The descriptor that holds the name. Who held it before may just be removing the file: then it is made anew."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise MachineError(f"no machine can be named {name}: {path}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise MachineError(
                f"a machine named {name} runs already; softtdx ps shows it, --name gives this one another name"
            ) from None
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(descriptor)
            raise MachineError(f"no machine can be named {name}: {path} cannot be locked: {error.strerror}") from None
        os.close(descriptor)


def _serve(stream: socket.socket, facts: Info, quote: Quote | None) -> None:
    try:
        answer = _answer(_read_line(stream), facts, quote)
    except SoftTdxError as error:
        answer = {"error": str(error)}
    stream.sendall(json.dumps(answer).encode() + b"\n")


def _answer(line: bytes, facts: Info, quote: Quote | None) -> dict[str, Any]:
    request = _object(line)
    if request.get("ask") == "info":
        return facts()
    if request.get("ask") != "quote":
        raise MachineError("a control socket is asked for info or quote")
    if quote is None:
        raise MachineError("it is an ordinary VM, which has no quotes")
    try:
        report_data = bytes.fromhex(request["report_data"])
    except (KeyError, TypeError, ValueError):
        raise MachineError(f"a quote needs report_data, {REPORTDATA_SIZE} bytes in hexadecimal") from None
    return {"quote": base64.b64encode(quote(report_data)).decode()}


def _read_line(stream: socket.socket) -> bytes:
    """Up to a newline. EOFError when it does not come within what a line may have."""
    line = bytearray()
    while b"\n" not in line:
        chunk = stream.recv(4096)
        if not chunk or len(line) > _MAX_LINE:
            raise EOFError
        line += chunk
    return bytes(line).partition(b"\n")[0]


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise MachineError("a control socket speaks JSON objects, one a line")
    return found


# --- the side of who asks
@dataclass(frozen=True)
class RunningMachine:
    """A machine that another process runs."""

    name: str
    path: Path

    def info(self) -> dict[str, Any]:
        """What it says of itself. MachineError when it does not answer."""
        return self._ask({"ask": "info"}, _CLIENT_TIMEOUT)

    def quote(self, report_data: bytes) -> bytes:
        """A quote that the TD takes with 64 bytes of report data. MachineError with its reason when it does not."""
        answer = self._ask({"ask": "quote", "report_data": report_data.hex()}, _ANSWER_TIMEOUT)
        try:
            return base64.b64decode(answer["quote"], validate=True)
        except (KeyError, TypeError, binascii.Error):
            raise MachineError(f"{self.name} answers something else than a quote") from None

    def _ask(self, request: dict[str, str], timeout: float) -> dict[str, Any]:
        try:
            with connect(self.path, timeout) as stream:
                stream.sendall(json.dumps(request).encode() + b"\n")
                answer = _object(_read_line(stream))
        except (OSError, EOFError) as error:
            raise MachineError(f"{self.name} does not answer: {error or 'it hung up'}") from None
        if "error" in answer:
            raise MachineError(f"{self.name}: {answer['error']}")
        return answer


def running() -> list[RunningMachine]:
    """Every machine of this user that runs under a name. What dead processes left behind does not count."""
    found = []
    for path in sorted(runtime_folder().glob(f"*{_SOCKET}")):
        name = path.name.removesuffix(_SOCKET)
        try:
            connect(path, _CLIENT_TIMEOUT).close()
        except OSError:
            continue
        found.append(RunningMachine(name, path))
    return found


def find(name: str) -> RunningMachine:
    """The machine of that name. MachineError names those that run instead."""
    there = {machine.name: machine for machine in running()}
    if name not in there:
        others = f"these run: {', '.join(there)}" if there else "none runs"
        raise MachineError(
            f"no machine named {name!r} runs; {others} (softtdx run or boot with --name NAME starts one)"
        )
    return there[name]
