"""P-256 keys and signatures as quotes and collateral carry them: drawn from a seed, deterministic, raw `r || s`.

A seed makes a PKI reproducible to the byte: keys come from it by HKDF, signatures are RFC 6979's.
"""

from __future__ import annotations

import secrets

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from softtdx.attest.errors import MalformedError

__all__ = ["KeySource", "public_from_point", "public_point", "sign_raw", "verify_raw"]

P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
SIGN = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
VERIFY = ec.ECDSA(hashes.SHA256())


class KeySource:
    """Draws keys and other secret or random bytes by name; the same seed and name give the same bytes.

    Without a seed every draw is fresh from the operating system.
    """

    def __init__(self, seed: int | None) -> None:
        self._master = None if seed is None else b"softtdx pki seed " + str(seed).encode()

    def draw(self, name: str, size: int) -> bytes:
        """`size` bytes for the purpose `name`."""
        if self._master is None:
            return secrets.token_bytes(size)
        return HKDF(hashes.SHA256(), size, salt=None, info=name.encode()).derive(self._master)

    def key(self, name: str) -> ec.EllipticCurvePrivateKey:
        """The private key for the purpose `name`: 320 bits reduced into the group, so that no value is favoured."""
        value = int.from_bytes(self.draw("key " + name, 40), "big") % (P256_ORDER - 1) + 1
        return ec.derive_private_key(value, ec.SECP256R1())

    def serial(self, name: str) -> int:
        """A certificate serial number: 19 bytes, positive, never zero."""
        return int.from_bytes(self.draw("serial " + name, 19), "big") | 1 << 150


def sign_raw(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """ECDSA P-256 with SHA-256 as 64 bytes `r || s`, big endian each."""
    r, s = decode_dss_signature(key.sign(message, SIGN))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def verify_raw(key: ec.EllipticCurvePublicKey, signature: bytes, message: bytes) -> bool:
    """Whether the 64-byte signature is this key's over the message."""
    half = len(signature) // 2
    der = encode_dss_signature(int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big"))
    try:
        key.verify(der, message, VERIFY)
    except InvalidSignature:
        return False
    return True


def public_point(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public key as 64 bytes `x || y`."""
    encoded = key.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    return encoded[1:]


def public_from_point(point: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of 64 bytes `x || y`; `MalformedError` if that is no point of P-256."""
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + point)
    except ValueError as error:
        raise MalformedError(f"the attestation key {point.hex()} is not a point of P-256") from error
