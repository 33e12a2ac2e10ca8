"""Every verdict a user can set up, and what ours and three independent verifiers make of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import dcap_qvl
import pytest
from attest_platform import NOW, ReportingPlatform
from other_verifiers import DcapQvl, LineVerifier, Opinion

from softtdx.attest import Pki, PkiError, QuotingEnclave, TcbStatus, TcbVariation, Verdict, Verifier
from softtdx.attest.pki import EXPIRABLE, PLATFORM_FLAGS, REVOCABLE

ADVISORIES = ("INTEL-SA-00960", "INTEL-SA-00982")
STATUSES = list(TcbStatus)[:7]
UNUSED_CA = "processor"  # the PCK certificate is the platform CA's, so what happens to this one is no matter

# What one verifier does not look at, and so accepts; ours and the others refuse.
IGNORES_EXPIRY = {"dcap-qvl": {"root"}, "@phala/dcap-qvl": {"root-crl", "pck-crl"}, "go-tdx-guest": set()}


@pytest.fixture(scope="module", params=["dcap-qvl", "@phala/dcap-qvl", "go-tdx-guest"])
def other(request: pytest.FixtureRequest) -> DcapQvl | LineVerifier:
    if request.param == "dcap-qvl":
        return DcapQvl()
    name = "javascript_verifier" if request.param.startswith("@") else "go_verifier"
    verifier: LineVerifier = request.getfixturevalue(name)
    return verifier


def both(
    pki: Pki, platform: ReportingPlatform, other: DcapQvl | LineVerifier, report: bytes | None = None, **how: int
) -> tuple[Verdict, Opinion]:
    quote = QuotingEnclave(pki, platform.verify).quote(report or platform.report(), **how)
    collateral = pki.collateral()
    mine = Verifier(pki.root_der).verify(quote, collateral, now=NOW)
    return mine, other.judge(quote, collateral, pki.root_der, NOW)


def agree(mine: Verdict, theirs: Opinion, other: DcapQvl | LineVerifier) -> None:
    """go-tdx-guest accepts UpToDate only, and names the status in its refusal; the others give status and ids."""
    if other.name == "go-tdx-guest":
        assert theirs.accepted == (mine.status is TcbStatus.UP_TO_DATE), theirs.error
        if mine.status not in (None, TcbStatus.UP_TO_DATE):
            assert f'found "{mine.status}"' in theirs.error
        return
    assert (theirs.accepted, theirs.status) == (mine.accepted, mine.status), (theirs.error, mine.reason)
    if theirs.accepted:
        assert theirs.advisory_ids == mine.advisory_ids


@pytest.mark.parametrize("status", STATUSES)
def test_a_platforms_status_is_what_the_pki_was_told(
    pki: Pki, platform: ReportingPlatform, other: DcapQvl | LineVerifier, status: TcbStatus
) -> None:
    varied = pki.revised(vary=TcbVariation(status=status, advisory_ids=ADVISORIES))
    mine, theirs = both(varied, platform, other)
    agree(mine, theirs, other)
    if status is TcbStatus.REVOKED:
        assert not mine.accepted
        assert "Revoked" in mine.reason
        assert "Revoked" in theirs.error
    else:
        assert (mine.status, mine.advisory_ids) == (status, ADVISORIES)


@pytest.mark.parametrize("status", [TcbStatus.OUT_OF_DATE, TcbStatus.REVOKED])
@pytest.mark.parametrize("part", ["module_status", "qe_status"])
@pytest.mark.parametrize("platform_status", [TcbStatus.UP_TO_DATE, TcbStatus.CONFIGURATION_NEEDED])
def test_a_bad_module_or_quoting_enclave_makes_the_platform_bad(
    pki: Pki,
    platform: ReportingPlatform,
    other: DcapQvl | LineVerifier,
    part: str,
    status: TcbStatus,
    platform_status: TcbStatus,
) -> None:
    varied = pki.revised(vary=replace(TcbVariation(status=platform_status), **{part: status}))
    mine, theirs = both(varied, platform, other)
    if status is TcbStatus.REVOKED:
        assert not mine.accepted
    elif platform_status is TcbStatus.UP_TO_DATE:
        assert mine.status is TcbStatus.OUT_OF_DATE
    else:
        assert mine.status is TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED
    if other.name == "dcap-qvl":
        agree(mine, theirs, other)
    else:
        # The other two do not converge statuses as Intel's library does, but none takes such a platform for good.
        assert theirs.status is None or theirs.status.startswith("OutOfDate")


def test_a_platform_below_every_level_is_refused(
    pki: Pki, platform: ReportingPlatform, other: DcapQvl | LineVerifier
) -> None:
    mine, theirs = both(pki.revised(vary=TcbVariation(no_match=True)), platform, other)
    assert "no TCB level matches" in mine.reason
    assert "matching tcb level" in theirs.error.lower()


@pytest.mark.parametrize("name", REVOCABLE)
def test_a_revoked_certificate_is_refused(
    pki: Pki, platform: ReportingPlatform, other: DcapQvl | LineVerifier, name: str
) -> None:
    mine, theirs = both(pki.revised(revoked=frozenset([name])), platform, other)
    assert mine.accepted == theirs.accepted == (name == UNUSED_CA)
    assert mine.accepted or "revoked" in mine.reason


@pytest.mark.parametrize("name", EXPIRABLE)
def test_what_has_run_out_is_refused(
    pki: Pki, platform: ReportingPlatform, other: DcapQvl | LineVerifier, name: str
) -> None:
    mine, theirs = both(pki.revised(expired=frozenset([name])), platform, other)
    assert mine.accepted == (name == UNUSED_CA), mine.reason
    assert theirs.accepted == (name == UNUSED_CA or name in IGNORES_EXPIRY[other.name]), theirs.error


@pytest.mark.parametrize(("version", "body_type"), [(4, None), (5, 2), (5, 3), (5, 4)])
def test_every_format_is_accepted_by_all_who_know_it(
    pki: Pki, platform: ReportingPlatform, other: DcapQvl | LineVerifier, version: int, body_type: int | None
) -> None:
    how = {"version": version} | ({"body_type": body_type} if body_type else {})
    mine, theirs = both(pki, platform, other, **how)
    assert mine.accepted
    if other.name == "go-tdx-guest" and version == 5:
        assert "quote format not supported" in theirs.error  # 0.3.1, the newest there is, reads version 4 only
    elif other.name == "@phala/dcap-qvl" and body_type == 4:
        assert "Unsupported body type" in theirs.error
    else:
        assert theirs.accepted, theirs.error
        assert theirs.status == "UpToDate"


BAD_ATTRIBUTES = {
    "debug": 1 << 28 | 1,
    "profiled": 1 << 28 | 1 << 5,
    "migratable": 1 << 28 | 1 << 29,
    "no SEPT_VE_DISABLE": 0,
    "reserved bit 40": 1 << 28 | 1 << 40,
    "reserved bit 1": 1 << 28 | 1 << 1,
    "SERVTD_EXT": 1 << 28 | 1 << 17,
}
GOOD_ATTRIBUTES = {"PKS": 1 << 28 | 1 << 30, "PERFMON": 1 << 28 | 1 << 63, "KL": 1 << 28 | 1 << 31}


@pytest.mark.parametrize("name", BAD_ATTRIBUTES)
def test_a_td_that_its_host_can_look_into_is_refused(pki: Pki, platform: ReportingPlatform, name: str) -> None:
    report = platform.report(attributes=BAD_ATTRIBUTES[name])
    mine, theirs = both(pki, platform, DcapQvl(), report)
    assert not mine.accepted
    assert not theirs.accepted


@pytest.mark.parametrize("name", GOOD_ATTRIBUTES)
def test_a_td_with_harmless_attributes_is_accepted(pki: Pki, platform: ReportingPlatform, name: str) -> None:
    mine, theirs = both(pki, platform, DcapQvl(), platform.report(attributes=GOOD_ATTRIBUTES[name]))
    assert mine.accepted
    assert theirs.accepted


@pytest.mark.parametrize("bit", range(64))
def test_each_attribute_bit_is_judged_as_dcap_qvl_judges_it(pki: Pki, platform: ReportingPlatform, bit: int) -> None:
    mine, theirs = both(pki, platform, DcapQvl(), platform.report(attributes=1 << 28 ^ 1 << bit), version=5)
    assert mine.accepted == theirs.accepted, (mine.reason, theirs.error)


def test_a_td_bound_to_a_service_td_is_refused_unless_allowed(pki: Pki, platform: ReportingPlatform) -> None:
    report = platform.report(servtd_hash=b"\x01" * 48)
    mine, theirs = both(pki, platform, DcapQvl(), report, version=5)
    assert "MRSERVICETD" in mine.reason
    assert not theirs.accepted


def test_another_modules_signer_or_attributes_are_refused(pki: Pki, platform: ReportingPlatform) -> None:
    for change in ({"mrsignerseam": b"\x01" * 48}, {"attributes": 1}):
        mine, theirs = both(pki, platform, DcapQvl(), platform.report(tcb=change))
        assert not mine.accepted
        assert not theirs.accepted


@pytest.mark.parametrize("current", [5, 4, 0])
@pytest.mark.parametrize("launch", [5, 4, 0])
def test_a_td_that_lived_through_a_module_update_is_advised_to_relaunch(
    pki: Pki, platform: ReportingPlatform, launch: int, current: int
) -> None:
    svn = platform.tcb.tee_tcb_svn
    tcb = {"tee_tcb_svn": bytes([launch]) + svn[1:], "tee_tcb_svn2": bytes([current]) + svn[1:]}
    mine, theirs = both(pki, platform, DcapQvl(), platform.report(tcb=tcb), version=5)
    assert (mine.accepted, mine.status) == (theirs.accepted, theirs.status)
    if launch < 5 and current == 5:
        assert mine.status is TcbStatus.TD_RELAUNCH_ADVISED


def test_a_verdict_that_no_document_can_say_is_refused() -> None:
    with pytest.raises(PkiError, match="QE status"):
        Pki.create(seed=1, vary=TcbVariation(qe_status=TcbStatus.SW_HARDENING_NEEDED))
    with pytest.raises(PkiError, match="is not one of"):
        Pki.create(seed=1, vary=TcbVariation(status=TcbStatus.TD_RELAUNCH_ADVISED))
    with pytest.raises(PkiError, match="revoked 'nobody'"):
        Pki.create(seed=1, revoked=frozenset(["nobody"]))


def test_independent_verifiers_fetch_collateral_over_http(
    pki: Pki, quote_bytes: bytes, javascript_verifier: LineVerifier, go_verifier: LineVerifier
) -> None:
    from softtdx.attest.pcs import PcsListener

    with PcsListener(pki, port=0) as pcs:
        for verifier in (javascript_verifier, go_verifier):
            opinion = verifier.judge_by_pcs(quote_bytes, pcs.url, pki.root_der, NOW)
            assert (opinion.accepted, opinion.status) == (True, "UpToDate"), opinion.error


def strict_claims(pki: Pki, quote: bytes) -> dict[str, Any]:
    """What dcap-qvl's strict policy makes of the quote; ValueError when it refuses."""
    collateral = dcap_qvl.QuoteCollateralV3.from_json(pki.collateral().to_json())
    verifier = dcap_qvl.QuoteVerifier(pki.root_der)
    claims = verifier.verify_with_policy(quote, collateral, NOW, dcap_qvl.QuotePolicy.strict(NOW))
    found: dict[str, Any] = json.loads(claims.to_json())
    return found


def test_a_default_platform_passes_the_strictest_policy(pki: Pki, quote_bytes: bytes) -> None:
    claims = strict_claims(pki, quote_bytes)
    assert claims["tcb"]["status"] == "UpToDate"
    assert claims["tcb"]["eval_data_number"] == 17


@pytest.mark.parametrize("flag", PLATFORM_FLAGS)
def test_a_platform_flag_in_the_pck_certificate_is_seen(pki: Pki, platform: ReportingPlatform, flag: str) -> None:
    flagged = pki.revised(platform_flags=frozenset([flag]))
    quote = QuotingEnclave(flagged, platform.verify).quote(platform.report())
    with pytest.raises(ValueError, match="not allowed"):
        strict_claims(flagged, quote)
