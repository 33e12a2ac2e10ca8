"""From a description to a host on which machines can be built."""

from pathlib import Path

from softtdx.hw import Platform, PlatformDescription, preset
from softtdx.kvm import Host

__all__ = ["boot_host", "describe"]


def describe(file: str | Path | None) -> PlatformDescription:
    """The platform that a TOML file describes, or the default preset. DescriptionError for a bad file."""
    return PlatformDescription.from_toml(file) if file is not None else preset("spr")


def boot_host(description: PlatformDescription | None = None, *, tdx: bool = True) -> Host:
    """Power a platform on, boot the host kernel and, with `tdx`, load this build's TDX module."""
    host = Host(Platform(description))
    if tdx:
        from softtdx.seamldr import development_release

        host.enable_tdx(development_release())
    return host
