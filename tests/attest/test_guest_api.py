"""The stand-in for a TD's own interfaces: Linux's rules, and client code that runs on either."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from attest_platform import NOW, ReportingPlatform
from click.testing import CliRunner

from softtdx.attest import (
    MalformedError,
    Pki,
    Quote,
    QuotingEnclave,
    QuotingError,
    Verifier,
    guest_client,
    parse_tdreport,
)
from softtdx.attest.errors import ServiceUnavailableError
from softtdx.attest.guest_api import GuestApiListener, TsmReports
from softtdx.cli.attest import platform_tcb, report_verifier
from softtdx.cli.guest_api import COMMANDS, stand_in_td
from softtdx.hw.description import preset

DATA = bytes(range(64))


@pytest.fixture(scope="module")
def api(platform: ReportingPlatform, enclave: QuotingEnclave) -> Iterator[GuestApiListener]:
    with GuestApiListener(TsmReports(platform.report, enclave.quote), port=0) as listener:
        yield listener


@pytest.fixture
def tsm(api: GuestApiListener) -> str:
    return f"{api.url}/sys/kernel/config/tsm/report"


@pytest.fixture
def pointed_at_it(api: GuestApiListener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(guest_client.API_VARIABLE, api.url)


@pytest.mark.usefixtures("pointed_at_it")
def test_an_application_gets_its_report_and_its_quote(pki: Pki) -> None:
    assert parse_tdreport(guest_client.get_tdreport(DATA)).report_mac.report_data == DATA
    quote = guest_client.get_quote(DATA)
    assert Quote.parse(quote).body.report_data == DATA
    assert Verifier(pki.root_der).verify(quote, pki.collateral(), now=NOW).accepted


@pytest.mark.usefixtures("pointed_at_it")
def test_applications_at_once_each_get_their_own(api: GuestApiListener) -> None:
    with ThreadPoolExecutor(16) as pool:
        quotes = list(pool.map(lambda n: guest_client.get_quote(bytes([n]) * 64), range(16)))
    assert [Quote.parse(quote).body.report_data[0] for quote in quotes] == list(range(16))
    assert httpx.get(f"{api.url}/sys/kernel/config/tsm/report/softtdx-1/generation").status_code == 404


def test_a_report_directory_behaves_as_the_kernels(tsm: str, http: httpx.Client) -> None:
    entry = f"{tsm}/mine"
    assert http.get(f"{entry}/generation").status_code == 404
    assert http.put(entry).status_code == 204
    assert (http.put(entry).status_code, http.put(entry).text) == (409, "EEXIST")
    assert http.get(f"{entry}/provider").text == "tdx_guest\n"
    assert http.get(f"{entry}/generation").text == "0\n"
    assert (http.get(f"{entry}/outblob").status_code, http.get(f"{entry}/outblob").text) == (400, "EINVAL")
    assert http.put(f"{entry}/inblob", content=DATA).status_code == 204
    first = http.get(f"{entry}/outblob").content
    assert http.get(f"{entry}/outblob").content == first
    assert http.get(f"{entry}/generation").text == "1\n"
    assert http.put(f"{entry}/inblob", content=bytes(64)).status_code == 204
    assert Quote.parse(http.get(f"{entry}/outblob").content).body.report_data == bytes(64)
    assert http.get(f"{entry}/generation").text == "2\n"
    assert http.delete(entry).status_code == 204
    assert http.delete(entry).status_code == 404


@pytest.mark.parametrize("size", [0, 65, 1 << 20])
def test_report_data_of_another_size_is_einval(api: GuestApiListener, tsm: str, size: int) -> None:
    httpx.put(f"{tsm}/sized")
    assert httpx.put(f"{tsm}/sized/inblob", content=bytes(size)).text == "EINVAL"
    assert httpx.post(f"{api.url}/dev/tdx_guest", content=bytes(size)).text == "EINVAL"


def test_report_data_that_is_too_short_for_tdx_is_einval_when_read(tsm: str) -> None:
    httpx.put(f"{tsm}/short")
    assert httpx.put(f"{tsm}/short/inblob", content=bytes(32)).status_code == 204
    assert httpx.get(f"{tsm}/short/outblob").text == "EINVAL"


def test_there_is_an_end_to_the_directories(platform: ReportingPlatform, enclave: QuotingEnclave) -> None:
    reports = TsmReports(platform.report, enclave.quote)
    for number in range(1024):
        reports.make(str(number))
    with pytest.raises(Exception, match="ENOSPC"):
        reports.make("one more")
    with pytest.raises(Exception, match="ENOSPC"):
        TsmReports(platform.report, enclave.quote).make("x" * 256)


def test_a_quoting_service_that_refuses_is_eio(platform: ReportingPlatform) -> None:
    def refuse(_: bytes) -> bytes:
        raise QuotingError("no")

    with GuestApiListener(TsmReports(platform.report, refuse), port=0) as listener:
        entry = f"{listener.url}/sys/kernel/config/tsm/report/x"
        httpx.put(entry)
        httpx.put(f"{entry}/inblob", content=DATA)
        assert (httpx.get(f"{entry}/outblob").status_code, httpx.get(f"{entry}/outblob").text) == (502, "EIO")


def test_outside_a_td_and_without_a_stand_in_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(guest_client.API_VARIABLE, raising=False)
    for ask in (guest_client.get_quote, guest_client.get_tdreport):
        with pytest.raises(ServiceUnavailableError, match="guest-api serve"):
            ask(DATA)
        with pytest.raises(MalformedError, match="64 bytes"):
            ask(DATA[1:])
    monkeypatch.setenv(guest_client.API_VARIABLE, "http://127.0.0.1:1")
    with pytest.raises(ServiceUnavailableError, match="no answer"):
        guest_client.get_quote(DATA)


def test_the_ioctls_number_is_linuxs() -> None:
    assert guest_client.GET_REPORT0 == 0xC4405401


def test_a_stand_in_td_reports_with_its_platforms_mac() -> None:
    description = preset("spr")
    pki = Pki.create(seed=2, tcb=platform_tcb(description))
    report = stand_in_td(description, {"mrtd": b"\x0a" * 48, "rtmr3": b"\x0b" * 48})(DATA)
    quote = QuotingEnclave(pki, report_verifier(description)).quote(report)
    body = Verifier(pki.root_der).verify(quote, pki.collateral(), now=NOW).require().quote
    assert body is not None
    assert (body.body.mr_td, body.body.rtmr3) == (b"\x0a" * 48, b"\x0b" * 48)


@pytest.mark.parametrize("text", ["mrtd", "mrtd=00", "size=" + "00" * 48, "mrtd=" + "zz" * 48])
def test_a_measurement_that_is_none_is_refused(text: str) -> None:
    result = CliRunner().invoke(COMMANDS[0], ["serve", "--set", text], standalone_mode=False)
    assert isinstance(result.exception, MalformedError)
    assert "NAME=HEX" in str(result.exception)
