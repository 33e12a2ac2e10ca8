"""The quoting path: TDREPORT in, quote out, judged by dcap-qvl."""

from __future__ import annotations

from dataclasses import replace

import pytest
from attest_platform import NOW, ReportingPlatform
from hypothesis import given
from hypothesis import strategies as st

from softtdx.attest import (
    DcapRejectedError,
    MalformedError,
    Pki,
    PlatformTcb,
    Quote,
    QuotingEnclave,
    QuotingError,
    TdReport,
    verify_with_dcap_qvl,
)
from softtdx.attest.tdreport import parse_tdreport
from softtdx.errors import SoftTdxError

FORMATS = [(4, None), (5, 2), (5, 3), (5, 4)]


@pytest.mark.parametrize(("version", "body_type"), FORMATS)
def test_a_quote_of_every_format_is_accepted_by_dcap_qvl(
    pki: Pki, platform: ReportingPlatform, enclave: QuotingEnclave, version: int, body_type: int | None
) -> None:
    report = platform.report(b"\x5a" * 64)
    quote = enclave.quote(report, version=version, body_type=body_type)
    verdict = verify_with_dcap_qvl(quote, pki, NOW)
    assert verdict.status == "UpToDate"
    assert verdict.advisory_ids == ()
    parsed = Quote.parse(quote)
    assert parsed.to_bytes() == quote
    assert parsed.body.report_data == b"\x5a" * 64
    assert parsed.body.mr_td == parse_tdreport(report).td_info.mrtd


@pytest.mark.parametrize("ca", ["platform", "processor"])
def test_either_pck_ca_may_issue_the_certificate(ca: str) -> None:
    pki = Pki.create(seed=9, ca=ca)
    platform = ReportingPlatform(pki.options.tcb)
    quote = QuotingEnclave(pki, platform.verify).quote(platform.report())
    assert verify_with_dcap_qvl(quote, pki, NOW).status == "UpToDate"


@pytest.mark.parametrize("field", ["mr_td", "report_data", "rtmr3", "tee_tcb_svn"])
def test_one_changed_bit_of_the_body_is_rejected(pki: Pki, quote_bytes: bytes, field: str) -> None:
    quote = Quote.parse(quote_bytes)
    value = bytearray(getattr(quote.body, field))
    value[0] ^= 1
    changed = replace(quote, body=replace(quote.body, **{field: bytes(value)}))
    with pytest.raises(DcapRejectedError, match="signature is invalid"):
        verify_with_dcap_qvl(changed.to_bytes(), pki, NOW)


@pytest.mark.parametrize("field", ["signature", "qe_report_signature", "attestation_key", "auth_data"])
def test_one_changed_bit_of_the_signature_data_is_rejected(pki: Pki, quote_bytes: bytes, field: str) -> None:
    quote = Quote.parse(quote_bytes)
    value = bytearray(getattr(quote.signature, field))
    value[-1] ^= 1
    changed = replace(quote, signature=replace(quote.signature, **{field: bytes(value)}))
    with pytest.raises(DcapRejectedError):
        verify_with_dcap_qvl(changed.to_bytes(), pki, NOW)


def test_another_root_is_not_trusted(pki: Pki, quote_bytes: bytes) -> None:
    with pytest.raises(DcapRejectedError):
        verify_with_dcap_qvl(quote_bytes, (pki.collateral(), Pki.create(seed=7).root_der), NOW)


def test_the_same_seed_gives_the_same_pki_and_quote_to_the_byte(platform: ReportingPlatform) -> None:
    first, second = Pki.create(seed=123), Pki.create(seed=123)
    assert first.collateral() == second.collateral()
    assert first.root_der == second.root_der
    report = platform.report()
    assert QuotingEnclave(first, platform.verify).quote(report) == QuotingEnclave(second, platform.verify).quote(report)
    assert Pki.create(seed=124).root_der != first.root_der


def test_without_a_seed_no_two_pkis_are_alike() -> None:
    assert Pki.create().root_der != Pki.create().root_der


def test_a_report_of_another_platform_is_not_quoted(pki: Pki, enclave: QuotingEnclave) -> None:
    stranger = ReportingPlatform(pki.options.tcb, key=b"another report key")
    with pytest.raises(QuotingError, match="MAC"):
        enclave.quote(stranger.report())


@given(at=st.integers(0, TdReport.SIZE * 8 - 1))
def test_a_report_with_any_protected_bit_changed_is_not_quoted(
    platform: ReportingPlatform, enclave: QuotingEnclave, at: int
) -> None:
    original = platform.report()
    data = bytearray(original)
    data[at // 8] ^= 1 << at % 8
    if 495 <= at // 8 < 512:  # the 17 bytes between TEE_TCB_INFO and TDINFO: no hash reaches them, no quote has them
        assert enclave.quote(bytes(data)) == enclave.quote(original)
        return
    with pytest.raises(QuotingError):
        enclave.quote(bytes(data))


def test_a_report_of_another_cpusvn_is_refused_with_the_way_out(pki: Pki) -> None:
    older = ReportingPlatform(replace(pki.options.tcb, cpu_svn=bytes(16)))
    with pytest.raises(QuotingError, match="make the PKI with the platform's cpu_svn"):
        QuotingEnclave(pki, older.verify).quote(older.report())


@given(data=st.binary(max_size=1100))
def test_bytes_that_are_no_report_are_refused(enclave: QuotingEnclave, data: bytes) -> None:
    with pytest.raises(SoftTdxError):
        enclave.quote(data)


@pytest.mark.parametrize(("version", "body_type"), [(3, None), (6, None), (4, 3), (5, 1), (5, 5), (-1, None)])
def test_a_format_that_does_not_exist_is_refused(
    platform: ReportingPlatform, enclave: QuotingEnclave, version: int, body_type: int | None
) -> None:
    with pytest.raises(QuotingError):
        enclave.quote(platform.report(), version=version, body_type=body_type)


def test_a_platform_of_other_versions_is_up_to_date_when_its_pki_is_made_for_it() -> None:
    tcb = PlatformTcb(
        cpu_svn=bytes(range(16)),
        tee_tcb_svn=bytes([7, 2, 3]) + bytes(13),
        mr_signer_seam=b"\x11" * 48,
        seam_attributes=bytes(7) + b"\x80",
        fmspc=bytes.fromhex("00906ed50000"),
        pce_svn=300,
    )
    pki, platform = Pki.create(seed=1, tcb=tcb), ReportingPlatform(tcb)
    quote = QuotingEnclave(pki, platform.verify).quote(platform.report(), version=5)
    assert verify_with_dcap_qvl(quote, pki, NOW).status == "UpToDate"


def test_a_report_of_the_wrong_length_says_the_length(enclave: QuotingEnclave) -> None:
    with pytest.raises(MalformedError, match="1024 bytes, this is 1023"):
        enclave.quote(bytes(1023))


def test_a_td_bound_to_service_tds_gets_a_quote_that_says_so(
    platform: ReportingPlatform, enclave: QuotingEnclave
) -> None:
    report = platform.report(servtd_hash=b"\x01" * 48)
    assert Quote.parse(enclave.quote(report)).header.version == 5
    assert Quote.parse(enclave.quote(platform.report())).header.version == 4
    assert Quote.parse(enclave.quote(platform.report(), body_type=4)).header.version == 5
    for how in ({"version": 4}, {"version": 5, "body_type": 2}):
        with pytest.raises(QuotingError, match="service TDs"):
            enclave.quote(report, **how)
