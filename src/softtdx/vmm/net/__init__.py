"""What a virtio network card is plugged into: `link` (a socket that machines share)."""

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from softtdx.vmm.errors import MachineError
from softtdx.vmm.net.link import SocketLink as SocketLink

__all__ = ["Network", "NetworkSpec", "SocketLink"]

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE)
_LOCAL, _MULTICAST = 0x02, 0x01  # of a MAC address's first byte


class Network(Protocol):
    """Takes the frames that a guest transmits."""

    def send(self, frame: bytes) -> None:
        """A frame; does not wait."""

    def close(self) -> None:
        """Unplug."""


@dataclass(frozen=True)
class NetworkSpec:
    """What `--net` asks for: `socket:PATH`, and behind a comma `mac=52:54:00:12:34:56`."""

    socket: Path
    mac: bytes

    @classmethod
    def parse(cls, text: str) -> "NetworkSpec":
        """MachineError for what is no network."""
        where, _, option = text.partition(",")
        kind, _, path = where.partition(":")
        if kind != "socket" or not path:
            raise MachineError(f"{text!r} is no network; write socket:PATH, and ,mac=52:54:00:12:34:56 if you like")
        return cls(Path(path), _mac(option))

    def plug(self, receive: Callable[[bytes], None]) -> Network:
        """The network; what arrives from it goes to `receive`."""
        return SocketLink(self.socket, receive)


def _mac(option: str) -> bytes:
    """The address asked for, or one that no other machine has."""
    if not option:
        random = secrets.token_bytes(6)
        return bytes([random[0] & ~_MULTICAST | _LOCAL]) + random[1:]
    name, _, text = option.partition("=")
    if name != "mac" or not _MAC.fullmatch(text):
        raise MachineError(f"{option!r} is not mac= and six bytes in hexadecimal, as 52:54:00:12:34:56")
    address = bytes.fromhex(text.replace(":", ""))
    if address[0] & _MULTICAST:
        raise MachineError(f"{text} is the address of a group, not of one machine: its first byte must be even")
    return address
