"""SEAM_SIGSTRUCT: who signed a module image, and what the loader must know to load it.

Facts: layout of the 2048 bytes in `abi.structs.SeamSigstruct`; RSA-3072, PKCS#1 v1.5 with SHA-384; the signed message
is everything but modulus, exponent and signature (bytes 0..127 and 900..2047). Numbers are little endian.
"""

import hashlib
from datetime import date

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA384

from softtdx.abi.structs import (
    SIGSTRUCT_DEBUG_SIGNED,
    SIGSTRUCT_HEADER_LENGTH,
    SIGSTRUCT_SIGNED_RANGES,
    SIGSTRUCT_TYPE,
    SIGSTRUCT_VENDOR_INTEL,
    SIGSTRUCT_VERSION,
    SeamSigstruct,
)
from softtdx.errors import SoftTdxError

__all__ = ["KEY_BITS", "SigstructError", "fields_problem", "sign", "signature_is_good", "signer_hash"]

KEY_BITS = 3072
_EXPONENT = 65537
_KEY_BYTES = KEY_BITS // 8

# Sizes that a header of this kind always states, in dwords.
_SIZE_DWORDS = 0x200
_KEY_DWORDS = 0x60
_EXPONENT_DWORDS = 1
_MAX_CPUS = 255


class SigstructError(SoftTdxError):
    """A key or image that cannot be signed."""


def sign(
    image: bytes,
    key: rsa.RSAPrivateKey,
    *,
    svn: tuple[int, int],
    cpus: list[int],
    handoff_version: int,
    day: date,
    debug: bool = False,
) -> bytes:
    """Make the SEAM_SIGSTRUCT of `image`.

    `svn` is (minor, major); `cpus` the CPUID(1).EAX values that the module supports; `handoff_version` of
    TD-preserving updates. Raises SigstructError for a key that is not RSA-3072 with exponent 65537.
    """
    numbers = key.public_key().public_numbers()
    if key.key_size != KEY_BITS or numbers.e != _EXPONENT:
        raise SigstructError(f"the signing key must be RSA-{KEY_BITS} with exponent {_EXPONENT}")
    s = SeamSigstruct()
    s.type, s.length, s.version = SIGSTRUCT_TYPE, SIGSTRUCT_HEADER_LENGTH, SIGSTRUCT_VERSION
    s.module_type = SIGSTRUCT_DEBUG_SIGNED if debug else 0
    s.vendor, s.date = SIGSTRUCT_VENDOR_INTEL, int(day.strftime("%Y%m%d"), 16)
    s.size, s.key_size, s.modulus_size, s.exponent_size = _SIZE_DWORDS, _KEY_DWORDS, _KEY_DWORDS, _EXPONENT_DWORDS
    s.modulus = numbers.n.to_bytes(_KEY_BYTES, "little")
    s.exponent = _EXPONENT
    s.seamhash = hashlib.sha384(image).digest()
    s.seamsvn = svn[0] | svn[1] << 8
    s.num_stack_pages, s.num_tls_pages, s.num_keyhole_pages, s.num_global_data_pages = 1, 1, 127, 15
    s.module_hv = s.min_update_hv = handoff_version
    s.num_handoff_pages = 15
    s.no_downgrade = 1
    s.cpuid_table_size = len(cpus)
    s.cpuid_table = tuple(cpus) + (0,) * (len(s.cpuid_table) - len(cpus))
    s.signature = key.sign(_signed_message(s), padding.PKCS1v15(), SHA384())[::-1]
    return bytes(s)


def fields_problem(s: SeamSigstruct) -> str | None:
    """Say what is wrong with the fixed fields of a sigstruct, None when nothing is."""
    expected = {
        "type": SIGSTRUCT_TYPE,
        "length": SIGSTRUCT_HEADER_LENGTH,
        "version": SIGSTRUCT_VERSION,
        "key_size": _KEY_DWORDS,
        "exponent_size": _EXPONENT_DWORDS,
        "modulus_size": _KEY_DWORDS,
        "vendor": SIGSTRUCT_VENDOR_INTEL,
        "attributes": 0,
        "size": _SIZE_DWORDS,
        "exponent": _EXPONENT,
    }
    for name, value in expected.items():
        found = getattr(s, name)
        if found != value:
            return f"{name} is {found:#x}, must be {value:#x}"
    if s.module_type & ~SIGSTRUCT_DEBUG_SIGNED:
        return f"module_type {s.module_type:#x} has reserved bits"
    if s.cpuid_table_size > _MAX_CPUS:
        return f"cpuid_table_size is {s.cpuid_table_size}, at most {_MAX_CPUS}"
    if s.min_update_hv > s.module_hv:
        return f"min_update_hv {s.min_update_hv} is above module_hv {s.module_hv}"
    if s.gdt_idt_offset % 4096 or bool(s.gdt_idt_offset) != bool(s.fault_wrapper_offset):
        return "gdt_idt_offset and fault_wrapper_offset do not fit together"
    if not s.reserved_is_zero():
        return "reserved bytes are not zero"
    return None


def signature_is_good(s: SeamSigstruct) -> bool:
    """Check the RSA signature with the modulus that the structure carries."""
    modulus = int.from_bytes(s.modulus, "little")
    try:
        public = rsa.RSAPublicNumbers(s.exponent, modulus).public_key()
        public.verify(s.signature[::-1], _signed_message(s), padding.PKCS1v15(), SHA384())
    except (InvalidSignature, ValueError):
        return False
    return True


def _signed_message(s: SeamSigstruct) -> bytes:
    raw = bytes(s)
    return b"".join(raw[start:end] for start, end in SIGSTRUCT_SIGNED_RANGES)


def signer_hash(modulus: bytes) -> bytes:
    """SHA-384 of a signer's modulus, little endian: what the loader holds of the signer it trusts."""
    return hashlib.sha384(modulus).digest()
