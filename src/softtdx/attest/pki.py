"""The simulated platform's PKI: root, PCK CAs, PCK certificate, TCB signer, CRLs, TCB info, QE identity.

`Pki.create(seed)` makes all of it, the same to the byte for the same arguments. `revised` keeps the keys and makes
the documents anew with other arguments: another verdict, a revocation, an expiry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from softtdx.attest import x509 as profile
from softtdx.attest.collateral import Collateral
from softtdx.attest.errors import PkiError
from softtdx.attest.keys import KeySource, sign_raw
from softtdx.attest.sgx_extension import CONFIGURATION_FLAGS, PckExtension
from softtdx.attest.tcb import (
    PlatformTcb,
    QeIdentityValues,
    TcbStatus,
    TcbVariation,
    qe_identity_text,
    tcb_info_text,
)
from softtdx.attest.x509 import CertSpec, Issuer

__all__ = ["EXPIRABLE", "KEY_NAMES", "PLATFORM_FLAGS", "REVOCABLE", "Pki", "PkiOptions", "PlatformIds"]

KEY_NAMES = ("root", "platform", "processor", "tcb", "pck", "attestation")
REVOCABLE = ("pck", "platform", "processor", "tcb")
EXPIRABLE = ("root", "platform", "processor", "tcb", "pck", "root-crl", "pck-crl", "tcb-info", "qe-identity")
PLATFORM_FLAGS = CONFIGURATION_FLAGS
CA_NAMES = {"platform": profile.PLATFORM_CA_CN, "processor": profile.PROCESSOR_CA_CN}

EPOCH = datetime(2024, 1, 1, tzinfo=UTC)
LAST_DAY = datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)
DOCUMENT_LIFE = timedelta(days=20 * 365)
EXPIRED_LIFE = timedelta(days=1)

PLATFORM_STATUSES = tuple(TcbStatus)[:7]
MODULE_STATUSES = (TcbStatus.UP_TO_DATE, TcbStatus.OUT_OF_DATE, TcbStatus.REVOKED)
QE_STATUSES = (
    TcbStatus.UP_TO_DATE,
    TcbStatus.OUT_OF_DATE,
    TcbStatus.CONFIGURATION_NEEDED,
    TcbStatus.REVOKED,
    TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED,
)


def _default_qe() -> QeIdentityValues:
    return QeIdentityValues(
        mr_signer=hashlib.sha256(b"softtdx: signer of the simulated TD quoting enclave").digest(),
        mr_enclave=hashlib.sha256(b"softtdx: the simulated TD quoting enclave").digest(),
    )


@dataclass(frozen=True)
class PkiOptions:
    """What the documents of a PKI say.

    `tcb` must agree with what the platform's TDREPORTs carry. `ca` issues the PCK certificate: "platform" or
    "processor". `revoked` and `expired` name certificates and documents (see REVOCABLE, EXPIRABLE). `platform_flags`
    are those of PLATFORM_FLAGS that the PCK certificate sets; strict policies want none. `pcs_url` is where the
    certificates say that CRLs are to be had.
    """

    tcb: PlatformTcb = field(default_factory=PlatformTcb)
    vary: TcbVariation = field(default_factory=TcbVariation)
    qe: QeIdentityValues = field(default_factory=_default_qe)
    ca: str = "platform"
    revoked: frozenset[str] = frozenset()
    expired: frozenset[str] = frozenset()
    platform_flags: frozenset[str] = frozenset()
    issued: datetime = EPOCH
    pcs_url: str = "http://127.0.0.1:8081"

    def __post_init__(self) -> None:
        _one_of("ca", self.ca, tuple(CA_NAMES))
        for name in self.revoked:
            _one_of("revoked", name, REVOCABLE)
        for name in self.expired:
            _one_of("expired", name, EXPIRABLE)
        for name in self.platform_flags:
            _one_of("platform flag", name, PLATFORM_FLAGS)
        _one_of("TCB status", self.vary.status, PLATFORM_STATUSES)
        _one_of("TDX module status", self.vary.module_status, MODULE_STATUSES)
        _one_of("QE status", self.vary.qe_status, QE_STATUSES)
        for name, size in (("cpu_svn", 16), ("tee_tcb_svn", 16), ("mr_signer_seam", 48), ("fmspc", 6)):
            if len(getattr(self.tcb, name)) != size:
                raise PkiError(f"{name} {getattr(self.tcb, name).hex()!r} is not {size} bytes")
        if self.issued.tzinfo is None:
            raise PkiError(f"the issue date {self.issued} has no time zone; give one in UTC")

    def until(self, name: str, life: timedelta | None = None) -> datetime:
        """When the thing of that name stops being valid."""
        if name in self.expired:
            return self.issued + EXPIRED_LIFE
        return LAST_DAY if life is None else min(LAST_DAY, self.issued + life)


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise PkiError(f"{what} {value!r} is not one of {', '.join(map(str, allowed))}")


@dataclass(frozen=True)
class PlatformIds:
    """The platform's random identities: drawn from the seed once, then kept with the PKI."""

    ppid: bytes
    instance_id: bytes
    qe_id: bytes
    auth_data: bytes
    serials: Mapping[str, int]

    @classmethod
    def draw(cls, source: KeySource) -> PlatformIds:
        """New identities."""
        return cls(
            ppid=source.draw("ppid", 16),
            instance_id=source.draw("instance", 16),
            qe_id=source.draw("qe", 16),
            auth_data=source.draw("auth", 32),
            serials={name: source.serial(name) for name in KEY_NAMES},
        )


class Pki:
    """Keys, certificates and signed documents of one simulated platform."""

    def __init__(self, keys: Mapping[str, ec.EllipticCurvePrivateKey], ids: PlatformIds, options: PkiOptions) -> None:
        self.keys = dict(keys)
        self.ids = ids
        self.options = options

    @classmethod
    def create(cls, seed: int | None = None, options: PkiOptions | None = None, **changes: Any) -> Pki:
        """A new PKI. `changes` are fields of `PkiOptions` (tcb=, vary=, ca=, revoked=, expired=, issued=, pcs_url=)."""
        source = KeySource(seed)
        keys = {name: source.key(name) for name in KEY_NAMES}
        return cls(keys, PlatformIds.draw(source), _changed(options or PkiOptions(), changes))

    def revised(self, **changes: Any) -> Pki:
        """The same keys and identities, the documents as the changed options say."""
        return Pki(self.keys, self.ids, _changed(self.options, changes))

    def issuer(self, name: str) -> Issuer:
        """A CA of this PKI as the signer of something."""
        return Issuer(CA_NAMES.get(name, profile.ROOT_CN), self.keys[name])

    def _certificate(self, name: str, common_name: str, issuer: str, path_length: int | None) -> x509.Certificate:
        options = self.options
        pck_crl = f"{options.pcs_url}/sgx/certification/v4/pckcrl?ca={options.ca}&encoding=der"
        return profile.issue(
            CertSpec(
                common_name=common_name,
                key=self.keys[name].public_key(),
                serial=self.ids.serials[name],
                not_before=options.issued,
                not_after=options.until(name),
                crl_url=pck_crl if name == "pck" else f"{options.pcs_url}/IntelSGXRootCA.der",
                path_length=path_length,
                sgx_extension=self.pck_extension.to_der() if name == "pck" else None,
            ),
            self.issuer(issuer),
        )

    @cached_property
    def pck_extension(self) -> PckExtension:
        """What the PCK certificate says of the platform."""
        tcb = self.options.tcb
        extension = PckExtension(self.ids.ppid, tcb.cpu_svn, tcb.pce_svn, tcb.pce_id, tcb.fmspc)
        if self.options.ca == "processor":
            return replace(extension, sgx_type=0)
        return replace(
            extension,
            platform_instance_id=self.ids.instance_id,
            dynamic_platform="dynamic_platform" in self.options.platform_flags,
            cached_keys="cached_keys" in self.options.platform_flags,
            smt_enabled="smt_enabled" in self.options.platform_flags,
        )

    @cached_property
    def root(self) -> x509.Certificate:
        """The root CA's certificate, self-signed."""
        return self._certificate("root", profile.ROOT_CN, "root", 1)

    @cached_property
    def intermediates(self) -> dict[str, x509.Certificate]:
        """The two PCK CAs' certificates by name."""
        return {name: self._certificate(name, cn, "root", 0) for name, cn in CA_NAMES.items()}

    @cached_property
    def tcb_signing(self) -> x509.Certificate:
        """The certificate of the key that signs TCB info and QE identity."""
        return self._certificate("tcb", profile.TCB_SIGNING_CN, "root", None)

    @cached_property
    def pck(self) -> x509.Certificate:
        """The platform's PCK certificate."""
        return self._certificate("pck", profile.PCK_CN, self.options.ca, None)

    @cached_property
    def root_der(self) -> bytes:
        """The root certificate in DER: what a verifier is told to trust."""
        return profile.der(self.root)

    @property
    def root_fingerprint(self) -> str:
        """SHA-256 of the root certificate, to compare by eye."""
        return hashlib.sha256(self.root_der).hexdigest()

    @cached_property
    def root_pem(self) -> str:
        """The root certificate in PEM."""
        return profile.pem(self.root)

    @cached_property
    def pck_chain(self) -> str:
        """PCK leaf, PCK CA, root in PEM: what a quote carries."""
        return profile.pem(self.pck, self.intermediates[self.options.ca], self.root)

    @cached_property
    def root_crl(self) -> bytes:
        """The root CA's CRL in DER."""
        serials = [self.ids.serials[n] for n in ("platform", "processor", "tcb") if n in self.options.revoked]
        return self._crl("root", serials, "root-crl")

    @cached_property
    def pck_crls(self) -> dict[str, bytes]:
        """Each PCK CA's CRL in DER."""
        out = {}
        for name in CA_NAMES:
            revoked = "pck" in self.options.revoked and name == self.options.ca
            out[name] = self._crl(name, [self.ids.serials["pck"]] if revoked else [], "pck-crl")
        return out

    def _crl(self, issuer: str, serials: list[int], name: str) -> bytes:
        until = self.options.until(name, DOCUMENT_LIFE)
        return profile.der(profile.revocation_list(self.issuer(issuer), serials, self.options.issued, until))

    @cached_property
    def tcb_info(self) -> tuple[str, bytes]:
        """TCB info's text and its signature."""
        options = self.options
        text = tcb_info_text(options.tcb, options.vary, options.issued, options.until("tcb-info", DOCUMENT_LIFE))
        return text, sign_raw(self.keys["tcb"], text.encode())

    @cached_property
    def qe_identity(self) -> tuple[str, bytes]:
        """The QE identity's text and its signature."""
        options = self.options
        until = options.until("qe-identity", DOCUMENT_LIFE)
        text = qe_identity_text(options.qe, options.vary, options.issued, until)
        return text, sign_raw(self.keys["tcb"], text.encode())

    @cached_property
    def tcb_issuer_chain(self) -> str:
        """TCB signer, root in PEM."""
        return profile.pem(self.tcb_signing, self.root)

    def pck_crl_issuer_chain(self, ca: str | None = None) -> str:
        """PCK CA, root in PEM; that of the CA which issued the PCK certificate unless named."""
        return profile.pem(self.intermediates[ca or self.options.ca], self.root)

    def collateral(self) -> Collateral:
        """All a verifier needs beside a quote and the root."""
        return Collateral(
            pck_crl_issuer_chain=self.pck_crl_issuer_chain(),
            root_ca_crl=self.root_crl,
            pck_crl=self.pck_crls[self.options.ca],
            tcb_info_issuer_chain=self.tcb_issuer_chain,
            tcb_info=self.tcb_info[0],
            tcb_info_signature=self.tcb_info[1],
            qe_identity_issuer_chain=self.tcb_issuer_chain,
            qe_identity=self.qe_identity[0],
            qe_identity_signature=self.qe_identity[1],
        )

    def tcb_info_response(self) -> str:
        """The PCS's answer to `/tdx/certification/v4/tcb`."""
        return f'{{"tcbInfo":{self.tcb_info[0]},"signature":"{self.tcb_info[1].hex()}"}}'

    def qe_identity_response(self) -> str:
        """The PCS's answer to `/tdx/certification/v4/qe/identity`."""
        return f'{{"enclaveIdentity":{self.qe_identity[0]},"signature":"{self.qe_identity[1].hex()}"}}'


def _changed(options: PkiOptions, changes: dict[str, Any]) -> PkiOptions:
    try:
        return replace(options, **changes)
    except TypeError as error:
        raise PkiError(f"no such PKI option: {error}") from None
