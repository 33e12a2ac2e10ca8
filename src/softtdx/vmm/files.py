"""Files that a user names: read whole, or refused in words that say which and why."""

from pathlib import Path

from softtdx.vmm.errors import PayloadError

__all__ = ["read_file"]


def read_file(path: str | Path, what: str, limit: int, kind: str = "file") -> bytes:
    """The contents of `path`, which is to be `what` ("the kernel"). PayloadError if it cannot be that.

    `limit` is in bytes; `kind` is what a user who named a folder should give instead.
    """
    file = Path(path)
    try:
        if file.is_dir():
            raise PayloadError(f"{what} {str(path)!r} is a folder; give a {kind}")
        size = file.stat().st_size
        if size > limit:
            raise PayloadError(f"{what} {str(path)!r} has {size} bytes; more than {limit >> 20} MiB is not taken")
        return file.read_bytes()
    except OSError as error:
        raise PayloadError(f"cannot read {what} {str(path)!r}: {error.strerror}") from error
