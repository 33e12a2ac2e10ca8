"""Certificates and revocation lists of the shape Intel's SGX PKI has, under keys of our own.

Names and extensions follow Intel "SGX PCK Certificate and CRL Profile Specification". Common names are Intel's because
verifiers look for them; the organisation says that nothing here is Intel's.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID, ObjectIdentifier

from softtdx.attest.sgx_extension import SGX_EXTENSION_OID

__all__ = [
    "PCK_CN",
    "PLATFORM_CA_CN",
    "PROCESSOR_CA_CN",
    "ROOT_CN",
    "TCB_SIGNING_CN",
    "CertSpec",
    "Issuer",
    "der",
    "issue",
    "pem",
    "revocation_list",
]

ROOT_CN = "Intel SGX Root CA"
PLATFORM_CA_CN = "Intel SGX PCK Platform CA"
PROCESSOR_CA_CN = "Intel SGX PCK Processor CA"
PCK_CN = "Intel SGX PCK Certificate"
TCB_SIGNING_CN = "Intel SGX TCB Signing"
ORGANIZATION = "SoftTDX (simulated, not Intel)"


def name(common_name: str) -> x509.Name:
    """The distinguished name, attributes in the order of the profile."""
    parts = (
        (NameOID.COMMON_NAME, common_name),
        (NameOID.ORGANIZATION_NAME, ORGANIZATION),
        (NameOID.LOCALITY_NAME, "Santa Clara"),
        (NameOID.STATE_OR_PROVINCE_NAME, "CA"),
        (NameOID.COUNTRY_NAME, "US"),
    )
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])


@dataclass(frozen=True)
class Issuer:
    """Who signs: a certificate's name and key. For a root it is the certificate's own."""

    common_name: str
    key: ec.EllipticCurvePrivateKey

    def key_identifier(self) -> x509.AuthorityKeyIdentifier:
        """The authority key identifier that certificates and CRLs of this issuer carry."""
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())


@dataclass(frozen=True)
class CertSpec:
    """What goes into a certificate. `path_length` is None for one that is no CA."""

    common_name: str
    key: ec.EllipticCurvePublicKey
    serial: int
    not_before: datetime
    not_after: datetime
    crl_url: str
    path_length: int | None = None
    sgx_extension: bytes | None = None


def _key_usage(ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=not ca,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def issue(spec: CertSpec, issuer: Issuer) -> x509.Certificate:
    """Sign the certificate, deterministically."""
    ca = spec.path_length is not None
    point = x509.DistributionPoint([x509.UniformResourceIdentifier(spec.crl_url)], None, None, None)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(spec.common_name))
        .issuer_name(name(issuer.common_name))
        .public_key(spec.key)
        .serial_number(spec.serial)
        .not_valid_before(spec.not_before)
        .not_valid_after(spec.not_after)
        .add_extension(issuer.key_identifier(), critical=False)
        .add_extension(x509.CRLDistributionPoints([point]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(spec.key), critical=False)
        .add_extension(_key_usage(ca), critical=True)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=spec.path_length), critical=True)
    )
    if spec.sgx_extension is not None:
        sgx = x509.UnrecognizedExtension(ObjectIdentifier(SGX_EXTENSION_OID), spec.sgx_extension)
        builder = builder.add_extension(sgx, critical=False)
    return builder.sign(issuer.key, hashes.SHA256(), ecdsa_deterministic=True)


def revocation_list(
    issuer: Issuer, revoked: list[int], issued: datetime, next_update: datetime, number: int = 1
) -> x509.CertificateRevocationList:
    """The issuer's CRL, revoking the serial numbers given for key compromise."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(name(issuer.common_name))
        .last_update(issued)
        .next_update(next_update)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(issuer.key_identifier(), critical=False)
    )
    for serial in revoked:
        entry = (
            x509.RevokedCertificateBuilder()
            .serial_number(serial)
            .revocation_date(issued)
            .add_extension(x509.CRLReason(x509.ReasonFlags.key_compromise), critical=False)
            .build()
        )
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(issuer.key, hashes.SHA256(), ecdsa_deterministic=True)


def pem(*certificates: x509.Certificate) -> str:
    """The certificates in PEM, one after the other."""
    return b"".join(cert.public_bytes(serialization.Encoding.PEM) for cert in certificates).decode()


def der(thing: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    """A certificate or CRL in DER."""
    return thing.public_bytes(serialization.Encoding.DER)
