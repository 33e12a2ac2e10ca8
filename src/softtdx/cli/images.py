"""`softtdx images`: what `softtdx boot` boots."""

import json

import click

from softtdx.vmm.images import cache_folder, cached_images, pull_images

__all__ = ["COMMANDS"]


@click.group("images")
def images_group() -> None:
    """Debian's 6.12 cloud kernel and busybox, in a cache folder."""


@images_group.command("pull")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def pull(as_json: bool) -> None:
    """Download the newest kernel and busybox through apt and unpack them; no root is needed."""
    images = pull_images()
    if as_json:
        click.echo(
            json.dumps({"package": images.package, "kernel": str(images.kernel), "busybox": str(images.busybox)})
        )
    else:
        click.echo(f"{images.package} and busybox are in {images.kernel.parent}")


@images_group.command("list")
def list_images() -> None:
    """Say what is there."""
    images = cached_images()
    if images is None:
        click.echo(f"nothing yet in {cache_folder()}; run softtdx images pull")
    else:
        click.echo(f"{images.package}  {images.kernel}")


COMMANDS = [images_group]
