"""The agent: who inside a TD answers when the TD's owner, outside, asks for a quote with report data of his choice.

Only a TD can execute TDG.MR.REPORT; no host can make a TDREPORT in a TD's name. So `softtdx quote --td NAME` asks
software in the TD, which is there, and measured with the rest, only if the machine was given a name:

- of `softtdx run`, a vCPU of the launcher's own, at the port AGENT_PORT: it reads one byte, which waits for a request,
  then 64 bytes of report data by 4, and writes bits 63:32 of the leaf's status and, if that is 0, the TDREPORT by 4;
- of `softtdx boot`, a loop in our initramfs on /dev/hvc2: it reads lines `NUMBER HEX`, takes a quote through configfs
  tsm and writes `NUMBER BASE64`, or the number alone where that fails; `ready` on a line says that it is there.
"""

import base64
import binascii
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass

from softtdx.abi.structs import REPORTDATA_SIZE, TdReport
from softtdx.kvm.uapi import IoExit
from softtdx.vmm.errors import GuestError

__all__ = ["AGENT_PORT", "Agent", "ChannelAgent", "PortAgent"]

AGENT_PORT = 0x512
TIMEOUT = 120.0
"""Seconds in which a TD has to answer; one that still boots counts as one that is slow."""
_WORD = 4
_MAX_LINE = 64 << 10
_READY = b"ready"


@dataclass(frozen=True)
class _Request:
    number: int
    report_data: bytes
    answer: Future[bytes]


class Agent(ABC):
    """One request is with the TD at a time; `quote` may be called from any thread."""

    def __init__(self) -> None:
        """Nobody has answered yet."""
        self.ready = False
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._request: _Request | None = None
        self._number = 0
        self._over = ""

    def quote(self, report_data: bytes, timeout: float = TIMEOUT) -> bytes:
        """A quote that the TD took with 64 bytes of report data. GuestError when it has none, or no answer in time."""
        if len(report_data) != REPORTDATA_SIZE:
            raise GuestError(f"report data is {REPORTDATA_SIZE} bytes, this is {len(report_data)}")
        with self._turn:
            answer: Future[bytes] = Future()
            with self._lock:
                if self._over:
                    raise GuestError(f"the TD has ended: {self._over}")
                self._number += 1
                request = self._request = _Request(self._number, report_data, answer)
            self._submit(request)
            try:
                return self._quote_of(answer.result(timeout))
            except TimeoutError:
                why = "its agent does not come out with one" if self.ready else "no agent has reported from inside it"
                raise GuestError(f"the TD gave no quote in {timeout:g} s: {why}") from None
            finally:
                with self._lock:
                    self._request = None

    def close(self, why: str) -> None:
        """The TD is gone: who waits, or comes later, is told so."""
        with self._lock:
            self._over = why
            request = self._request
        if request is not None:
            _settle(request.answer, GuestError(f"the TD has ended: {why}"))

    @abstractmethod
    def _submit(self, request: _Request) -> None:
        """Let the TD know of a request."""

    def _quote_of(self, answer: bytes) -> bytes:
        """What the TD's answer is worth."""
        return answer


def _settle(answer: Future[bytes], outcome: bytes | Exception) -> None:
    """The answer, unless there is one already."""
    with suppress(InvalidStateError):
        if isinstance(outcome, bytes):
            answer.set_result(outcome)
        else:
            answer.set_exception(outcome)


class PortAgent(Agent):
    """The host's side of the launcher's agent: the device at AGENT_PORT, and the quoting of its TDREPORTs."""

    def __init__(
        self,
        sign: Callable[[bytes], bytes],
        wait: Callable[[int, Callable[[], bool]], None],
        notify: Callable[[], None],
    ) -> None:
        """`wait(vcpu, until)` lets a vCPU sleep, `notify` makes sleepers look again; `sign` quotes a TDREPORT."""
        super().__init__()
        self._sign, self._wait, self._notify = sign, wait, notify
        self._fresh = False
        self._serving: _Request | None = None
        self._input = b""
        self._output: bytearray | None = None

    def access(self, vcpu: int, io: IoExit) -> None:
        """One access of the port by a vCPU; a value read is left in `io`."""
        if io.write:
            self._take((io.value & 0xFFFF_FFFF).to_bytes(_WORD, "little"))
        elif io.size == 1:
            self.ready = True
            self._wait(vcpu, lambda: self._fresh)
            io.value = int(self._begin())
        else:
            word, self._input = self._input[:_WORD], self._input[_WORD:]
            io.value = int.from_bytes(word, "little")

    def _submit(self, request: _Request) -> None:  # noqa: ARG002  the agent takes it when it looks
        self._fresh = True
        self._notify()

    def _quote_of(self, answer: bytes) -> bytes:
        return self._sign(answer)

    def _begin(self) -> bool:
        with self._lock:
            self._fresh, self._output = False, None
            self._serving = self._request
            self._input = self._request.report_data if self._request else b""
            return self._request is not None

    def _take(self, word: bytes) -> None:
        """A word that the agent wrote: the status, then the report."""
        request = self._serving
        if request is None:
            return
        if self._output is None:
            self._output = bytearray()
            if any(word):
                self._serving = None
                status = int.from_bytes(word, "little")
                _settle(request.answer, GuestError(f"TDG.MR.REPORT ends with {status:#010x} in bits 63:32"))
            return
        self._output += word
        if len(self._output) == TdReport.SIZE:
            self._serving = None
            _settle(request.answer, bytes(self._output))


class ChannelAgent(Agent):
    """The host's side of the agent in our initramfs: lines on a virtio console."""

    def __init__(self) -> None:
        """Without a channel yet."""
        super().__init__()
        self._send: Callable[[bytes], None] | None = None
        self._text = b""

    def attach(self, send: Callable[[bytes], None]) -> None:
        """`send` puts bytes on the channel, for the guest."""
        self._send = send

    def receive(self, data: bytes) -> None:
        """Bytes that the guest wrote. What is no line of ours is dropped, and so is a line without end."""
        self._text += data
        *lines, self._text = self._text.split(b"\n")
        if len(self._text) > _MAX_LINE:
            self._text = b""
        for line in lines:
            self._line(line.strip())

    def _submit(self, request: _Request) -> None:
        if self.ready and self._send is not None:
            self._send(b"%d %s\n" % (request.number, request.report_data.hex().encode()))

    def _line(self, line: bytes) -> None:
        with self._lock:
            request = self._request
        if line == _READY:
            self.ready = True
            if request is not None:
                self._submit(request)
            return
        number, _, text = line.partition(b" ")
        if request is None or number != b"%d" % request.number:
            return
        try:
            quote = base64.b64decode(text, validate=True)
        except binascii.Error:
            quote = b""
        _settle(request.answer, quote or GuestError("the TD's kernel gave no quote (configfs tsm/report failed)"))
