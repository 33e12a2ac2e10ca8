"""The module release of this build: image, SEAM_SIGSTRUCT and the development key that signs it.

The key is made once for each user, at build time, and stays in the user's data folder. The loader trusts it as a
real P-SEAMLDR trusts the platform vendor's key, so a signed module reports MRSIGNERSEAM zero.
"""

import contextlib
import os
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from softtdx.errors import SoftTdxError
from softtdx.seamldr.image import build_image
from softtdx.seamldr.sigstruct import KEY_BITS, sign, signer_hash

__all__ = ["HANDOFF_VERSION", "SEAM_SVN", "SUPPORTED_CPUS", "Release", "development_release", "trusted_signer"]

SEAM_SVN = (5, 1)  # minor, major: TEE_TCB_SVN bytes 0 and 1
HANDOFF_VERSION = 1
SUPPORTED_CPUS = [0x806F8, 0xC06F2, 0xA06D0]  # CPUID(1).EAX: 4th, 5th, 6th generation Xeon
_BUILD_DATE = date(2026, 11, 23)


class ReleaseError(SoftTdxError):
    """The development key cannot be made or read."""


@dataclass(frozen=True)
class Release:
    """What a host loads: the image (whole pages) and its SEAM_SIGSTRUCT (2048 bytes)."""

    image: bytes
    sigstruct: bytes


def data_folder() -> Path:
    """The user's data folder of SoftTDX: SOFTTDX_HOME, else below XDG_DATA_HOME."""
    home = os.environ.get("SOFTTDX_HOME")
    if home:
        return Path(home)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "softtdx"


@lru_cache(maxsize=1)
def development_release() -> Release:
    """Build and sign the image of the installed package's own module sources."""
    spec = find_spec("softtdx.module")
    if spec is None or not spec.submodule_search_locations:
        raise ReleaseError("the package softtdx.module is not installed; reinstall SoftTDX")
    image = build_image(Path(spec.submodule_search_locations[0]))
    sigstruct = sign(
        image,
        development_key(),
        svn=SEAM_SVN,
        cpus=SUPPORTED_CPUS,
        handoff_version=HANDOFF_VERSION,
        day=_BUILD_DATE,
    )
    return Release(image, sigstruct)


def trusted_signer() -> bytes:
    """SHA-384 of the development key's modulus: the signer that the platform's loader accepts."""
    modulus = development_key().public_key().public_numbers().n
    return signer_hash(modulus.to_bytes(KEY_BITS // 8, "little"))


@lru_cache(maxsize=1)
def development_key() -> rsa.RSAPrivateKey:
    """Read the development key, or make it (mode 0600) when there is none. Raises ReleaseError."""
    path = data_folder() / "module-signing-key.pem"
    try:
        if not path.exists():
            _make_key(path)
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ReleaseError(
            f"the module signing key {str(path)!r} cannot be used ({error}); remove it to make a new one"
        ) from error
    if not isinstance(key, rsa.RSAPrivateKey) or key.key_size != KEY_BITS:
        raise ReleaseError(f"{str(path)!r} is not an RSA-{KEY_BITS} key; remove it to make a new one")
    return key


def _make_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    pem = rsa.generate_private_key(65537, KEY_BITS).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    # Written aside and linked into place: of two processes that start at once, both end up with the same key.
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink()
