"""TDX modules with a flaw: where the protection that an attack is about is taken out of the module.

A flaw is a change to one line of the module's source. The image with it is built, measured and loaded like any other,
signed with a key of the attacker's, on a platform whose loader trusts that key.
"""

import functools
import shutil
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from cryptography.hazmat.primitives.asymmetric import rsa

from softtdx.attack.scene import Scene
from softtdx.hw import Platform
from softtdx.kvm import Host
from softtdx.seamldr import launch_np_seamldr
from softtdx.seamldr.image import build_image
from softtdx.seamldr.release import HANDOFF_VERSION, SEAM_SVN, SUPPORTED_CPUS, Release
from softtdx.seamldr.sigstruct import KEY_BITS, sign, signer_hash

__all__ = ["Flaw", "attackers_key", "flawed_host", "host_with", "host_without_module", "image_with", "signed"]


@dataclass(frozen=True)
class Flaw:
    """In `file` of the module (relative to its package) `text` stands as `instead`."""

    file: str
    text: str
    instead: str


@functools.cache
def attackers_key() -> rsa.RSAPrivateKey:
    """The key with which no vendor signs."""
    return rsa.generate_private_key(65537, KEY_BITS)


def signed(image: bytes, key: rsa.RSAPrivateKey, svn: tuple[int, int] = SEAM_SVN) -> Release:
    """An image and its SIGSTRUCT."""
    return Release(
        image,
        sign(image, key, svn=svn, cpus=SUPPORTED_CPUS, handoff_version=HANDOFF_VERSION, day=date(2026, 1, 1)),
    )


@functools.cache
def image_with(*flaws: Flaw) -> bytes:
    """The module's image with these flaws. ValueError when a text does not stand in its file exactly once."""
    spec = find_spec("softtdx.module")
    assert spec is not None
    assert spec.submodule_search_locations
    with TemporaryDirectory() as folder:
        sources = Path(folder) / "module"
        shutil.copytree(spec.submodule_search_locations[0], sources, ignore=shutil.ignore_patterns("__pycache__"))
        for flaw in flaws:
            file = sources / flaw.file
            text = file.read_text()
            if text.count(flaw.text) != 1:
                raise ValueError(f"{flaw.file} of the TDX module holds {flaw.text!r} {text.count(flaw.text)} times")
            file.write_text(text.replace(flaw.text, flaw.instead))
        return build_image(sources)


def host_without_module(scene: Scene) -> Host:
    """A host that has loaded no module; without protection, on a platform whose loader trusts the attacker's key."""
    platform = Platform(scene.description)
    if not scene.protected:
        modulus = attackers_key().public_key().public_numbers().n
        launch_np_seamldr(platform, signer=signer_hash(modulus.to_bytes(KEY_BITS // 8, "little")))
    return Host(platform)


def host_with(scene: Scene, release: Release) -> Host:
    """The same, and it loads `release`."""
    host = host_without_module(scene)
    host.enable_tdx(release)
    return host


def flawed_host(scene: Scene, *flaws: Flaw) -> None:
    """On the unprotected side the scene is a host whose module has these flaws; the victim is a TD on both sides."""
    scene.always_td = True
    if not scene.protected:
        scene.host = host_with(scene, signed(image_with(*flaws), attackers_key()))
