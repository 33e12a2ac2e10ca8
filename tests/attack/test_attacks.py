"""Every attack ends as its page says, on a TD and where the protection is missing."""

import json

import pytest
from click.testing import CliRunner

from softtdx.attack import Outcome, Report, all_attacks, attestation, find, run_attack
from softtdx.attack.lab import Side, SideReport
from softtdx.attest import DcapRejectedError, Verifier, verify_with_dcap_qvl
from softtdx.cli.attack import attack as command
from softtdx.errors import SoftTdxError


@pytest.mark.parametrize("chosen", all_attacks(), ids=lambda a: a.name)
def test_the_attack_ends_as_its_page_says(chosen):
    report = run_attack(chosen)
    protected, unprotected = report.sides
    assert (protected.side, unprotected.side) == (Side.PROTECTED, Side.UNPROTECTED)
    assert protected.outcome is chosen.expected, protected.evidence
    assert unprotected.outcome.attacker_won, unprotected.evidence


def test_only_known_limits_of_the_real_scheme_let_the_attacker_win():
    assert [a.name for a in all_attacks() if a.expected.attacker_won] == [
        "replay",
        "logical-flip",
        "pamt-replay",
        "tdvps-replay",
        "coarse-step",
        "page-trace",
    ]


def test_dcap_qvl_refuses_the_quotes_that_are_not_genuine_or_not_in_force(monkeypatch):
    judged = []

    class Recording(Verifier):
        def __init__(self, root):
            super().__init__(root)
            self.root_der = root

        def verify(self, quote, collateral, *, now=None, policy=None):
            verdict = super().verify(quote, collateral, now=now, policy=policy)
            if verdict.status is None:
                judged.append((quote, collateral, self.root_der, now))
            return verdict

    monkeypatch.setattr(attestation, "Verifier", Recording)
    for chosen in all_attacks():
        if chosen.family == "attestation":
            run_attack(chosen)
    assert len(judged) >= 7
    for quote, collateral, root, now in judged:
        with pytest.raises(DcapRejectedError):
            verify_with_dcap_qvl(quote, (collateral, root), now)


def test_every_attack_has_a_page():
    for chosen in all_attacks():
        assert len(chosen.page) > 40, chosen.name
        assert chosen.promise.endswith("."), chosen.name


def test_an_unknown_attack_names_near_ones():
    with pytest.raises(SoftTdxError, match="host-read"):
        find("host-reed")


def test_a_run_reports_as_json_and_as_a_page(tmp_path):
    page = tmp_path / "report.html"
    result = CliRunner().invoke(command, ["run", "host-read", "--json", "--report", str(page)], standalone_mode=False)
    assert result.return_value == 0
    (report,) = json.loads(result.stdout)
    assert report["holds"] is True
    assert report["protected"]["outcome"] == Outcome.STOPPED.value
    assert report["unprotected"]["outcome"] == Outcome.LEAKED.value
    assert "The host reads a private page" in page.read_text()


def test_the_list_and_a_page_can_be_read_as_json():
    listed = json.loads(CliRunner().invoke(command, ["list", "--json"]).stdout)
    assert [a["name"] for a in listed] == [a.name for a in all_attacks()]
    shown = json.loads(CliRunner().invoke(command, ["show", "replay", "--json"]).stdout)
    assert shown["protected"] == "corrupted"


def test_a_report_of_all_has_a_section_for_each_attack(tmp_path, monkeypatch):
    def run(chosen, *, unprotected_only=False):
        assert not unprotected_only
        sides = ((Side.PROTECTED, chosen.expected), (Side.UNPROTECTED, Outcome.LEAKED))
        return Report(chosen, tuple(SideReport(side, outcome, "<evidence>", 0.5) for side, outcome in sides))

    monkeypatch.setattr("softtdx.cli.attack.run_attack", run)
    page = tmp_path / "report.html"
    result = CliRunner().invoke(command, ["run", "all", "--json", "--report", str(page)], standalone_mode=False)
    assert result.return_value == 0
    reports = json.loads(result.stdout)
    assert [r["name"] for r in reports] == [a.name for a in all_attacks()]
    for report in reports:
        assert report.keys() == {"name", "holds", "expected", "protected", "unprotected"}
        assert report["protected"].keys() == {"outcome", "evidence", "seconds"}
    text = page.read_text()
    assert text.count("<section id=") == len(all_attacks())
    assert "&lt;evidence&gt;" in text
    assert "<evidence>" not in text


def test_there_are_ninety_attacks_of_every_family():
    assert len(all_attacks()) >= 90
    assert {a.family for a in all_attacks()} == {"memory", "mapping", "control", "attestation"}
