"""Random TCB info, QE identities and platforms, properly signed: ours and dcap-qvl come to the same verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from attest_platform import NOW, ReportingPlatform
from hypothesis import event, given, settings
from hypothesis import strategies as st
from other_verifiers import DcapQvl

from softtdx.attest import Collateral, Pki, PlatformTcb, QuotingEnclave, TcbStatus, Verifier
from softtdx.attest.keys import sign_raw

DATES = ["2020-01-01T00:00:00Z", "2023-06-30T12:00:00Z", "2024-01-01T00:00:00Z"]
small = st.integers(0, 2)
statuses = st.sampled_from([*map(str, list(TcbStatus)[:6])] * 4 + ["Revoked", "TDRelaunchAdvised", "Bogus"])
advisories = st.lists(st.sampled_from(["INTEL-SA-1", "INTEL-SA-2", "INTEL-SA-3"]), max_size=2)


def svns(tail: int = 13) -> st.SearchStrategy[list[int]]:
    """16 security versions of which the first few matter."""
    return st.lists(small, min_size=3, max_size=3).map(lambda head: head + [0] * tail)


@st.composite
def level(draw: st.DrawFn, tcb: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "tcb": draw(tcb),
        "tcbDate": draw(st.sampled_from(DATES)),
        "tcbStatus": draw(statuses),
    }
    ids = draw(advisories)
    if ids or draw(st.booleans()):
        found["advisoryIDs"] = ids
    return found


tee_svns = st.tuples(small, st.sampled_from([0, 1, 1, 1, 2]), small).map(lambda head: [*head] + [0] * 13)


def components(values: list[int]) -> list[dict[str, int]]:
    return [{"svn": value} for value in values]


platform_tcbs = st.fixed_dictionaries(
    {"sgxtcbcomponents": svns().map(components), "pcesvn": small, "tdxtcbcomponents": svns().map(components)}
)
isv_tcbs = st.fixed_dictionaries({"isvsvn": small})
modules = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.sampled_from(["TDX_01", "TDX_02", "tdx_01", "TDX_00"]),
            "mrsigner": st.sampled_from(["00" * 48, "00" * 48, "11" * 48]),
            "attributes": st.sampled_from(["00" * 8, "00" * 8, "01" + "00" * 7]),
            "attributesMask": st.sampled_from(["FF" * 8, "00" * 8]),
            "tcbLevels": st.lists(level(isv_tcbs), max_size=3),
        }
    ),
    max_size=2,
)


floor = {"sgxtcbcomponents": components([0] * 16), "pcesvn": 0, "tdxtcbcomponents": components([0] * 16)}
good_module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
module_levels = st.lists(level(isv_tcbs), max_size=2).flatmap(
    lambda above: level(st.just({"isvsvn": 0})).map(lambda last: [*above, last])
)
good_modules = module_levels.map(lambda found: [{"id": "TDX_01", **good_module, "tcbLevels": found}])


def with_floor(
    tcb: st.SearchStrategy[dict[str, Any]], lowest: dict[str, Any]
) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Levels, most of the time with one that any platform meets."""
    above = st.lists(level(tcb), max_size=3)
    whole = above.flatmap(lambda some: level(st.just(lowest)).map(lambda last: [*some, last]))
    return st.one_of(whole, whole, whole, above)


@settings(max_examples=150, deadline=None)
@given(
    levels=with_floor(platform_tcbs, floor),
    identities=st.one_of(good_modules, good_modules, good_modules, modules),
    qe_levels=with_floor(isv_tcbs, {"isvsvn": 0}),
    cpu_svn=svns(),
    pce_svn=small,
    launch=tee_svns,
    current=tee_svns,
    isv_svn=small,
    version=st.sampled_from([4, 5]),
    without=st.sampled_from([""] * 12 + ["tdxModule", "tcbLevels", "fmspc"]),
)
def test_ours_and_dcap_qvl_agree(
    levels: list[dict[str, Any]],
    identities: list[dict[str, Any]],
    qe_levels: list[dict[str, Any]],
    cpu_svn: list[int],
    pce_svn: int,
    launch: list[int],
    current: list[int],
    isv_svn: int,
    version: int,
    without: str,
) -> None:
    tcb = PlatformTcb(cpu_svn=bytes(cpu_svn), pce_svn=pce_svn, tee_tcb_svn=bytes(launch))
    pki = Pki.create(seed=1, tcb=tcb)
    pki = pki.revised(qe=replace(pki.options.qe, isv_svn=isv_svn))
    platform = ReportingPlatform(tcb)
    report = platform.report(tcb={"tee_tcb_svn2": bytes(current)})
    quote = QuotingEnclave(pki, platform.verify).quote(report, version=version)
    collateral = resigned(
        pki, {"tcbLevels": levels, "tdxModuleIdentities": identities}, {"tcbLevels": qe_levels}, without
    )
    mine = Verifier(pki.root_der).verify(quote, collateral, now=NOW)
    theirs = DcapQvl().judge(quote, collateral, pki.root_der, NOW)
    event(str(mine.status))
    assert (mine.accepted, mine.status) == (theirs.accepted, theirs.status), (mine.reason, theirs.error)
    if mine.accepted:
        assert mine.advisory_ids == theirs.advisory_ids


def resigned(pki: Pki, info: dict[str, Any], identity: dict[str, Any], without: str) -> Collateral:
    """The PKI's collateral with parts of its documents replaced, signed again."""
    tcb_info = json.loads(pki.tcb_info[0]) | info
    tcb_info.pop(without, None)
    texts = json.dumps(tcb_info), json.dumps(json.loads(pki.qe_identity[0]) | identity)
    signatures = [sign_raw(pki.keys["tcb"], text.encode()) for text in texts]
    return replace(
        pki.collateral(),
        tcb_info=texts[0],
        tcb_info_signature=signatures[0],
        qe_identity=texts[1],
        qe_identity_signature=signatures[1],
    )
