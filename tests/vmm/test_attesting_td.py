"""A TD whose only work is to attest itself."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from softtdx.attest import Quote, Verifier, parse_tdreport
from softtdx.kvm import Host
from softtdx.vmm import GuestError, MachineConfig
from softtdx.vmm.attesting_td import AttestingTd
from softtdx.vmm.boot import boot_host
from softtdx.vmm.quoting import QuotingService

DATA = bytes(range(64))


@pytest.fixture(scope="module")
def machine_room() -> Host:
    return boot_host()


def test_its_quotes_verify_under_its_platforms_pki(machine_room: Host) -> None:
    with AttestingTd(machine_room, config=MachineConfig(memory=2 << 20, mrowner=b"\x0c" * 48)) as td:
        quote = td.quote(DATA)
        pki = td.quoting.pki
        verdict = Verifier(pki.root_der).verify(quote, pki.collateral()).require()
        assert verdict.quote is not None
        assert (verdict.quote.body.report_data, verdict.quote.body.mr_owner) == (DATA, b"\x0c" * 48)


def test_its_rtmrs_show_what_it_was_extended_with(machine_room: Host) -> None:
    with AttestingTd(machine_room) as td:
        td.extend(3, b"\x07" * 48)
        info = parse_tdreport(td.report(DATA)).td_info
        assert info.rtmr3 == hashlib.sha384(bytes(48) + b"\x07" * 48).digest()
        assert info.rtmr0 == bytes(48)
        assert Quote.parse(td.quote(DATA)).body.rtmr3 == info.rtmr3


def test_two_of_the_same_kind_have_the_same_measurement(machine_room: Host) -> None:
    found = []
    for _ in range(2):
        with AttestingTd(machine_room) as td:
            found.append(parse_tdreport(td.report(DATA)).td_info.mrtd)
    assert found[0] == found[1] != bytes(48)


def test_a_quote_may_be_in_flight_while_the_td_runs_on(machine_room: Host) -> None:
    service = QuotingService(machine_room.platform, asynchronous=True)
    signing, seen = threading.Event(), threading.Event()
    quote = service.quote

    def slowly(report: bytes) -> bytes:
        signing.set()
        assert seen.wait(30)
        return quote(report)

    service.quote = slowly  # type: ignore[method-assign]
    with AttestingTd(machine_room, service) as td, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(td.quote, DATA)
        assert signing.wait(30)  # the call has returned to the TD, which polls; the quote is still being made
        assert not asked.done()
        seen.set()
        assert Quote.parse(asked.result(30)).body.report_data == DATA


def test_many_may_ask_at_once(machine_room: Host) -> None:
    with AttestingTd(machine_room) as td, ThreadPoolExecutor(8) as pool:
        quotes = list(pool.map(lambda n: td.quote(bytes([n]) * 64), range(8)))
    assert [Quote.parse(quote).body.report_data[0] for quote in quotes] == list(range(8))


def test_bad_requests_are_refused_and_it_lives_on(machine_room: Host) -> None:
    with AttestingTd(machine_room) as td:
        with pytest.raises(GuestError, match="64 bytes"):
            td.report(b"short")
        with pytest.raises(GuestError, match="48 bytes"):
            td.extend(3, b"short")
        with pytest.raises(GuestError, match=r"RTMR\.EXTEND ends"):
            td.extend(4, bytes(48))
        with pytest.raises(GuestError, match="request ends"):
            td.quote_of(bytes(1024))
        assert td.quote(DATA)
    with pytest.raises(GuestError, match="has ended"):
        td.report(DATA)
