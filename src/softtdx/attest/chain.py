"""Certificate chains and revocation lists, judged as the verifiers of quotes judge them.

A chain is linear: each certificate is issued by the next, the last by the trusted root or it is that root. Every
certificate below the root must be covered by a CRL of its issuer that is signed by the issuer and in force: unknown
revocation is refused, as Intel's and other quote verifiers do.
"""

from __future__ import annotations

import binascii
import functools
from collections.abc import Sequence
from typing import cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ObjectIdentifier, SignatureAlgorithmOID

from softtdx.attest import der
from softtdx.attest.errors import MalformedError
from softtdx.attest.sgx_extension import SGX_EXTENSION_OID, PckExtension

__all__ = ["Cert", "ChainError", "Crl", "TrustedRoot", "pck_extension", "split_pem"]

MAX_CHAIN = 5
MAX_REMEMBERED = 16
SGX_OID = ObjectIdentifier(SGX_EXTENSION_OID)
PEM_BEGIN, PEM_END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
WHITE_SPACE = b" \t\r\n"
BETWEEN = b" \t\r\n\0"
ECDSA_SHA256 = SignatureAlgorithmOID.ECDSA_WITH_SHA256
ECDSA_SHA256_DER = der.tlv(der.SEQUENCE, der.tlv(der.OID, bytes.fromhex("2a8648ce3d040302")))
NEGATIVE = 0x80
COMMON_NAME = bytes.fromhex("550403")
VERIFY = ec.ECDSA(hashes.SHA256())


NOT_PEM = "the certificate chain is not PEM certificates one after the other"


class ChainError(MalformedError):
    """A certificate or CRL cannot be trusted; the message says which and why."""


def split_pem(text: bytes) -> list[bytes]:
    """The DER of each certificate in PEM text. Only white space, or a final NUL, may stand between and after."""
    out: list[bytes] = []
    *blocks, rest = text.split(PEM_END)
    for block in blocks:
        before, begin, body = block.partition(PEM_BEGIN)
        if not begin or before.strip(BETWEEN):
            raise ChainError(NOT_PEM)
        try:
            out.append(binascii.a2b_base64(body.translate(None, WHITE_SPACE), strict_mode=True))
        except binascii.Error as error:
            raise ChainError(f"certificate {len(out) + 1} of the chain is not base64: {error}") from None
    if not out or rest.strip(BETWEEN):
        raise ChainError(NOT_PEM)
    return out


class Cert:
    """A certificate read once: the parts that chains are judged by."""

    def __init__(self, data: bytes) -> None:
        self.der = data
        # First, for cryptography only warns of a serial number that no certificate may have.
        self.issuer_name, self.subject_name = _names(data)
        try:
            self.x509 = x509.load_der_x509_certificate(data)
            key = self.x509.public_key()
            self.not_before = self.x509.not_valid_before_utc
            self.not_after = self.x509.not_valid_after_utc
            self._read_extensions()
        except ChainError:
            raise
        except Exception as error:  # what cryptography raises for a bad certificate is of a dozen kinds
            raise ChainError(f"a certificate cannot be read: {error}") from None
        if type(getattr(key, "curve", None)) is not ec.SECP256R1:
            raise ChainError(f"{self.name}'s key is not on P-256")
        if self.x509.signature_algorithm_oid != ECDSA_SHA256:
            raise ChainError(f"{self.name} is not signed with ECDSA and SHA-256")
        self.key = cast(ec.EllipticCurvePublicKey, key)

    def _read_extensions(self) -> None:
        """Keep the two that chains and quotes are judged by; refuse a critical one that is not understood."""
        self.constraints: x509.BasicConstraints | None = None
        self.sgx_extension: bytes | None = None
        for extension in self.x509.extensions:
            value = extension.value
            kind = type(value)  # isinstance of such an abstract class takes as long as the rest of this loop
            if kind is x509.BasicConstraints:
                self.constraints = value
            elif kind is x509.UnrecognizedExtension:
                if extension.critical:
                    raise ChainError(f"{self.name} has the critical extension {extension.oid.dotted_string}")
                if value.oid == SGX_OID:
                    self.sgx_extension = value.value

    @property
    def name(self) -> str:
        """The subject's common name, for messages."""
        return _common_name(self.subject_name)

    @property
    def issuer_common_name(self) -> str:
        """The issuer's common name."""
        return _common_name(self.issuer_name)

    def check_date(self, now: int) -> None:
        """Refuse one that is not in force at `now` (Unix seconds)."""
        if now < self.not_before.timestamp():
            raise ChainError(f"{self.name} is not valid before {self.not_before:%Y-%m-%d}")
        if now > self.not_after.timestamp():
            raise ChainError(f"{self.name} expired on {self.not_after:%Y-%m-%d}")

    def check_role(self, below: int) -> None:
        """Refuse a leaf that is a CA (`below` < 0), or an issuer that may not have `below` CAs under it."""
        constraints = self.constraints
        is_ca = constraints is not None and constraints.ca
        if below < 0:
            if is_ca:
                raise ChainError(f"{self.name} is a CA, and stands where a leaf should")
            return
        if constraints is None or not is_ca:
            raise ChainError(f"{self.name} is no CA, yet issues a certificate")
        if constraints.path_length is not None and constraints.path_length < below:
            raise ChainError(f"{self.name} may have {constraints.path_length} CAs below it, not {below}")

    def check_issued_by(self, issuer: Cert) -> None:
        """Refuse one whose issuer is another, or whose signature is not the issuer's."""
        if self.issuer_name != issuer.subject_name:
            raise ChainError(f"{self.name} is issued by {self.issuer_common_name}, not by {issuer.name}")
        if not issuer.signed(self.x509.signature, self.x509.tbs_certificate_bytes):
            raise ChainError(f"{self.name}: the signature is not {issuer.name}'s")

    def signed(self, signature: bytes, data: bytes) -> bool:
        """Whether this certificate's key made the (DER) signature over the data."""
        try:
            self.key.verify(signature, data, VERIFY)
        except InvalidSignature:
            return False
        return True


class Crl:
    """A certificate revocation list; `check` after its signature is known to be its issuer's."""

    def __init__(self, data: bytes, what: str) -> None:
        self.what = what
        try:
            self.x509 = x509.load_der_x509_crl(data)
            self.next_update = self.x509.next_update_utc
            critical = [e.oid.dotted_string for e in self.x509.extensions if e.critical]
            self.issuer_name = _crl_issuer(self.x509.tbs_certlist_bytes)
        except MalformedError:
            raise
        except Exception as error:  # likewise
            raise ChainError(f"the {what} cannot be read: {error}") from None
        if self.next_update is None:
            raise ChainError(f"the {what} does not say when it is next updated")
        if critical:
            raise ChainError(f"the {what} has the critical extension {critical[0]}")
        if self.x509.signature_algorithm_oid != ECDSA_SHA256:
            raise ChainError(f"the {what} is not signed with ECDSA and SHA-256")
        self._signer = b""

    def check_signature(self, issuer: Cert) -> None:
        """Refuse a CRL that its issuer did not sign."""
        if issuer.der == self._signer:
            return
        if not issuer.signed(self.x509.signature, self.x509.tbs_certlist_bytes):
            raise ChainError(f"the {self.what}'s signature is not {issuer.name}'s")
        self._signer = issuer.der

    def check(self, cert: Cert, now: int) -> None:
        """Refuse a certificate that is revoked, or any when the CRL has run out."""
        if self.next_update is not None and now > self.next_update.timestamp():
            raise ChainError(f"the {self.what} ran out on {self.next_update:%Y-%m-%d}")
        try:
            entry = self.x509.get_revoked_certificate_by_serial_number(cert.x509.serial_number)
        except Exception as error:  # entries are only now looked at
            raise ChainError(f"the {self.what} cannot be read: {error}") from None
        if entry is not None:
            raise ChainError(f"{cert.name} is revoked (since {entry.revocation_date_utc:%Y-%m-%d})")


def _names(data: bytes) -> tuple[bytes, bytes]:
    """A certificate's issuer and subject in DER; refuses one not of ECDSA/SHA-256, or with a bad serial number.

    Certificate ::= { TBSCertificate, ... } and TBSCertificate ::= { [0] version, serialNumber, signature, issuer,
    validity, subject, ... } (RFC 5280, 4.1).
    """
    try:
        _, outer, _ = der.element(data)
        _, at, _ = der.element(data, outer)
        ends = [at]
        for _ in range(6):
            ends.append(der.element(data, ends[-1])[2])
        _, serial_at, serial_end = der.element(data, ends[1])
    except MalformedError as error:
        raise ChainError(f"a certificate cannot be read: {error}") from None
    if not any(data[serial_at:serial_end]) or data[serial_at] >= NEGATIVE:
        raise ChainError("a certificate has a serial number that is not positive")
    if data[ends[2] : ends[3]] != ECDSA_SHA256_DER:
        raise ChainError("a certificate is not signed with ECDSA and SHA-256")
    return data[ends[3] : ends[4]], data[ends[5] : ends[6]]


def _crl_issuer(tbs: bytes) -> bytes:
    """Issuer of a TBSCertList in DER: { version, signature, issuer, ... } (RFC 5280, 5.1)."""
    _, at, _ = der.element(tbs)
    version = der.element(tbs, at)[2]
    signature = der.element(tbs, version)[2]
    if tbs[version:signature] != ECDSA_SHA256_DER:
        raise ChainError("a CRL is not of version 2, or not signed with ECDSA and SHA-256")
    return tbs[signature : der.element(tbs, signature)[2]]


class TrustedRoot:
    """The root certificate a user trusts, and what is remembered under it.

    Whether a signature holds does not change, so a CA certificate is read, and its signature checked, once.
    Dates and revocation are looked at anew each time.
    """

    def __init__(self, cert: Cert) -> None:
        self.cert = cert
        self._authorities: dict[bytes, Cert] = {cert.der: cert}

    @classmethod
    def from_bytes(cls, data: bytes) -> TrustedRoot:
        """From DER, or one PEM certificate."""
        return cls(Cert(split_pem(data)[0] if data.lstrip().startswith(b"-----BEGIN") else data))

    def path(self, pem: bytes) -> list[Cert]:
        """The chain in PEM without the root, leaf first; refused unless each is signed by the next, the last by the
        root.
        """
        found = split_pem(pem)
        if len(found) > MAX_CHAIN:
            raise ChainError(f"the chain has {len(found)} certificates; at most {MAX_CHAIN} are looked at")
        certs = [Cert(found[0]), *(self._authorities.get(data) or Cert(data) for data in found[1:])]
        path = certs[:-1] if len(certs) > 1 and certs[-1] is self.cert else certs
        if path[-1].subject_name == path[-1].issuer_name:
            raise ChainError(f"the chain ends in another root than the one that is trusted ({path[-1].name})")
        for index, cert in enumerate(path):
            issuer = path[index + 1] if index + 1 < len(path) else self.cert
            cert.check_role(index - 1)
            issuer.check_role(index)
            if issuer is not self.cert or cert.der not in self._authorities:
                cert.check_issued_by(issuer)
        self._remember(path[1:])
        return path

    def _remember(self, authorities: list[Cert]) -> None:
        if len(self._authorities) < MAX_REMEMBERED and len(authorities) == 1:
            self._authorities[authorities[0].der] = authorities[0]

    def check_in_force(self, path: list[Cert], crls: Sequence[Crl], now: int) -> None:
        """Refuse a path when one of its certificates, or the root, is out of date or revoked, or may be."""
        self.cert.check_date(now)
        for index, cert in enumerate(path):
            cert.check_date(now)
            _check_revocation(cert, path[index + 1] if index + 1 < len(path) else self.cert, crls, now)


def _check_revocation(cert: Cert, issuer: Cert, crls: Sequence[Crl], now: int) -> None:
    for crl in crls:
        if crl.issuer_name == cert.issuer_name:
            crl.check_signature(issuer)
            crl.check(cert, now)
            return
    raise ChainError(f"no CRL of {issuer.name} is given, so {cert.name} may be revoked")


def pck_extension(cert: Cert) -> PckExtension:
    """What the PCK certificate says of its platform."""
    if cert.sgx_extension is None:
        raise ChainError(f"{cert.name} has no SGX extension: it is no PCK certificate")
    return PckExtension.from_der(cert.sgx_extension)


@functools.lru_cache(maxsize=64)
def _common_name(name: bytes) -> str:
    """The common name in a Name's DER, or all of the Name's attributes where it has none."""
    try:
        pairs = [
            der.elements(entry) for _, rdn in der.elements(der.elements(name)[0][1]) for _, entry in der.elements(rdn)
        ]
        found = [pair[1][1].decode("utf-8", "replace") for pair in pairs if pair[0][1] == COMMON_NAME]
    except (MalformedError, IndexError):
        found = []
    return found[0] if found else f"a certificate named {name.hex()}"
