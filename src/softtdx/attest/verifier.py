"""The project's own quote verifier: each step says what it checked, so that a verdict can be followed.

It accepts what dcap-qvl accepts, and is as strict as go-tdx-guest about the form of a quote: a certificate chain
complete and in order, certification data of the documented type, a root that has not expired.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from softtdx.abi.structs import Attributes
from softtdx.attest.appraisal import AppraisalError, EnclaveIdentity, Level, TcbInfo, relaunch_advised
from softtdx.attest.chain import Cert, ChainError, Crl, TrustedRoot, pck_extension
from softtdx.attest.collateral import Collateral
from softtdx.attest.errors import MalformedError
from softtdx.attest.keys import public_from_point, verify_raw
from softtdx.attest.policy import Policy
from softtdx.attest.quote import (
    ATTESTATION_KEY_ECDSA_P256,
    CERTIFICATION_PCK_CHAIN,
    INTEL_QE_VENDOR_ID,
    Quote,
    TdBody15,
)
from softtdx.attest.sgx_extension import PckExtension
from softtdx.attest.tcb import TcbStatus, converge
from softtdx.attest.tdreport import attribute_names
from softtdx.errors import SoftTdxError

__all__ = ["Step", "Verdict", "VerificationError", "Verifier"]

ANY_STATUS = Policy.any_status()
AUTH_DATA_SIZE = 32
SIGNATURE_SIZE = 64
# As plain integers, since operators of flags take microseconds.
DEBUG, MIGRATABLE, SERVTD_EXT, SEPT_VE_DISABLE = map(
    int, (Attributes.DEBUG, Attributes.MIGRATABLE, Attributes.SERVTD_EXT, Attributes.SEPT_VE_DISABLE)
)
PROFILING = int(Attributes.HGS_PLUS_PROF | Attributes.PERF_PROF | Attributes.PMT_PROF)
KNOWN_ATTRIBUTES = sum(map(int, Attributes)) | 0x7F << 16
"""Bits 22:16 are security features that the TDX ABI specification lets a verifier pass over."""


class VerificationError(SoftTdxError):
    """A quote is not accepted."""


class Step(NamedTuple):
    """One thing checked: its name, whether it held, and what was found."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Verdict:
    """What verification found. `status` is None when the quote is not genuine, or its platform is revoked."""

    accepted: bool
    status: TcbStatus | None
    advisory_ids: tuple[str, ...]
    steps: tuple[Step, ...]
    quote: Quote | None = None
    platform_level: Level | None = None
    qe_level: Level | None = None

    @property
    def reason(self) -> str:
        """Why the quote is not accepted; empty if it is."""
        return "; ".join(step.detail for step in self.steps if not step.ok)

    def require(self) -> Verdict:
        """The verdict, or `VerificationError` when it is no."""
        if not self.accepted:
            raise VerificationError(f"the quote is not accepted: {self.reason}")
        return self

    def describe(self) -> dict[str, object]:
        """For JSON."""
        return {
            "accepted": self.accepted,
            "status": self.status,
            "advisory_ids": list(self.advisory_ids),
            "reason": self.reason,
            "steps": [step._asdict() for step in self.steps],
            "quote": self.quote.describe() if self.quote else None,
        }


@dataclass
class _Run:
    """A verification under way: the steps so far and what they brought to light."""

    now: int
    policy: Policy
    steps: list[Step] = field(default_factory=list)
    quote: Quote | None = None
    status: TcbStatus | None = None
    advisory_ids: tuple[str, ...] = ()
    platform_level: Level | None = None
    qe_level: Level | None = None
    evaluation_data_number: int = 0

    def did(self, name: str, detail: str) -> None:
        self.steps.append(Step(name, True, detail))


@dataclass(frozen=True)
class _Authentic:
    """Collateral whose signatures hold: good for any quote until something in it runs out."""

    collateral: Collateral
    tcb_info: TcbInfo
    tcb_signer: Cert
    qe_identity: EnclaveIdentity
    qe_signer: Cert
    crls: tuple[Crl, Crl]


class Verifier:
    """Verifies quotes under one trusted root certificate (DER or PEM).

    The collateral of the last verification is remembered, so that many quotes judged by the same collateral cost its
    signatures once. Dates and revocation are judged every time.
    """

    def __init__(self, root: bytes) -> None:
        self.root = TrustedRoot.from_bytes(root)
        self._authentic: _Authentic | None = None

    def verify(
        self,
        quote: bytes,
        collateral: Collateral,
        *,
        now: int | None = None,
        policy: Policy | None = None,
    ) -> Verdict:
        """Judge a quote. Never raises for what the quote or the collateral hold: the verdict says what is wrong.

        `now` is in Unix seconds, the clock's if None. Without a policy any TCB status but Revoked is accepted, as the
        other verifiers do; the caller looks at `status`.
        """
        run = _Run(int(time.time()) if now is None else now, policy or ANY_STATUS)
        name = "collateral"
        try:
            known = self._authenticate(collateral)
            self._check_in_force(known, run)
            name = "quote"
            parsed = run.quote = _parse(quote, run)
            name = "PCK chain"
            leaf, pck = self._pck_chain(parsed, known, run)
            name = "signatures"
            check_signatures(parsed, leaf, run.did)
            name = "TCB"
            self._appraise(parsed, pck, known, run)
            name = "TD attributes"
            _check_attributes(parsed, run)
        except SoftTdxError as error:
            run.steps.append(Step(name, False, str(error)))
            return Verdict(False, None, run.advisory_ids, tuple(run.steps), run.quote)
        return _conclude(run)

    def verify_signatures(self, quote: bytes) -> Verdict:
        """Without collateral: whether the quote's own chain leads to the root and its signatures hold.

        Says nothing of dates, revocation or TCB; the verdict's status is None.
        """
        run = _Run(0, ANY_STATUS)
        try:
            parsed = run.quote = _parse(quote, run)
            path = self.root.path(_chain_of(parsed))
            pck_extension(path[0])
            run.did("PCK chain", self._names(path))
            check_signatures(parsed, path[0], run.did)
        except SoftTdxError as error:
            run.steps.append(Step("signatures", False, str(error)))
            return Verdict(False, None, (), tuple(run.steps), run.quote)
        return Verdict(True, None, (), tuple(run.steps), run.quote)

    def _authenticate(self, collateral: Collateral) -> _Authentic:
        """Everything about the collateral that no clock changes: its parts are well-formed and signed."""
        known = self._authentic
        if known is not None and known.collateral == collateral:
            return known
        crls = Crl(collateral.root_ca_crl, "root CA CRL"), Crl(collateral.pck_crl, "PCK CRL")
        crls[0].check_signature(self.root.cert)
        signer = self._signer(collateral.tcb_info_issuer_chain)
        info = TcbInfo.parse(collateral.tcb_info)
        _check_document("TCB info", collateral.tcb_info, collateral.tcb_info_signature, signer)
        qe_signer = signer
        if collateral.qe_identity_issuer_chain != collateral.tcb_info_issuer_chain:
            qe_signer = self._signer(collateral.qe_identity_issuer_chain)
        identity = EnclaveIdentity.parse(collateral.qe_identity)
        _check_document("QE identity", collateral.qe_identity, collateral.qe_identity_signature, qe_signer)
        identity.check_kind()
        self._authentic = _Authentic(collateral, info, signer, identity, qe_signer, crls)
        return self._authentic

    def _signer(self, chain: str) -> Cert:
        path = self.root.path(chain.encode("utf-8", "replace"))
        if len(path) != 1:
            raise ChainError(f"{path[0].name} signs collateral, but the root CA did not issue it directly")
        return path[0]

    def _check_in_force(self, known: _Authentic, run: _Run) -> None:
        """Refuse collateral that is out of date at the run's clock, or signed by someone who is revoked."""
        root, info, identity = self.root.cert, known.tcb_info, known.qe_identity
        known.crls[0].check(root, run.now)
        run.did("root CA", f"{root.name} is trusted, its CRL is signed by it and in force")
        self.root.check_in_force([known.tcb_signer], known.crls, run.now)
        _check_dates("TCB info", info.issued, info.next_update, run.now)
        run.did("TCB info", f"signed by {known.tcb_signer.name}, FMSPC {info.fmspc.hex()}, in force")
        if known.qe_signer is not known.tcb_signer:
            self.root.check_in_force([known.qe_signer], known.crls, run.now)
        _check_dates("QE identity", identity.issued, identity.next_update, run.now)
        run.did("QE identity", f"signed by {known.qe_signer.name}, {identity.id}, in force")
        run.evaluation_data_number = min(info.evaluation_data_number, identity.evaluation_data_number)

    def _pck_chain(self, quote: Quote, known: _Authentic, run: _Run) -> tuple[Cert, PckExtension]:
        given = known.collateral.pck_certificate_chain
        path = self.root.path(_chain_of(quote) if given is None else given.encode("utf-8", "replace"))
        self.root.check_in_force(path, known.crls, run.now)
        pck = pck_extension(path[0])
        run.did("PCK chain", f"{self._names(path)}; FMSPC {pck.fmspc.hex()}, none revoked")
        return path[0], pck

    def _names(self, path: list[Cert]) -> str:
        return " <- ".join(cert.name for cert in [*path, self.root.cert])

    def _appraise(self, quote: Quote, pck: PckExtension, known: _Authentic, run: _Run) -> None:
        info, body = known.tcb_info, quote.body
        qe = run.qe_level = known.qe_identity.evaluate(quote.signature.qe_report)
        run.did("quoting enclave", f"is the one the QE identity describes; ISVSVN level {qe.isv_svn}: {qe.status}")
        if info.fmspc != pck.fmspc:
            raise AppraisalError(f"the TCB info is for FMSPC {info.fmspc.hex()}, the platform is {pck.fmspc.hex()}")
        info.check_kind()
        level = run.platform_level = info.evaluate(pck, body.tee_tcb_svn)
        module = info.check_module(body)
        run.did("TDX module", f"{module.id or 'tdxModule'}: signer and attributes are those expected")
        status = converge(level.status, qe.status)
        run.advisory_ids = level.advisory_ids + tuple(
            item for item in dict.fromkeys(qe.advisory_ids) if item not in level.advisory_ids
        )
        current = None
        if isinstance(body, TdBody15):
            current = converge(info.evaluate(pck, body.tee_tcb_svn2).status, qe.status)
        if TcbStatus.REVOKED in (status, current):
            raise AppraisalError("the platform's TCB is Revoked")
        run.status = status if current is None else relaunch_advised(status, current)
        run.did("TCB level", f"{run.status} (level of {level.date}, platform {level.status}, QE {qe.status})")


def _parse(data: bytes, run: _Run) -> Quote:
    quote = Quote.parse(data)
    header, signature = quote.header, quote.signature
    if header.qe_vendor_id != INTEL_QE_VENDOR_ID:
        raise MalformedError(f"the quoting enclave's vendor is {header.qe_vendor_id.hex()}, not Intel's id")
    if header.attestation_key_type != ATTESTATION_KEY_ECDSA_P256:
        raise MalformedError(f"attestation key type {header.attestation_key_type} is not ECDSA P-256 (2)")
    if signature.slack or signature.outer_slack:
        raise MalformedError("the signature data has bytes after the certificate chain that belong to nothing")
    run.did("quote", f"version {header.version}, body {quote.body_type.name}")
    return quote


def _chain_of(quote: Quote) -> bytes:
    if quote.signature.chain_type != CERTIFICATION_PCK_CHAIN:
        raise ChainError(
            f"the quote carries certification data of type {quote.signature.chain_type}, not a PCK chain (5); "
            "give the chain with the collateral"
        )
    return quote.signature.chain


def check_signatures(quote: Quote, pck: Cert, did: Callable[[str, str], None]) -> None:
    """Refuse a quote unless the PCK key signed its QE report, which binds the key that signed its body."""
    data = quote.signature
    report = data.qe_report
    if not verify_raw(pck.key, data.qe_report_signature, report.to_bytes()):
        raise MalformedError("the QE report's signature is not the PCK key's")
    did("QE report", "signed by the PCK key")
    if len(data.auth_data) != AUTH_DATA_SIZE:
        raise MalformedError(f"the quote has {len(data.auth_data)} bytes of auth data, not {AUTH_DATA_SIZE}")
    bound = hashlib.sha256(data.attestation_key + data.auth_data).digest()
    if report.report_data[: len(bound)] != bound:
        raise MalformedError("the QE report does not bind the attestation key")
    key = public_from_point(data.attestation_key)
    did("attestation key", "bound by the QE report's data")
    if not verify_raw(key, data.signature, quote.signed_bytes()):
        raise MalformedError("the quote's signature is not the attestation key's")
    did("quote signature", "made by the attestation key over header and body")


def _check_document(what: str, text: str, signature: bytes, signer: Cert) -> None:
    if len(signature) != SIGNATURE_SIZE:
        raise MalformedError(f"the {what}'s signature is {len(signature)} bytes, not {SIGNATURE_SIZE}")
    if not verify_raw(signer.key, signature, text.encode("utf-8", "surrogatepass")):
        raise MalformedError(f"the {what}'s signature is not {signer.name}'s")


def _check_dates(what: str, issued: float, next_update: float, now: int) -> None:
    if now < issued:
        raise MalformedError(f"the {what} is issued in the future")
    if now > int(next_update):
        raise MalformedError(f"the {what} ran out on {time.strftime('%Y-%m-%d', time.gmtime(next_update))}")


def _check_attributes(quote: Quote, run: _Run) -> None:
    body, policy = quote.body, run.policy
    attributes = body.td_attributes
    if isinstance(body, TdBody15) and any(body.mr_service_td) and not policy.allow_service_td:
        raise MalformedError("MRSERVICETD is not zero: the TD is bound to a service TD")
    if attributes & DEBUG and not policy.allow_debug:
        raise MalformedError("the TD is being debugged (ATTRIBUTES.DEBUG)")
    if attributes & PROFILING and not policy.allow_debug:
        raise MalformedError("the TD is being profiled (ATTRIBUTES bits 6:4)")
    if attributes & ~KNOWN_ATTRIBUTES:
        raise MalformedError(f"ATTRIBUTES {attributes:#x} has reserved bits set")
    if attributes & MIGRATABLE:
        raise MalformedError("the TD is migratable")
    if attributes & SERVTD_EXT and not (policy.allow_service_td and isinstance(body, TdBody15)):
        raise MalformedError("the TD has SERVTD_EXT")
    if not attributes & SEPT_VE_DISABLE:
        raise MalformedError("SEPT_VE_DISABLE is not set: the host can inject #VE")
    run.did("TD attributes", f"{attributes:#x} ({', '.join(attribute_names(attributes))}): none that is refused")


def _conclude(run: _Run) -> Verdict:
    assert run.quote is not None
    assert run.status is not None
    complaints = run.policy.complaints(run.quote.body, run.status, run.advisory_ids, run.evaluation_data_number)
    objections = tuple(Step("policy", False, text) for text in complaints)
    return Verdict(
        accepted=not complaints,
        status=run.status,
        advisory_ids=run.advisory_ids,
        steps=(*run.steps, *objections),
        quote=run.quote,
        platform_level=run.platform_level,
        qe_level=run.qe_level,
    )
