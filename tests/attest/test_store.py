"""A PKI on disk: what is written is what is read, and keys stay with their owner."""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest
from attest_platform import NOW, ReportingPlatform
from hypothesis import given
from hypothesis import strategies as st

from softtdx.attest import Pki, PkiError, PlatformTcb, QuotingEnclave, TcbStatus, TcbVariation, verify_with_dcap_qvl
from softtdx.attest.store import load_pki, save_pki
from softtdx.errors import SoftTdxError


def test_a_loaded_pki_is_the_one_saved(tmp_path: Path) -> None:
    made = Pki.create(
        seed=3,
        tcb=PlatformTcb(pce_svn=7, fmspc=bytes(range(6))),
        ca="processor",
        revoked=frozenset(["tcb", "pck"]),
        expired=frozenset(["root-crl"]),
        platform_flags=frozenset(["smt_enabled"]),
        vary=TcbVariation(status=TcbStatus.OUT_OF_DATE, advisory_ids=("A", "B"), no_match=True),
    )
    found = load_pki(save_pki(made, tmp_path / "pki"))
    assert found.options == made.options
    assert found.ids == made.ids
    assert found.collateral() == made.collateral()
    assert found.pck_chain == made.pck_chain


def test_a_loaded_pki_quotes_under_the_same_root(tmp_path: Path, pki: Pki, platform: ReportingPlatform) -> None:
    found = load_pki(save_pki(pki, tmp_path / "pki"))
    quote = QuotingEnclave(found, platform.verify).quote(platform.report())
    assert verify_with_dcap_qvl(quote, pki, NOW).status == "UpToDate"


def test_key_files_are_the_owners_alone_whatever_the_umask(tmp_path: Path, pki: Pki) -> None:
    before = os.umask(0)
    try:
        base = save_pki(pki, tmp_path / "pki")
    finally:
        os.umask(before)
    assert stat.S_IMODE((base / "keys").stat().st_mode) == 0o700
    keys = list((base / "keys").iterdir())
    assert len(keys) == 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}


def test_only_the_key_files_hold_private_keys(tmp_path: Path, pki: Pki) -> None:
    base = save_pki(pki, tmp_path / "pki")
    secrets = [key.private_numbers().private_value for key in pki.keys.values()]
    forms = [form for s in secrets for form in (s.to_bytes(32, "big"), s.to_bytes(32, "big").hex().encode())]
    for path in base.iterdir():
        if path.is_file():
            data = path.read_bytes()
            assert b"PRIVATE KEY" not in data
            assert not any(form in data for form in forms)


def test_a_pki_is_not_replaced_by_accident(tmp_path: Path, pki: Pki) -> None:
    base = save_pki(pki, tmp_path / "pki")
    with pytest.raises(PkiError, match="already holds a PKI"):
        save_pki(Pki.create(seed=8), base)
    save_pki(Pki.create(seed=8), base, replace=True)
    assert load_pki(base).root_der == Pki.create(seed=8).root_der


def test_a_folder_without_a_pki_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(PkiError, match="softtdx pki init"):
        load_pki(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record.clear(),
        lambda record: record.update(format=99),
        lambda record: record["options"].update(ca="other"),
        lambda record: record["options"]["tcb"].update(fmspc="zz"),
        lambda record: record["options"]["tcb"].update(fmspc=5),
        lambda record: record["options"]["vary"].update(status="Fine"),
        lambda record: record["options"].update(issued="yesterday"),
        lambda record: record["ids"].update(serials=[]),
        lambda record: record["options"].update(tcb=None),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, pki: Pki, damage: object) -> None:
    base = save_pki(pki, tmp_path / "pki")
    record = json.loads((base / "pki.json").read_text())
    assert callable(damage)
    damage(record)
    (base / "pki.json").write_text(json.dumps(record))
    with pytest.raises(PkiError):
        load_pki(base)


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null"])
def test_a_record_that_is_no_json_object_is_refused(tmp_path: Path, pki: Pki, text: bytes) -> None:
    base = save_pki(pki, tmp_path / "pki")
    (base / "pki.json").write_bytes(text)
    with pytest.raises(PkiError):
        load_pki(base)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pki(Pki.create(seed=6), tmp_path_factory.mktemp("fuzzed") / "pki")


@given(draw=st.data())
def test_any_damage_to_a_record_gives_a_pki_or_our_error(saved: Path, draw: st.DataObject) -> None:
    file = saved / "pki.json"
    whole = file.read_bytes()
    damaged = bytearray(whole)
    for _ in range(draw.draw(st.integers(1, 3))):
        at = draw.draw(st.integers(0, len(damaged)))
        damaged[at : at + draw.draw(st.integers(0, 40))] = draw.draw(
            st.sampled_from([b"", b"null", b'"', b"-1", b"1e999", b"{}", b"[", b"\xff", b"9" * 5000])
        )
    try:
        file.write_bytes(damaged)
        with suppress(SoftTdxError):
            load_pki(saved)
    finally:
        file.write_bytes(whole)


def test_a_key_file_that_is_no_key_is_named_and_not_shown(tmp_path: Path, pki: Pki) -> None:
    base = save_pki(pki, tmp_path / "pki")
    (base / "keys" / "pck.pem").write_text("secret nonsense")
    with pytest.raises(PkiError, match=r"pck\.pem is not a private key") as caught:
        load_pki(base)
    assert "secret nonsense" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path, pki: Pki) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PkiError, match="cannot be written"):
        save_pki(pki, tmp_path / "file" / "pki")
