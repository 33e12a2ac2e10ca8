"""A cpio archive in the new ASCII format, which is what an initramfs is (Linux, early-userspace/buffer-format)."""

__all__ = ["Archive"]

_DIRECTORY, _FILE, _LINK, _CHAR_DEVICE = 0o040000, 0o100000, 0o120000, 0o020000


class Archive:
    """Members in the order in which they are added; the same calls give the same bytes."""

    def __init__(self) -> None:
        """Empty."""
        self._parts: list[bytes] = []
        self._inode = 1

    def directory(self, name: str, mode: int = 0o755) -> None:
        """A folder."""
        self._add(name, _DIRECTORY | mode, b"", links=2)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file."""
        self._add(name, _FILE | mode, data)

    def link(self, name: str, target: str) -> None:
        """A symbolic link."""
        self._add(name, _LINK | 0o777, target.encode())

    def char_device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A character device node."""
        self._add(name, _CHAR_DEVICE | mode, b"", device=(major, minor))

    def to_bytes(self) -> bytes:
        """The archive with its trailer."""
        return b"".join(self._parts) + _member("TRAILER!!!", 0, 0, b"", 1, (0, 0))

    def _add(self, name: str, mode: int, data: bytes, links: int = 1, device: tuple[int, int] = (0, 0)) -> None:
        self._parts.append(_member(name, self._inode, mode, data, links, device))
        self._inode += 1


def _member(name: str, inode: int, mode: int, data: bytes, links: int, device: tuple[int, int]) -> bytes:
    path = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device major and minor, the node's major and minor, name size, check
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return _pad(head) + _pad(data)


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
