"""The two services before good clients and bad: slow, half-open, oversized, malformed, many at once."""

from __future__ import annotations

import logging
import socket
import ssl
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import httpx
import pytest
from attest_platform import NOW, ReportingPlatform
from hypothesis import given, settings
from hypothesis import strategies as st

from softtdx.attest import (
    Collateral,
    CollateralError,
    MalformedError,
    Pki,
    PkiError,
    QuotingEnclave,
    Verifier,
    http_service,
    verify_with_dcap_qvl,
)
from softtdx.attest.errors import ServiceUnavailableError
from softtdx.attest.pcs import PcsListener
from softtdx.attest.pcs_client import fetch_collateral
from softtdx.attest.qgs import (
    MessageHeader,
    QgsClient,
    QgsError,
    QgsListener,
    QgsServer,
    QgsType,
    message,
    parse_address,
)
from softtdx.attest.tls import tls_files
from softtdx.errors import SoftTdxError

AT_ONCE = 64


@pytest.fixture(scope="module")
def qgs(enclave: QuotingEnclave) -> Iterator[QgsListener]:
    with QgsListener(enclave, ("127.0.0.1", 0), timeout_s=5) as listener:
        yield listener


@pytest.fixture(scope="module")
def pcs(pki: Pki) -> Iterator[PcsListener]:
    with PcsListener(pki, port=0) as listener:
        yield listener


def connect(listener: QgsListener | PcsListener) -> socket.socket:
    if isinstance(listener, QgsListener):
        address = listener.address
        assert not isinstance(address, Path)
    else:
        host, _, port = listener.url.partition("://")[2].rpartition(":")
        address = (host, int(port))
    return socket.create_connection(address, 10)


def test_the_qgs_quotes_over_tcp_and_over_a_unix_socket(
    tmp_path: Path, pki: Pki, platform: ReportingPlatform, enclave: QuotingEnclave, qgs: QgsListener
) -> None:
    with QgsListener(enclave, tmp_path / "qgs.socket") as local:
        for listener in (qgs, local):
            quote = QgsClient(listener.address).quote(platform.report())
            assert verify_with_dcap_qvl(quote, pki, NOW).status == "UpToDate"
    assert not (tmp_path / "qgs.socket").exists()


def test_a_socket_left_by_a_dead_service_is_taken_over(
    tmp_path: Path, platform: ReportingPlatform, enclave: QuotingEnclave
) -> None:
    path = tmp_path / "qgs.socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with QgsListener(enclave, path) as listener:
        assert QgsClient(listener.address).quote(platform.report())
        with pytest.raises(ServiceUnavailableError, match="cannot listen"):
            QgsListener(enclave, path)


def test_the_qgs_gives_collateral_and_platform_info(pki: Pki, enclave: QuotingEnclave) -> None:
    server = QgsServer(enclave)
    fmspc = pki.options.tcb.fmspc
    ask = len(fmspc).to_bytes(4, "little") + (8).to_bytes(4, "little") + fmspc + b"platform"
    answer = server.answer(message(QgsType.GET_COLLATERAL_REQ, ask))
    header = MessageHeader(answer)
    assert (header.type, header.error_code, header.size) == (QgsType.GET_COLLATERAL_RESP, 0, len(answer))
    assert pki.root_crl in answer
    assert pki.tcb_info_response().encode() in answer
    answer = server.answer(message(QgsType.GET_PLATFORM_INFO_REQ, b""))
    assert MessageHeader(answer).type == QgsType.GET_PLATFORM_INFO_RESP
    assert answer[16:20] == bytes([4, 0, 11, 0])
    assert pki.ids.qe_id + pki.options.tcb.cpu_svn == answer[-32:]


def errors(server: QgsServer, request: bytes) -> int:
    answer = server.answer(request)
    header = MessageHeader(answer)
    assert header.size == len(answer)
    return header.error_code


def test_a_bad_message_gets_the_error_that_tells(platform: ReportingPlatform, enclave: QuotingEnclave) -> None:
    server = QgsServer(enclave)
    report = platform.report()
    sized = len(report).to_bytes(4, "little") + bytes(4)
    good = message(QgsType.GET_QUOTE_REQ, sized + report)
    assert errors(server, good) == QgsError.SUCCESS
    assert errors(server, good[:10]) == QgsError.INVALID_SIZE
    assert errors(server, good[:-1]) == QgsError.INVALID_SIZE
    assert errors(server, good + b"\0") == QgsError.INVALID_SIZE
    assert errors(server, b"\x02" + good[1:]) == QgsError.INVALID_VERSION
    assert errors(server, message(99, b"")) == QgsError.INVALID_TYPE
    assert errors(server, message(QgsType.GET_QUOTE_RESP, b"")) == QgsError.INVALID_TYPE
    assert errors(server, message(QgsType.GET_QUOTE_REQ, b"")) == QgsError.INVALID_SIZE
    assert errors(server, message(QgsType.GET_QUOTE_REQ, bytes(8))) == QgsError.INVALID_PARAMETER
    assert errors(server, message(QgsType.GET_QUOTE_REQ, sized + report, error=1)) == QgsError.INVALID_CODE
    assert errors(server, message(QgsType.GET_QUOTE_REQ, sized + bytes(1024))) == QgsError.UNEXPECTED
    assert errors(server, message(QgsType.GET_COLLATERAL_REQ, bytes(8))) == QgsError.INVALID_PARAMETER
    assert errors(server, message(QgsType.GET_PLATFORM_INFO_REQ, b"x")) == QgsError.INVALID_SIZE


@given(data=st.binary(max_size=300))
def test_any_message_is_answered(enclave: QuotingEnclave, data: bytes) -> None:
    errors(QgsServer(enclave), data)


def test_the_client_says_what_the_service_refused(qgs: QgsListener) -> None:
    with pytest.raises(MalformedError, match="UNEXPECTED"):
        QgsClient(qgs.address).quote(bytes(1024))
    with pytest.raises(ServiceUnavailableError, match="no answer"):
        QgsClient(("127.0.0.1", 1)).quote(bytes(1024))
    with pytest.raises(ServiceUnavailableError, match="no answer"):
        QgsClient(Path("/nonexistent/socket")).quote(bytes(1024))


def test_the_qgs_outlives_bad_clients_and_serves_64_at_once(platform: ReportingPlatform, qgs: QgsListener) -> None:
    idle = [connect(qgs) for _ in range(AT_ONCE)]  # connected, and silent
    try:
        for number, stream in enumerate(idle):
            half = [b"", b"\0", (1040).to_bytes(4, "big"), (1040).to_bytes(4, "big") + b"half of it"]
            stream.sendall(half[number % len(half)])
        with connect(qgs) as oversized:
            oversized.sendall(b"\xff\xff\xff\xff" + bytes(1000))
            oversized.settimeout(10)
            with oversized:
                assert oversized.recv(1) == b""
        report = platform.report()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            quotes = list(pool.map(lambda _: QgsClient(qgs.address).quote(report), range(AT_ONCE)))
        assert len(set(quotes)) == 1
    finally:
        for stream in idle:
            stream.close()


def test_a_silent_client_of_the_qgs_is_hung_up_on(enclave: QuotingEnclave) -> None:
    with QgsListener(enclave, ("127.0.0.1", 0), timeout_s=0.1) as listener, connect(listener) as stream:
        assert stream.recv(1) == b""


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/x", Path("/run/x")),
        ("/run/x", Path("/run/x")),
        ("tcp:localhost:80", ("localhost", 80)),
        ("4050", ("127.0.0.1", 4050)),
        ("[::1]:4050", ("::1", 4050)),
    ],
)
def test_an_address_is_read(text: str, address: object) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "host", "host:port", "host:99999", "-1"])
def test_a_bad_address_is_refused(text: str) -> None:
    with pytest.raises(MalformedError, match="is no address"):
        parse_address(text)


def test_the_pcs_gives_what_the_pki_holds(pki: Pki, quote_bytes: bytes, pcs: PcsListener) -> None:
    collateral = fetch_collateral(quote_bytes, pcs.url)
    assert collateral == pki.collateral()
    assert Verifier(pki.root_der).verify(quote_bytes, collateral, now=NOW).accepted


@pytest.mark.parametrize("ca", ["platform", "processor"])
@pytest.mark.parametrize("encoding", ["der", "pem"])
def test_the_pcs_gives_crls_in_both_encodings(pki: Pki, pcs: PcsListener, ca: str, encoding: str) -> None:
    answer = httpx.get(f"{pcs.url}/sgx/certification/v4/pckcrl", params={"ca": ca, "encoding": encoding})
    assert answer.status_code == 200
    assert (answer.content == pki.pck_crls[ca]) == (encoding == "der")
    assert unquote(answer.headers["SGX-PCK-CRL-Issuer-Chain"]) == pki.pck_crl_issuer_chain(ca)


def test_the_pcs_gives_the_root_crl_where_the_certificates_say(pki: Pki, pcs: PcsListener) -> None:
    assert httpx.get(f"{pcs.url}/IntelSGXRootCA.der").content == pki.root_crl
    assert bytes.fromhex(httpx.get(f"{pcs.url}/sgx/certification/v4/rootcacrl").text) == pki.root_crl


def test_the_pcs_gives_pck_certificates(pki: Pki, pcs: PcsListener) -> None:
    ask = {"qeid": pki.ids.qe_id.hex().upper(), "encrypted_ppid": "00" * 384, "pceid": "0000"}
    ask |= {"cpusvn": pki.options.tcb.cpu_svn.hex(), "pcesvn": "0B00"}
    answer = httpx.get(f"{pcs.url}/sgx/certification/v4/pckcert", params=ask)
    assert answer.status_code == 200
    assert answer.text + unquote(answer.headers["SGX-PCK-Certificate-Issuer-Chain"]) == pki.pck_chain
    assert answer.headers["SGX-TCBm"] == pki.options.tcb.cpu_svn.hex().upper() + "0B00"
    listed = httpx.get(f"{pcs.url}/sgx/certification/v4/pckcerts", params=ask).json()
    assert unquote(listed[0]["cert"]) == answer.text
    assert httpx.get(f"{pcs.url}/sgx/certification/v4/fmspcs").json()[0]["fmspc"] == "50806F000000"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 404),
        ("/tdx/certification/v4/tcb", 400),
        ("/tdx/certification/v4/tcb?fmspc=zz", 400),
        ("/tdx/certification/v4/tcb?fmspc=000000000000", 404),
        ("/tdx/certification/v4/tcb?fmspc=50806F000000&update=never", 400),
        ("/tdx/certification/v4/tcb?fmspc=50806F000000&tcbEvaluationDataNumber=x", 400),
        ("/tdx/certification/v4/tcb?fmspc=50806F000000&tcbEvaluationDataNumber=1", 404),
        ("/tdx/certification/v4/qe/identity?update=early&tcbEvaluationDataNumber=17", 400),
        ("/sgx/certification/v4/pckcrl", 400),
        ("/sgx/certification/v4/pckcrl?ca=other&encoding=der", 400),
        ("/sgx/certification/v4/pckcert", 400),
        ("/sgx/certification/v4/pckcert?qeid=00&pceid=0000", 404),
        ("/tdx/certification/v4/tcb?fmspc=" + "0" * 8000, 400),
        ("/../../etc/passwd", 404),
    ],
)
def test_a_bad_question_gets_a_plain_answer(pcs: PcsListener, path: str, status: int) -> None:
    answer = httpx.get(pcs.url + path)
    assert answer.status_code == status
    assert "Traceback" not in answer.text


KEYS = [
    "fmspc",
    "ca",
    "encoding",
    "update",
    "tcbEvaluationDataNumber",
    "qeid",
    "pceid",
    "encrypted_ppid",
    "cpusvn",
    "uri",
]
PATHS = [
    "/sgx/certification/v4/pckcrl",
    "/sgx/certification/v4/pckcert",
    "/sgx/certification/v4/pckcerts",
    "/sgx/certification/v4/rootcacrl",
    "/sgx/certification/v4/crl",
    "/tdx/certification/v4/tcb",
    "/tdx/certification/v4/qe/identity",
]
VALUES = st.one_of(
    st.text(max_size=40), st.sampled_from(["50806F000000", "platform", "der", "standard", "17", "9" * 5000])
)


@settings(deadline=None)
@given(path=st.sampled_from(PATHS), query=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_any_question_gets_an_answer_that_is_no_failure_of_the_service(
    pcs: PcsListener, http: httpx.Client, path: str, query: dict[str, str]
) -> None:
    try:
        answer = http.get(pcs.url + path, params=query)
    except UnicodeEncodeError:
        return  # a lone surrogate cannot be put into a URL
    assert answer.status_code in (200, 400, 404)


@settings(deadline=None)
@given(answer=st.one_of(st.binary(max_size=80), st.binary(max_size=80).map(lambda body: message(1, body))))
def test_any_answer_of_a_quoting_service_gives_a_quote_or_our_error(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(QgsClient(server.getsockname()).quote, bytes(1024))
        stream, _ = server.accept()
        with stream:
            stream.recv(4096)
            stream.sendall(len(answer).to_bytes(4, "big") + answer)
        with suppress(SoftTdxError):
            assert isinstance(asked.result(30), bytes)


def test_only_reading_is_allowed(pcs: PcsListener) -> None:
    assert httpx.post(f"{pcs.url}/tdx/certification/v4/qe/identity", content=b"x" * 100_000).status_code == 405


def test_the_pcs_outlives_bad_clients_and_serves_64_at_once(pcs: PcsListener, http: httpx.Client) -> None:
    idle = [connect(pcs) for _ in range(AT_ONCE)]
    try:
        beginnings = [
            b"",
            b"GET /tdx/certif",
            b"\x00\xff" * 100,
            b"GET / HTTP/1.1\r\nContent-Length: 99\r\n\r\n",
            b"A" * 70_000,
        ]
        for number, stream in enumerate(idle):
            try:
                stream.sendall(beginnings[number % len(beginnings)])
            except OSError:
                assert number % len(beginnings) == 4  # the service may hang up on 70,000 bytes of nonsense early
        url = f"{pcs.url}/tdx/certification/v4/qe/identity"
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(lambda _: http.get(url), range(AT_ONCE)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
    finally:
        for stream in idle:
            stream.close()


def test_a_client_that_never_asks_is_hung_up_on(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_service, "REQUEST_TIMEOUT", 0.2)
    with PcsListener(pki, port=0) as listener, connect(listener) as stream:
        stream.sendall(b"GET /tdx")
        assert stream.recv(1000) == b""


def test_no_private_key_shows_in_answers_or_logs(
    pki: Pki, platform: ReportingPlatform, enclave: QuotingEnclave, pcs: PcsListener, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    seen = [enclave.quote(platform.report()), QgsServer(enclave).answer(b"junk")]
    QgsServer(enclave).answer(message(QgsType.GET_QUOTE_REQ, (1024).to_bytes(4, "little") + bytes(4 + 1024)))
    paths = ("/sgx/certification/v4/pckcert?qeid=00", "/IntelSGXRootCA.der", "/sgx/certification/v4/fmspcs")
    seen += [httpx.get(pcs.url + path).content for path in paths]
    seen.append(caplog.text.encode())
    for key in pki.keys.values():
        value = key.private_numbers().private_value
        for form in (value.to_bytes(32, "big"), f"{value:064x}".encode(), str(value).encode()):
            assert not any(form in data for data in seen)


def answering(handler: httpx.MockTransport) -> httpx.Client:
    return httpx.Client(transport=handler)


@pytest.mark.parametrize(
    "respond",
    [
        lambda _: httpx.Response(500),
        lambda _: httpx.Response(200, content=b"x"),
        lambda _: httpx.Response(200, content=b"x", headers={"TCB-Info-Issuer-Chain": "x"}),
        lambda _: httpx.Response(
            200,
            content=b'{"tcbInfo": {}, "signature": 5}',
            headers={
                "TCB-Info-Issuer-Chain": "x",
                "SGX-PCK-CRL-Issuer-Chain": "x",
                "SGX-Enclave-Identity-Issuer-Chain": "x",
            },
        ),
        lambda _: httpx.Response(200, content=bytes(2 << 20)),
    ],
)
def test_a_service_that_answers_nonsense_is_refused(quote_bytes: bytes, respond: object) -> None:
    assert callable(respond)
    with pytest.raises(CollateralError):
        fetch_collateral(quote_bytes, "http://pcs", client=answering(httpx.MockTransport(respond)))


def test_a_service_that_is_not_there_is_said_to_be_so(quote_bytes: bytes) -> None:
    with pytest.raises(ServiceUnavailableError, match="no answer"):
        fetch_collateral(quote_bytes, "http://127.0.0.1:1")
    with pytest.raises(ServiceUnavailableError):
        fetch_collateral(quote_bytes, "nonsense")


def test_a_port_in_use_is_said_to_be_so(pki: Pki, pcs: PcsListener) -> None:
    with pytest.raises(ServiceUnavailableError, match="cannot listen"):
        PcsListener(pki, port=int(pcs.url.rpartition(":")[2]))


def test_the_pcs_speaks_https_with_a_certificate_of_its_own(tmp_path: Path, pki: Pki, quote_bytes: bytes) -> None:
    files = tls_files(tmp_path)
    assert stat.S_IMODE(files.key.stat().st_mode) == 0o600
    with PcsListener(pki, port=0, tls=files) as listener:
        assert listener.url.startswith("https://127.0.0.1:")
        with pytest.raises(ServiceUnavailableError, match="certificate verify failed"):
            fetch_collateral(quote_bytes, listener.url)
        trusting = httpx.Client(verify=ssl.create_default_context(cafile=str(files.certificate)))
        assert fetch_collateral(quote_bytes, listener.url, client=trusting) == pki.collateral()
        with connect(listener) as stream:
            stream.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert b"200" not in stream.recv(100)


def test_a_tls_certificate_is_kept_until_it_is_of_no_more_use(tmp_path: Path) -> None:
    files = tls_files(tmp_path)
    first = files.certificate.read_bytes()
    assert tls_files(tmp_path) == files
    assert files.certificate.read_bytes() == first
    files.certificate.write_text("not a certificate")
    assert tls_files(tmp_path).certificate.read_bytes() != first
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PkiError, match="no certificate for HTTPS"):
        tls_files(tmp_path / "file")


def test_dcap_qvl_fetches_from_the_pcs(pki: Pki, quote_bytes: bytes, pcs: PcsListener) -> None:
    import asyncio

    import dcap_qvl

    async def fetch() -> str:
        collateral = await dcap_qvl.get_collateral(pcs.url, quote_bytes)
        text: str = collateral.to_json()
        return text

    collateral = Collateral.from_json(asyncio.run(fetch()))
    assert verify_with_dcap_qvl(quote_bytes, (collateral, pki.root_der), NOW).status == "UpToDate"
