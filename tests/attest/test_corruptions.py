"""2,000 damaged quotes and collaterals: what ours and three independent verifiers make of each.

Ours accepts none. Where another does, it is because it does not look at that part, and which parts those are is
written here: anything else is a finding.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import pytest
from attest_platform import NOW, ReportingPlatform
from other_verifiers import DcapQvl, LineVerifier, Opinion

from softtdx.attest import Collateral, Pki, Quote, QuotingEnclave, TcbVariation, Verifier

COUNT = 2000
PEM_END = "-----END CERTIFICATE-----\n"

# The copy of the root that a chain carries is not needed when one has the root: dcap-qvl looks only at the rest.
# The JavaScript one skips certificates whose PEM it cannot read and checks no CRL's signature or date.
ROOT_COPY, CRL, LINE_END = "copy of the root", "CRL", "line end in a chain"
DOES_NOT_LOOK_AT = {
    "dcap-qvl": {ROOT_COPY, LINE_END},
    "@phala/dcap-qvl": {ROOT_COPY, LINE_END, CRL},
    "go-tdx-guest": set(),
}
# The chain of the PCK CRL's issuer says nothing that the PCK chain does not: all take the quote's chain for it.
UNPROTECTED = {"pck_crl_issuer_chain"}


@dataclass(frozen=True)
class Case:
    """A damaged pair, and in which part the damage is."""

    what: str
    part: str
    quote: bytes
    collateral: Collateral


def flip(data: bytes, rng: random.Random, low: int = 0, high: int | None = None) -> tuple[bytes, int]:
    """One bit changed, and the place."""
    at = rng.randrange(low, len(data) if high is None else high)
    changed = bytearray(data)
    changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed), at


def chain_part(chain: str, at: int, name: str) -> str:
    """What of a chain in PEM stands at `at`; `name` if it is nothing out of the ordinary."""
    last = chain.rindex(PEM_END, 0, len(chain) - len(PEM_END)) + len(PEM_END)
    if chain[at].isspace():
        return LINE_END
    return ROOT_COPY if at >= last else name


def quote_bit(rng: random.Random, quote: bytes, collateral: Collateral) -> Case:
    damaged, at = flip(quote, rng)
    chain = Quote.parse(quote).signature.chain
    start = quote.index(chain)
    part = chain_part(chain.decode(), at - start, "quote") if at >= start else "quote"
    return Case(f"quote byte {at}", part, damaged, collateral)


def collateral_bit(rng: random.Random, quote: bytes, collateral: Collateral) -> Case:
    name = rng.choice([item.name for item in fields(Collateral) if getattr(collateral, item.name) is not None])
    value = getattr(collateral, name)
    if isinstance(value, bytes):
        damaged, at = flip(value, rng)
        part = CRL if name.endswith("crl") else name
        return Case(f"{name} byte {at}", part, quote, replace(collateral, **{name: damaged}))
    at = rng.randrange(len(value))
    other = rng.choice([c for c in map(chr, range(1, 127)) if c != value[at] and not (c + value[at]).isspace()])
    protected_chain = "chain" in name and name not in UNPROTECTED
    part = chain_part(value, at, name) if protected_chain else name
    text = value[:at] + other + value[at + 1 :]
    return Case(f"{name}[{at}] {value[at]!r} -> {other!r}", part, quote, replace(collateral, **{name: text}))


def quote_field(rng: random.Random, quote: bytes, collateral: Collateral) -> Case:
    """A whole field zeroed, filled, or taken from elsewhere."""
    parsed = Quote.parse(quote)
    group = rng.choice(["header", "body", "qe_report", "signature"])
    owner = parsed.signature if group in ("qe_report", "signature") else getattr(parsed, group)
    layout = owner.qe_report if group == "qe_report" else owner
    skip = {"chain", "certification_type", "chain_type", "slack", "outer_slack", "qe_report"}
    name = rng.choice([item.name for item in fields(layout) if item.name not in skip])
    old = getattr(layout, name)
    new = (
        old + 1 if isinstance(old, int) else rng.choice([bytes(len(old)), b"\xff" * len(old), rng.randbytes(len(old))])
    )
    if new == old:
        new = b"\x01" * len(old)
    changed = replace(layout, **{name: new})
    if group == "qe_report":
        changed = replace(owner, qe_report=changed)
    damaged = replace(parsed, **{"signature" if group == "qe_report" else group: changed})
    return Case(f"{group}.{name}", group, damaged.to_bytes(), collateral)


def cut(rng: random.Random, quote: bytes, collateral: Collateral) -> Case:
    size = rng.randrange(len(quote) - len(PEM_END))
    return Case(f"quote cut to {size}", "quote", quote[:size], collateral)


def swap(rng: random.Random, quote: bytes, collateral: Collateral) -> Case:
    """A part of another PKI's collateral in place of ours: well-formed, and not what belongs there."""
    number = rng.randrange(3) + 1000
    stranger = Pki.create(seed=number, vary=TcbVariation(evaluation_data_number=number)).collateral()
    name = rng.choice([item.name for item in fields(Collateral) if item.name not in UNPROTECTED])
    if getattr(collateral, name) is None:
        name = "tcb_info"
    part = CRL if name.endswith("crl") else name
    return Case(f"{name} of another PKI", part, quote, replace(collateral, **{name: getattr(stranger, name)}))


MAKERS = [(quote_bit, 8), (collateral_bit, 6), (quote_field, 4), (cut, 1), (swap, 1)]


@pytest.fixture(scope="module")
def cases(pki: Pki, platform: ReportingPlatform, enclave: QuotingEnclave) -> list[Case]:
    """Half of the quotes are of version 4, the others of the three bodies that version 5 has."""
    rng = random.Random(20260101)
    makers, weights = zip(*MAKERS, strict=True)
    collateral, report = pki.collateral(), platform.report(bytes(range(64)))
    quotes = [enclave.quote(report)] * 3 + [enclave.quote(report, version=5, body_type=kind) for kind in (2, 3, 4)]
    return [rng.choices(makers, weights)[0](rng, rng.choice(quotes), collateral) for _ in range(COUNT)]


def test_ours_accepts_no_corruption(pki: Pki, cases: list[Case]) -> None:
    verifier = Verifier(pki.root_der)
    for case in cases:
        verdict = verifier.verify(case.quote, case.collateral, now=NOW)
        assert verdict.accepted == (case.part in UNPROTECTED), (case.what, verdict.reason)
    assert sum(case.part not in UNPROTECTED for case in cases) > COUNT * 9 // 10


def opinions(verifier: DcapQvl | LineVerifier, cases: Sequence[Case], root: bytes) -> list[Opinion]:
    return [verifier.judge(case.quote, case.collateral, root, NOW) for case in cases]


def test_the_other_verifiers_accept_no_corruption_of_what_they_look_at(
    pki: Pki, cases: list[Case], javascript_verifier: LineVerifier, go_verifier: LineVerifier
) -> None:
    # The JavaScript one takes ten times as long as the others: outside CI it judges every fifth.
    work = {javascript_verifier: cases if os.environ.get("CI") else cases[::5], go_verifier: cases}
    with ThreadPoolExecutor(len(work)) as pool:
        found = list(pool.map(lambda verifier: opinions(verifier, work[verifier], pki.root_der), work))
    for (verifier, judged), said in zip(work.items(), found, strict=True):
        for case, opinion in zip(judged, said, strict=True):
            looked_at = case.part not in DOES_NOT_LOOK_AT[verifier.name] | UNPROTECTED
            assert not (opinion.accepted and looked_at), f"{verifier.name} accepts {case.what} ({case.part})"


def test_dcap_qvl_accepts_no_corruption_of_what_it_looks_at(pki: Pki, cases: list[Case]) -> None:
    for case, opinion in zip(cases, opinions(DcapQvl(), cases, pki.root_der), strict=True):
        looked_at = case.part not in DOES_NOT_LOOK_AT["dcap-qvl"] | UNPROTECTED
        assert not (opinion.accepted and looked_at), f"{case.what} ({case.part})"


def test_trailing_bytes_are_covered_by_nothing_and_harm_nothing(
    pki: Pki, platform: ReportingPlatform, enclave: QuotingEnclave
) -> None:
    quote = enclave.quote(platform.report()) + bytes(3000)
    assert Verifier(pki.root_der).verify(quote, pki.collateral(), now=NOW).accepted
    assert DcapQvl().judge(quote, pki.collateral(), pki.root_der, NOW).accepted
