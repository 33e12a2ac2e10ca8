"""A TD that does nothing but attest itself: built, run and measured like any other, its program a Python function.

What wants a genuine report or quote and has no guest of its own (`softtdx quote`, `softtdx guest-api serve`, tests)
asks this one. Reports come from TDG.MR.REPORT, quotes through the GetQuote hypercall.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from softtdx.abi.ghci import GET_QUOTE_VERSION, GetQuoteHeader, QuoteStatus, VmcallLeaf, VmcallStatus
from softtdx.abi.leaves import TdcallLeaf
from softtdx.abi.structs import REPORTDATA_SIZE, TdReport
from softtdx.kvm import Host
from softtdx.vmm.errors import GuestError
from softtdx.vmm.machine import Machine, MachineConfig
from softtdx.vmm.python_guest import PythonGuest, Td
from softtdx.vmm.quoting import QuotingService

__all__ = ["AttestingTd"]

_PAGE = 4096
_MEMORY = 2 << 20
_REPORT, _OPERAND = 0x1_0000, 0x1_1000
_BUFFER, _BUFFER_SIZE = 0x2_0000, 0x8000
_DIGEST_SIZE = 48

_Work = Callable[[Td], bytes]


class AttestingTd:
    """A running TD; its methods may be called from any thread, one after the other is served. Close it."""

    def __init__(self, host: Host, quoting: QuotingService | None = None, config: MachineConfig | None = None) -> None:
        """`config` gives its attributes and MRCONFIGID, MROWNER, MROWNERCONFIG; its memory is 2 MiB at least."""
        self.quoting = quoting or QuotingService(host.platform)
        self._work: queue.SimpleQueue[tuple[_Work, Future[bytes]] | None] = queue.SimpleQueue()
        self._ending = ""
        machine = Machine(host, config or MachineConfig(memory=_MEMORY), quoting=self.quoting)
        self._guest = PythonGuest(host, self._program, machine=machine)
        self._thread = threading.Thread(target=self._run, name="softtdx-attesting-td", daemon=True)
        self._thread.start()

    def report(self, report_data: bytes) -> bytes:
        """The TD's TDREPORT with 64 bytes of report data."""
        return self._ask(lambda td: _report(td, report_data))

    def quote(self, report_data: bytes) -> bytes:
        """A quote of the TD with 64 bytes of report data."""
        return self._ask(lambda td: _quote(td, _report(td, report_data)))

    def quote_of(self, tdreport: bytes) -> bytes:
        """A quote of a TDREPORT that it hands to GetQuote. GuestError when the quoting service refuses."""
        return self._ask(lambda td: _quote(td, tdreport))

    def extend(self, rtmr: int, digest: bytes) -> None:
        """TDG.MR.RTMR.EXTEND with a digest of 48 bytes."""
        self._ask(lambda td: _extend(td, rtmr, digest))

    def close(self) -> None:
        """End the TD and tear it down."""
        self._work.put(None)
        self._thread.join()
        self._guest.close()

    def __enter__(self) -> "AttestingTd":
        """Itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def _ask(self, work: _Work) -> bytes:
        if not self._thread.is_alive():
            raise GuestError(f"the attesting TD has ended: {self._ending}")
        answer: Future[bytes] = Future()
        self._work.put((work, answer))
        while True:
            try:
                return answer.result(timeout=1)
            except TimeoutError:
                if not self._thread.is_alive() and not answer.done():
                    raise GuestError(f"the attesting TD has ended: {self._ending}") from None

    def _run(self) -> None:
        try:
            result = self._guest.run()
            self._ending = result.message
        except Exception as error:  # whoever asks next is told
            self._ending = str(error)

    def _program(self, td: Td) -> None:
        for page in (_REPORT, _OPERAND):
            _expect(td.accept(page), 0, "TDG.MEM.PAGE.ACCEPT")
        shared = td.tdvmcall(VmcallLeaf.MAP_GPA, _BUFFER | td.shared_bit, _BUFFER_SIZE)
        _expect(shared.r10, VmcallStatus.SUCCESS, "MapGPA")
        while (item := self._work.get()) is not None:
            work, answer = item
            try:
                answer.set_result(work(td))
            except Exception as error:  # it goes to the one who asked
                answer.set_exception(error)


def _expect(status: int, wanted: int, what: str) -> None:
    if status != wanted:
        raise GuestError(f"{what} ends with {status:#x}")


def _report(td: Td, report_data: bytes) -> bytes:
    if len(report_data) != REPORTDATA_SIZE:
        raise GuestError(f"report data is {REPORTDATA_SIZE} bytes, this is {len(report_data)}")
    td.write(_OPERAND, report_data)
    _expect(td.tdcall(TdcallLeaf.MR_REPORT, rcx=_REPORT, rdx=_OPERAND, r8=0).rax, 0, "TDG.MR.REPORT")
    return td.read(_REPORT, TdReport.SIZE)


def _extend(td: Td, rtmr: int, digest: bytes) -> bytes:
    if len(digest) != _DIGEST_SIZE:
        raise GuestError(f"an RTMR is extended with {_DIGEST_SIZE} bytes, this is {len(digest)}")
    td.write(_OPERAND, digest)
    _expect(td.tdcall(TdcallLeaf.MR_RTMR_EXTEND, rcx=_OPERAND, rdx=rtmr).rax, 0, "TDG.MR.RTMR.EXTEND")
    return b""


def _quote(td: Td, tdreport: bytes) -> bytes:
    header = GetQuoteHeader()
    header.version, header.in_len = GET_QUOTE_VERSION, len(tdreport)
    buffer = td.shared(_BUFFER)
    td.write(buffer, bytes(header) + tdreport)
    called = td.tdvmcall(VmcallLeaf.GET_QUOTE, _BUFFER | td.shared_bit, _BUFFER_SIZE)
    _expect(called.r10, VmcallStatus.SUCCESS, "GetQuote")
    while (header := GetQuoteHeader.parse(td.read(buffer, GetQuoteHeader.SIZE))).status == QuoteStatus.IN_FLIGHT:
        continue
    _expect(header.status, QuoteStatus.SUCCESS, "GetQuote's request")
    if header.out_len > _BUFFER_SIZE - GetQuoteHeader.SIZE:
        raise GuestError(f"GetQuote's answer claims {header.out_len} bytes, more than the buffer has")
    return td.read(buffer + GetQuoteHeader.SIZE, header.out_len)
