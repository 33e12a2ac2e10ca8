"""Policies: what a user may ask for, and that asking for it makes a difference."""

from __future__ import annotations

from pathlib import Path

import pytest
from attest_platform import NOW, ReportingPlatform

from softtdx.attest import (
    Pki,
    Policy,
    PolicyError,
    Quote,
    QuotingEnclave,
    TcbStatus,
    TcbVariation,
    VerificationError,
    Verifier,
)


def judge(pki: Pki, quote: bytes, text: str) -> str:
    """The reason why the quote is refused under the policy; empty when it is accepted."""
    return Verifier(pki.root_der).verify(quote, pki.collateral(), now=NOW, policy=Policy.from_toml(text)).reason


def test_an_empty_policy_asks_for_up_to_date(pki: Pki, platform: ReportingPlatform, quote_bytes: bytes) -> None:
    assert judge(pki, quote_bytes, "") == ""
    late = pki.revised(vary=TcbVariation(status=TcbStatus.SW_HARDENING_NEEDED, advisory_ids=("INTEL-SA-1",)))
    assert "SWHardeningNeeded is not among" in judge(late, quote_bytes, "")
    assert judge(late, quote_bytes, '[tcb]\nallow = ["UpToDate", "SWHardeningNeeded"]') == ""
    both = '[tcb]\nallow = ["SWHardeningNeeded"]\nreject_advisories = ["INTEL-SA-1"]'
    assert judge(late, quote_bytes, both) == "advisory INTEL-SA-1 is rejected"


@pytest.mark.parametrize(
    "name", ["mr_td", "mr_seam", "mr_config_id", "mr_owner", "mr_owner_config", "rtmr0", "rtmr1", "rtmr2", "rtmr3"]
)
def test_a_measurement_must_be_one_of_those_named(pki: Pki, quote_bytes: bytes, name: str) -> None:
    value = getattr(Quote.parse(quote_bytes).body, name).hex()
    assert judge(pki, quote_bytes, f'[td]\n{name} = "{value}"') == ""
    assert judge(pki, quote_bytes, f'[td]\n{name} = ["{"11" * 48}", "{value}"]') == ""
    assert name in judge(pki, quote_bytes, f'[td]\n{name} = "{"11" * 48}"')
    assert name in judge(pki, quote_bytes, f"[td]\n{name} = []")


def test_report_data_may_be_given_whole_or_as_its_beginning(pki: Pki, quote_bytes: bytes) -> None:
    data = Quote.parse(quote_bytes).body.report_data
    for size in (0, 1, 32, 64):
        assert judge(pki, quote_bytes, f'[td]\nreport_data = "{data[:size].hex()}"') == ""
    assert "report data" in judge(pki, quote_bytes, '[td]\nreport_data = "ff"')
    verifier, policy = Verifier(pki.root_der), Policy().expecting(b"\xff")
    assert not verifier.verify(quote_bytes, pki.collateral(), now=NOW, policy=policy).accepted
    with pytest.raises(PolicyError, match="at most 64"):
        Policy().expecting(bytes(65))


def test_attributes_and_xfam_are_asked_about_by_name(pki: Pki, quote_bytes: bytes) -> None:
    assert judge(pki, quote_bytes, '[td]\nattributes_required = ["SEPT_VE_DISABLE"]') == ""
    assert "lack" in judge(pki, quote_bytes, '[td]\nattributes_required = ["PERFMON"]')
    assert "forbidden" in judge(pki, quote_bytes, '[td]\nattributes_forbidden = ["SEPT_VE_DISABLE"]')
    assert judge(pki, quote_bytes, "[td]\nxfam_allowed = 0x600e7") == ""
    assert "XFAM" in judge(pki, quote_bytes, "[td]\nxfam_allowed = 3")


def test_debug_and_service_tds_can_be_allowed(pki: Pki, platform: ReportingPlatform, enclave: QuotingEnclave) -> None:
    debugged = enclave.quote(platform.report(attributes=1 << 28 | 1))
    assert "debugged" in judge(pki, debugged, "")
    assert judge(pki, debugged, "[td]\nallow_debug = true") == ""
    bound = enclave.quote(platform.report(servtd_hash=b"\x01" * 48), version=5)
    assert "MRSERVICETD" in judge(pki, bound, "")
    assert judge(pki, bound, "[td]\nallow_service_td = true") == ""


def test_old_evaluation_data_can_be_refused(pki: Pki, quote_bytes: bytes) -> None:
    assert judge(pki, quote_bytes, "[tcb]\nmin_evaluation_data_number = 17") == ""
    assert "older than 18" in judge(pki, quote_bytes, "[tcb]\nmin_evaluation_data_number = 18")


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[tdx]",
        "td = 5",
        "[td]\nmrtd = '00'",
        "[td]\nmr_td = '00'",
        "[td]\nmr_td = 'xx'",
        "[td]\nmr_td = 5",
        "[td]\nmr_td = [5]",
        "[td]\nallow_debug = 1",
        "[td]\nattributes_required = ['FAST']",
        "[td]\nxfam_allowed = -1",
        "[td]\nxfam_allowed = true",
        f"[td]\nreport_data = '{'00' * 65}'",
        "[td]\nreport_data = 7",
        "[tcb]\nallow = ['Fine']",
        "[tcb]\nmin_evaluation_data_number = 'x'",
        "a = " + "[" * 5000,
    ],
)
def test_a_slip_of_the_pen_is_refused_and_does_not_pass_for_a_check(text: str) -> None:
    with pytest.raises(PolicyError):
        Policy.from_toml(text)


def test_a_policy_is_loaded_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('[tcb]\nallow = ["OutOfDate"]')
    assert Policy.load(path).allow == {TcbStatus.OUT_OF_DATE}
    with pytest.raises(PolicyError, match="cannot be read"):
        Policy.load(tmp_path / "absent.toml")


def test_the_verdict_explains_itself_step_by_step(pki: Pki, quote_bytes: bytes) -> None:
    verdict = Verifier(pki.root_der).verify(quote_bytes, pki.collateral(), now=NOW)
    assert [step.name for step in verdict.steps] == [
        "root CA",
        "TCB info",
        "QE identity",
        "quote",
        "PCK chain",
        "QE report",
        "attestation key",
        "quote signature",
        "quoting enclave",
        "TDX module",
        "TCB level",
        "TD attributes",
    ]
    assert verdict.require() is verdict
    described = verdict.describe()
    assert described["accepted"] is True
    refused = Verifier(pki.root_der).verify(quote_bytes[:-1], pki.collateral(), now=NOW)
    with pytest.raises(VerificationError, match="not accepted"):
        refused.require()


def test_remembered_collateral_is_judged_anew_at_another_time_and_when_it_changes(pki: Pki, quote_bytes: bytes) -> None:
    verifier, good = Verifier(pki.root_der), pki.collateral()
    assert verifier.verify(quote_bytes, good, now=NOW).accepted
    assert "ran out" in verifier.verify(quote_bytes, good, now=NOW + 40 * 365 * 86400).reason
    assert "not valid before" in verifier.verify(quote_bytes, good, now=0).reason
    revoked = pki.revised(revoked=frozenset(["pck"])).collateral()
    assert "revoked" in verifier.verify(quote_bytes, revoked, now=NOW).reason
    assert verifier.verify(quote_bytes, good, now=NOW).accepted


def test_a_chain_given_with_the_collateral_is_preferred_to_the_quotes(pki: Pki, quote_bytes: bytes) -> None:
    from dataclasses import replace

    verifier = Verifier(pki.root_der)
    same = replace(pki.collateral(), pck_certificate_chain=pki.pck_chain)
    assert verifier.verify(quote_bytes, same, now=NOW).accepted
    other = replace(pki.collateral(), pck_certificate_chain=Pki.create(seed=77).pck_chain)
    assert not verifier.verify(quote_bytes, other, now=NOW).accepted
