"""A certificate for the services' own HTTPS: self-signed, for loopback names, kept beside the PKI.

It has nothing to do with attestation: PCCS clients often insist on HTTPS, and are then told to accept any certificate.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from softtdx.attest.errors import PkiError
from softtdx.attest.store import key_pem, write_private
from softtdx.attest.x509 import ORGANIZATION, pem

__all__ = ["TlsFiles", "tls_files"]

LIFE = timedelta(days=825)
"""The longest that common clients accept."""
RENEW_BEFORE = timedelta(days=30)
NAMES = ("localhost",)
ADDRESSES = ("127.0.0.1", "::1")


@dataclass(frozen=True)
class TlsFiles:
    """Certificate and private key, each in PEM."""

    certificate: Path
    key: Path


def tls_files(directory: str | Path) -> TlsFiles:
    """The certificate kept in a PKI's directory, made (or made anew when it is about to run out) if need be."""
    base = Path(directory)
    files = TlsFiles(base / "tls.pem", base / "keys" / "tls.pem")
    try:
        if not _in_force(files):
            _make(files)
    except OSError as error:
        raise PkiError(f"no certificate for HTTPS can be kept in {base}: {error}") from None
    return files


def _in_force(files: TlsFiles) -> bool:
    if not (files.certificate.exists() and files.key.exists()):
        return False
    try:
        found = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    except ValueError:
        return False
    return found.not_valid_after_utc - datetime.now(UTC) > RENEW_BEFORE


def _make(files: TlsFiles) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, NAMES[0]),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION),
        ]
    )
    now = datetime.now(UTC).replace(microsecond=0)
    known = [*map(x509.DNSName, NAMES), *(x509.IPAddress(ipaddress.ip_address(item)) for item in ADDRESSES)]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + LIFE - timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(known), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    files.key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_private(files.key, key_pem(key))
    files.certificate.write_text(pem(certificate))
