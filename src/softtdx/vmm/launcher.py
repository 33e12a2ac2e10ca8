"""The launcher's side of the VMM: memory layout and the boot info page (native/guests/boot_info.h)."""

import struct
from dataclasses import dataclass

from softtdx._silicon import PAYLOADS
from softtdx.vmm.errors import MachineError
from softtdx.vmm.payload import Payload

__all__ = ["FIRMWARE_BASE", "Layout", "firmware_image", "lay_out"]

PAGE = 4096
FIRMWARE_BASE = 0xFFFF_8000
FIRMWARE_SIZE = 0x8000
PERCPU_SIZE = 0x4000
STACK_SIZE = 256 << 10
MAX_MEMORY = 3 << 30
_MAGIC = int.from_bytes(b"SOFTTDX1", "little")
RANGE_TO_ACCEPT, _RANGE_PRESENT = 0, 1
_MAX_RANGES = 32
_INFO = struct.Struct("<6Q")
_RANGE = struct.Struct("<3Q")
_RANGES_AT = 13 * 8
_AGENT_AT = _RANGES_AT + _MAX_RANGES * _RANGE.size


@dataclass(frozen=True)
class Layout:
    """Where everything lies in guest-physical memory. `present` are runs of whole pages filled before the start.

    With `agent` there is a vCPU beside the payload's `vcpus`, the last, on which the launcher answers for the TD.
    """

    memory: int
    vcpus: int
    entry: int
    stack_top: int
    percpu_base: int
    present: tuple[tuple[int, bytes], ...]
    agent: bool = False

    def ranges(self) -> list[tuple[int, int, int]]:
        """RAM as the launcher is told of it: (base, size, kind)."""
        found, at = [], 0
        for base, data in self.present:
            if base > at:
                found.append((at, base - at, RANGE_TO_ACCEPT))
            found.append((base, len(data), _RANGE_PRESENT))
            at = base + len(data)
        if at < self.memory:
            found.append((at, self.memory - at, RANGE_TO_ACCEPT))
        return found


def lay_out(payload: Payload, memory: int, vcpus: int, *, agent: bool = False) -> Layout:
    """Place a payload in `memory` bytes of RAM. MachineError when it does not fit or hits what the launcher needs."""
    if memory % PAGE or memory > MAX_MEMORY:
        raise MachineError(f"a machine cannot have {memory} bytes of memory: whole 4 KiB pages, at most 3 GiB")
    percpu_base = memory - (vcpus + agent) * PERCPU_SIZE
    usable = percpu_base - STACK_SIZE
    if usable <= 0:
        raise MachineError(
            f"{memory >> 10} KiB of memory are too little for {vcpus} vCPUs and a stack; give --memory more"
        )
    for segment in payload.segments:
        if segment.end > memory:
            raise MachineError(
                f"the payload {payload.name!r} needs memory up to {segment.end:#x}, the machine has {memory:#x} "
                f"({memory >> 20} MiB); give --memory more"
            )
        if segment.end > usable:
            raise MachineError(
                f"the payload {payload.name!r} overlaps the stack and the launcher's areas from {usable:#x} on; "
                "give --memory more or link it lower"
            )
    layout = Layout(memory, vcpus, payload.entry, percpu_base, percpu_base, _pages(payload), agent)
    if len(layout.ranges()) > _MAX_RANGES:
        raise MachineError(f"the payload {payload.name!r} has too many separate segments ({len(layout.present)})")
    return layout


def firmware_image(layout: Layout) -> bytes:
    """The launcher with its boot info filled in: what is measured in front of the payload."""
    image = bytearray(PAYLOADS["launcher"])
    if len(image) != FIRMWARE_SIZE:
        raise MachineError(f"the launcher has {len(image)} bytes instead of {FIRMWARE_SIZE}: rebuild the native core")
    ranges = layout.ranges()
    _INFO.pack_into(image, 0, _MAGIC, layout.vcpus, layout.entry, layout.stack_top, layout.percpu_base, len(ranges))
    for i, entry in enumerate(ranges):
        _RANGE.pack_into(image, _RANGES_AT + _RANGE.size * i, *entry)
    struct.pack_into("<Q", image, _AGENT_AT, layout.vcpus if layout.agent else 0)
    return bytes(image)


def _pages(payload: Payload) -> tuple[tuple[int, bytes], ...]:
    """The file-backed bytes as runs of whole pages; what is only zeroes is left to the guest's fresh memory."""
    pages: dict[int, bytearray] = {}
    for segment in payload.segments:
        address, data = segment.address, segment.data
        while data:
            page, offset = address & ~(PAGE - 1), address % PAGE
            part = data[: PAGE - offset]
            pages.setdefault(page, bytearray(PAGE))[offset : offset + len(part)] = part
            address, data = address + len(part), data[len(part) :]
    runs: list[tuple[int, bytearray]] = []
    for page in sorted(pages):
        if runs and runs[-1][0] + len(runs[-1][1]) == page:
            runs[-1][1].extend(pages[page])
        else:
            runs.append((page, pages[page]))
    return tuple((base, bytes(data)) for base, data in runs)
