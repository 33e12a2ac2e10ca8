"""Quotes, reports, logs and the rest read back byte for byte; bad ones give our error and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress

import pytest
from attest_platform import ReportingPlatform
from hypothesis import example, given
from hypothesis import strategies as st

from softtdx.attest import (
    BodyType,
    Collateral,
    MalformedError,
    Pki,
    Policy,
    Quote,
    QuotingEnclave,
    Verifier,
    parse_tdreport,
)
from softtdx.attest.appraisal import EnclaveIdentity, TcbInfo
from softtdx.attest.chain import Cert, Crl, TrustedRoot, pck_extension, split_pem
from softtdx.attest.eventlog import EventLog, make_ccel, parse_ccel
from softtdx.attest.inspection import inspect_bytes
from softtdx.attest.quote import BODIES, EnclaveReport, QuoteHeader, SignatureData
from softtdx.attest.sgx_extension import PckExtension
from softtdx.errors import SoftTdxError

REAL_QUOTES = ["tdx_prod_quote_SPR_E4.dat", "quote_v5_sample.dat", "cos-113-tdx-quote.dat"]


def sample_log() -> bytes:
    log = EventLog.empty().measured(0, 0x80000001, b"config").measured(1, 0x80000003, b"kernel")
    return log.measured(2, 6, b"initrd").to_bytes() + b"\xff" * 40


def text_reader(read: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: read(data.decode("utf-8", "surrogateescape"))


READERS: dict[str, Callable[[bytes], object]] = {
    "quote": Quote.parse,
    "quote v5": Quote.parse,
    "quote v5 extended": Quote.parse,
    "signature data": SignatureData.parse,
    "tdreport": parse_tdreport,
    "event log": EventLog.parse,
    "ccel": parse_ccel,
    "sgx extension": PckExtension.from_der,
    "certificate": Cert,
    "crl": lambda data: Crl(data, "CRL"),
    "pem": split_pem,
    "root": TrustedRoot.from_bytes,
    "collateral": text_reader(Collateral.from_json),
    "policy": text_reader(Policy.from_toml),
    "tcb info": text_reader(TcbInfo.parse),
    "qe identity": text_reader(EnclaveIdentity.parse),
    "anything": inspect_bytes,
}


@pytest.fixture(scope="module")
def specimens(pki: Pki, quote_bytes: bytes, platform: ReportingPlatform, enclave: QuotingEnclave) -> dict[str, bytes]:
    """A good one of each kind, for mutations to begin from."""
    parsed = Quote.parse(quote_bytes)
    return {
        "quote": quote_bytes,
        "quote v5": enclave.quote(platform.report(), version=5, body_type=3),
        "quote v5 extended": enclave.quote(platform.report(), version=5, body_type=4),
        "signature data": parsed.signature.to_bytes(),
        "tdreport": platform.report(),
        "event log": sample_log(),
        "ccel": make_ccel(0x1000, 0x10000),
        "sgx extension": pki.pck_extension.to_der(),
        "certificate": pki.root_der,
        "crl": pki.revised(revoked=frozenset(["tcb"])).root_crl,
        "pem": pki.pck_chain.encode(),
        "root": pki.root_pem.encode(),
        "collateral": pki.collateral().to_json().encode(),
        "policy": b'[tcb]\nallow = ["UpToDate"]\n[td]\nmr_td = "00"\nallow_debug = false\n',
        "tcb info": pki.tcb_info[0].encode(),
        "qe identity": pki.qe_identity[0].encode(),
        "anything": quote_bytes,
    }


@pytest.mark.parametrize("kind", READERS)
@given(data=st.binary(max_size=2000))
@example(data=b"")
@example(data=b"{" * 100_000)
@example(data=b"\x30\x80" * 1000)
@example(data=b"[" * 100_000)
def test_any_bytes_give_an_object_or_our_error(kind: str, data: bytes) -> None:
    with suppress(SoftTdxError):
        READERS[kind](data)


@pytest.mark.parametrize("kind", READERS)
@given(draw=st.data())
def test_any_damage_to_a_good_one_gives_an_object_or_our_error(
    kind: str, specimens: dict[str, bytes], draw: st.DataObject
) -> None:
    data = bytearray(specimens[kind])
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(data)))
        action = draw.draw(st.sampled_from(["replace", "cut", "insert", "end"]))
        if action == "replace":
            data[at : at + 1] = draw.draw(st.binary(min_size=1, max_size=1))
        elif action == "cut":
            del data[at : at + draw.draw(st.integers(1, 64))]
        elif action == "insert":
            data[at:at] = draw.draw(st.binary(min_size=1, max_size=16))
        else:
            del data[at:]
    with suppress(SoftTdxError):
        READERS[kind](bytes(data))


@given(draw=st.data())
def test_no_quote_or_collateral_makes_the_verifier_raise(pki: Pki, quote_bytes: bytes, draw: st.DataObject) -> None:
    collateral = pki.collateral()
    values = vars(collateral).copy()
    name = draw.draw(st.sampled_from([key for key, value in values.items() if value is not None]))
    kind = st.binary(max_size=200) if isinstance(values[name], bytes) else st.text(max_size=200)
    values[name] = draw.draw(kind)
    damaged = draw.draw(st.sampled_from([quote_bytes, b"", quote_bytes[:700], draw.draw(st.binary(max_size=800))]))
    verdict = Verifier(pki.root_der).verify(damaged, Collateral(**values), now=1_767_225_600)
    assert verdict.accepted == (not verdict.reason)


@pytest.mark.parametrize(("version", "body_type"), [(4, None), (5, 2), (5, 3), (5, 4)])
def test_a_quote_reads_back_byte_for_byte(
    enclave: QuotingEnclave, platform: ReportingPlatform, version: int, body_type: int | None
) -> None:
    data = enclave.quote(platform.report(), version=version, body_type=body_type)
    for tail in (b"", b"\0" * 100, b"anything"):
        parsed = Quote.parse(data + tail)
        assert parsed.to_bytes() == data + tail
        assert parsed.trailer == tail
        assert parsed.body_type == (body_type or BodyType.TD10)


def test_the_layouts_have_the_documented_sizes_and_places() -> None:
    assert QuoteHeader.size() == 48
    assert EnclaveReport.size() == 384
    assert [BODIES[kind].size() for kind in (BodyType.TD10, BodyType.TD15, BodyType.TD15_EX)] == [584, 648, 885]
    assert BODIES[BodyType.TD10].offset("mr_td") == 136
    assert BODIES[BodyType.TD10].offset("report_data") == 520
    assert EnclaveReport.offset("report_data") == 320


@pytest.mark.parametrize("name", REAL_QUOTES)
def test_a_real_quote_reads_back_byte_for_byte_and_its_signatures_hold(
    fixture_file: Callable[[str], bytes], name: str
) -> None:
    data = fixture_file(name)
    parsed = Quote.parse(data)
    assert parsed.to_bytes() == data
    real_root = split_pem(parsed.signature.chain)[2]
    verdict = Verifier(real_root).verify_signatures(data)
    assert verdict.accepted, verdict.reason


@pytest.mark.parametrize("name", REAL_QUOTES)
def test_a_real_quote_with_one_bit_of_its_body_changed_is_refused(
    fixture_file: Callable[[str], bytes], name: str
) -> None:
    data = bytearray(fixture_file(name))
    real_root = split_pem(Quote.parse(bytes(data)).signature.chain)[2]
    data[200] ^= 1
    verdict = Verifier(real_root).verify_signatures(bytes(data))
    assert not verdict.accepted
    assert "signature" in verdict.reason


def test_the_real_platforms_quote_is_below_the_real_collaterals_lowest_level(
    fixture_file: Callable[[str], bytes],
) -> None:

    quote = Quote.parse(fixture_file("tdx_prod_quote_SPR_E4.dat"))
    info = TcbInfo.parse(json.dumps(json.loads(fixture_file("sample_tcbInfo_response"))["tcbInfo"]))

    pck = pck_extension(Cert(split_pem(quote.signature.chain)[0]))
    assert pck.fmspc == info.fmspc
    assert PckExtension.from_der(pck.to_der()) == pck
    with pytest.raises(MalformedError, match="no TCB level matches"):
        info.evaluate(pck, quote.body.tee_tcb_svn)


def test_a_real_pck_certificates_extension_is_rebuilt_byte_for_byte(fixture_file: Callable[[str], bytes]) -> None:
    leaf = Cert(split_pem(Quote.parse(fixture_file("tdx_prod_quote_SPR_E4.dat")).signature.chain)[0])
    assert leaf.sgx_extension is not None
    assert pck_extension(leaf).to_der() == leaf.sgx_extension


@pytest.mark.parametrize("name", ["pckcrl", "rootcrl.der"])
def test_a_real_crl_is_read(fixture_file: Callable[[str], bytes], name: str) -> None:
    assert inspect_bytes(fixture_file(name))["kind"] == "CRL"


@pytest.mark.parametrize(
    "name", ["sample_tcbInfo_response", "sample_tcbinfo_response_v5", "sample_qeIdentity_response"]
)
def test_real_collateral_is_read(fixture_file: Callable[[str], bytes], name: str) -> None:
    assert inspect_bytes(fixture_file(name))["kind"] in ("TCB info", "QE identity")


def test_a_real_tdreport_reads_back_byte_for_byte(fixture_file: Callable[[str], bytes]) -> None:
    data = fixture_file("report.dat")
    assert bytes(parse_tdreport(data)) == data
    assert inspect_bytes(data)["kind"] == "TDREPORT"


def test_collateral_survives_json(pki: Pki) -> None:
    collateral = pki.collateral()
    assert Collateral.from_json(collateral.to_json()) == collateral
