"""GetQuote: the shared buffer as a TD sees it, through every outcome."""

from __future__ import annotations

import threading

import pytest
from attest_platform import NOW, ReportingPlatform
from hypothesis import given
from hypothesis import strategies as st

from softtdx.abi.ghci import GetQuoteHeader, QuoteStatus, VmcallStatus
from softtdx.attest import MalformedError, Pki, QuotingEnclave, verify_with_dcap_qvl
from softtdx.attest.errors import QuotingError, ServiceUnavailableError
from softtdx.attest.getquote import MAX_BUFFER, MAX_IN_FLIGHT, GetQuote
from softtdx.attest.qgs import QgsServer, QgsType, message
from softtdx.errors import SoftTdxError

BASE, SIZE = 0x10_0000, 0x4000
PREFIX = 4


class Memory:
    """Shared memory of a TD: one range; what is outside is not there."""

    def __init__(self, size: int = SIZE) -> None:
        self.data = bytearray(size)

    def _span(self, gpa: int, size: int) -> slice:
        if not BASE <= gpa <= gpa + size <= BASE + len(self.data):
            raise MalformedError(f"GPA {gpa:#x} is not shared memory")
        return slice(gpa - BASE, gpa - BASE + size)

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.data[self._span(gpa, size)])

    def write(self, gpa: int, data: bytes) -> None:
        self.data[self._span(gpa, len(data))] = data

    def ask(self, data: bytes, *, version: int = 1, in_len: int | None = None) -> None:
        """What a TD writes before the call."""
        header = GetQuoteHeader()
        header.version, header.in_len = version, len(data) if in_len is None else in_len
        self.data[: GetQuoteHeader.SIZE] = bytes(header)
        self.data[GetQuoteHeader.SIZE : GetQuoteHeader.SIZE + len(data)] = data

    @property
    def header(self) -> GetQuoteHeader:
        return GetQuoteHeader.parse(bytes(self.data[: GetQuoteHeader.SIZE]))

    @property
    def output(self) -> bytes:
        return bytes(self.data[GetQuoteHeader.SIZE : GetQuoteHeader.SIZE + self.header.out_len])


class Bell:
    """Counts event-notify interrupts."""

    def __init__(self) -> None:
        self.rung = 0

    def __call__(self) -> None:
        self.rung += 1


def test_a_quote_comes_after_a_time_in_flight(pki: Pki, platform: ReportingPlatform, enclave: QuotingEnclave) -> None:
    memory, bell, service = Memory(), Bell(), GetQuote(enclave.quote)
    memory.ask(platform.report())
    assert service.call(memory, BASE, SIZE, bell) is VmcallStatus.SUCCESS
    assert memory.header.status == QuoteStatus.IN_FLIGHT
    assert (memory.header.out_len, bell.rung, service.in_flight) == (0, 0, 1)
    assert service.run_pending() == 1
    assert memory.header.status == QuoteStatus.SUCCESS
    assert (bell.rung, service.in_flight) == (1, 0)
    assert verify_with_dcap_qvl(memory.output, pki, NOW).status == "UpToDate"


def test_a_threaded_service_answers_by_itself(platform: ReportingPlatform, enclave: QuotingEnclave) -> None:
    memory, done, service = Memory(), threading.Event(), GetQuote(enclave.quote, threaded=True)
    memory.ask(platform.report())
    assert service.call(memory, BASE, SIZE, done.set) is VmcallStatus.SUCCESS
    assert done.wait(30)
    assert memory.header.status == QuoteStatus.SUCCESS
    service.close()


def test_the_status_is_written_after_the_quote(platform: ReportingPlatform, enclave: QuotingEnclave) -> None:
    order: list[int] = []

    class Watched(Memory):
        def write(self, gpa: int, data: bytes) -> None:
            order.append(gpa)
            super().write(gpa, data)

    memory, service = Watched(), GetQuote(enclave.quote)
    memory.ask(platform.report())
    service.call(memory, BASE, SIZE, Bell())
    service.run_pending()
    assert order == [BASE, BASE + GetQuoteHeader.SIZE, BASE]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (QuotingError("no"), QuoteStatus.ERROR),
        (MalformedError("no"), QuoteStatus.ERROR),
        (ServiceUnavailableError("gone"), QuoteStatus.SERVICE_UNAVAILABLE),
    ],
)
def test_a_failure_is_told_by_the_status(platform: ReportingPlatform, error: SoftTdxError, status: QuoteStatus) -> None:
    def fail(_: bytes) -> bytes:
        raise error

    memory, bell, service = Memory(), Bell(), GetQuote(fail)
    memory.ask(platform.report())
    assert service.call(memory, BASE, SIZE, bell) is VmcallStatus.SUCCESS
    service.run_pending()
    assert memory.header.status == status
    assert (memory.header.out_len, bell.rung) == (0, 1)


def test_a_report_of_another_platform_is_an_error(pki: Pki, enclave: QuotingEnclave) -> None:
    memory, service = Memory(), GetQuote(enclave.quote)
    memory.ask(ReportingPlatform(pki.options.tcb, key=b"other").report())
    service.call(memory, BASE, SIZE, Bell())
    service.run_pending()
    assert memory.header.status == QuoteStatus.ERROR


def test_a_quote_too_large_for_the_buffer_is_an_error_and_not_cut(
    platform: ReportingPlatform, enclave: QuotingEnclave
) -> None:
    memory, service = Memory(), GetQuote(enclave.quote)
    memory.ask(platform.report())
    before = bytes(memory.data)
    assert service.call(memory, BASE, 0x1000, Bell()) is VmcallStatus.SUCCESS
    service.run_pending()
    assert memory.header.status == QuoteStatus.ERROR
    assert memory.header.out_len == 0
    assert memory.data[GetQuoteHeader.SIZE :] == before[GetQuoteHeader.SIZE :]


@pytest.mark.parametrize(
    ("gpa", "size", "status"),
    [
        (BASE + 1, SIZE, VmcallStatus.ALIGN_ERROR),
        (BASE, SIZE + 1, VmcallStatus.ALIGN_ERROR),
        (BASE, 0, VmcallStatus.INVALID_OPERAND),
        (BASE, MAX_BUFFER + 0x1000, VmcallStatus.INVALID_OPERAND),
        (BASE + SIZE, SIZE, VmcallStatus.INVALID_OPERAND),
        (1 << 63, SIZE, VmcallStatus.INVALID_OPERAND),
    ],
)
def test_a_call_with_a_bad_buffer_is_refused_at_once(
    platform: ReportingPlatform, enclave: QuotingEnclave, gpa: int, size: int, status: VmcallStatus
) -> None:
    memory, bell, service = Memory(), Bell(), GetQuote(enclave.quote)
    memory.ask(platform.report())
    before = bytes(memory.data)
    assert service.call(memory, gpa, size, bell) is status
    assert (service.in_flight, service.run_pending(), bell.rung) == (0, 0, 0)
    assert bytes(memory.data) == before


@pytest.mark.parametrize(
    "how", [{"version": 0}, {"version": 2}, {"in_len": 0}, {"in_len": SIZE}, {"in_len": 0xFFFF_FFFF}]
)
def test_a_bad_header_is_refused_at_once(
    platform: ReportingPlatform, enclave: QuotingEnclave, how: dict[str, int]
) -> None:
    memory, service = Memory(), GetQuote(enclave.quote)
    memory.ask(platform.report(), **how)
    assert service.call(memory, BASE, SIZE, Bell()) is VmcallStatus.INVALID_OPERAND
    assert service.in_flight == 0


def test_more_requests_than_can_be_in_flight_are_to_be_tried_again(
    platform: ReportingPlatform, enclave: QuotingEnclave
) -> None:
    memory, service = Memory(), GetQuote(enclave.quote)
    for _ in range(MAX_IN_FLIGHT):
        memory.ask(platform.report())
        assert service.call(memory, BASE, SIZE, Bell()) is VmcallStatus.SUCCESS
    memory.ask(platform.report())
    assert service.call(memory, BASE, SIZE, Bell()) is VmcallStatus.RETRY
    assert service.run_pending() == MAX_IN_FLIGHT
    memory.ask(platform.report())
    assert service.call(memory, BASE, SIZE, Bell()) is VmcallStatus.SUCCESS


def test_a_td_that_takes_its_buffer_away_harms_nobody(platform: ReportingPlatform, enclave: QuotingEnclave) -> None:
    memory, bell, service = Memory(), Bell(), GetQuote(enclave.quote)
    memory.ask(platform.report())
    service.call(memory, BASE, SIZE, bell)
    memory.data = bytearray(16)
    assert service.run_pending() == 1
    assert service.in_flight == 0


def test_intels_library_may_ask_in_its_own_framing(
    pki: Pki, platform: ReportingPlatform, enclave: QuotingEnclave
) -> None:
    memory, service = Memory(), GetQuote(enclave.quote, qgs=QgsServer(enclave))
    report = platform.report()
    request = message(
        QgsType.GET_QUOTE_REQ, len(report).to_bytes(4, "little") + (0).to_bytes(4, "little") + report, minor=0
    )
    memory.ask(len(request).to_bytes(PREFIX, "big") + request)
    service.call(memory, BASE, SIZE, Bell())
    service.run_pending()
    assert memory.header.status == QuoteStatus.SUCCESS
    answer = memory.output
    assert int.from_bytes(answer[:PREFIX], "big") == len(answer) - PREFIX
    quote = answer[PREFIX + 16 + 8 :]
    assert verify_with_dcap_qvl(quote, pki, NOW).status == "UpToDate"


@given(header=st.binary(min_size=24, max_size=24), data=st.binary(max_size=1100), size=st.integers(0, 1 << 20))
def test_whatever_a_td_writes_the_call_ends_in_a_status(
    enclave: QuotingEnclave, header: bytes, data: bytes, size: int
) -> None:
    memory, bell, service = Memory(), Bell(), GetQuote(enclave.quote, qgs=QgsServer(enclave))
    memory.data[: len(header)] = header
    memory.data[24 : 24 + len(data)] = data
    status = service.call(memory, BASE, size, bell)
    done = service.run_pending()
    assert done == bell.rung == (status is VmcallStatus.SUCCESS)
    assert service.in_flight == 0
