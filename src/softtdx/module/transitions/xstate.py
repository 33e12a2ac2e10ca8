"""The guest's extended state: its XSAVES image in the TDVPS (TDX Module Base Spec, "Extended Feature Set").

The image lies in three pages that need not follow each other; the processor wants one area. An image of at most a
page is used in place, a larger one goes through a buffer of the module's own.
"""

import struct
from typing import Final, NamedTuple

from .. import tdcs, tdvps
from .guest import Guest

__all__ = ["header_is_valid", "restore", "save"]

PAGE: Final = 4096
IMAGE_PAGES: Final = 3
HEADER_AT: Final = 512
COMPACTED: Final = 1 << 63
_HEADER: Final = struct.Struct("<QQ48s")  # XSTATE_BV, XCOMP_BV, reserved
_ZERO: Final = bytes(48)


def header_is_valid(guest: Guest) -> bool:
    """Whether XRSTORS would accept the header (SDM vol. 1, 13.12)."""
    area = _area(guest)
    raw = guest.cpu.read((area.place or area.pages[0]) + HEADER_AT, _HEADER.size)
    state, components, reserved = _HEADER.unpack(raw)
    return bool(
        components & COMPACTED
        and not components & ~COMPACTED & ~guest.xfam
        and not state & ~components
        and reserved == _ZERO
    )


def restore(guest: Guest) -> None:
    """XRSTORS of the guest's state. ValueError: the processor refused it (#GP)."""
    area = _area(guest)
    place = area.place
    if place is None:
        place = area.bounce
        for index, page in enumerate(area.pages):
            guest.cpu.copy_page(place + PAGE * index, page)
    guest.cpu.xrstor(place, guest.xfam)


def save(guest: Guest) -> None:
    """XSAVES of the guest's state."""
    area = _area(guest)
    if area.place is not None:
        guest.cpu.xsave(area.place, guest.xfam)
        return
    bounce = area.bounce
    guest.cpu.xsave(bounce, guest.xfam)
    for index, page in enumerate(area.pages):
        guest.cpu.copy_page(page, bounce + PAGE * index)
    guest.cpu.zero_page(bounce, IMAGE_PAGES)


class _Area(NamedTuple):
    """Where the image is: in the TDVPS's `pages`, of use to the processor at `place` or by the buffer `bounce`."""

    pages: tuple[int, ...]
    place: int | None
    bounce: int  # this processor's, at the top of SEAMRR


def _area(guest: Guest) -> _Area:
    area: _Area | None = guest.xstate_area
    if area is None:
        first = tdvps.XBUFF >> 12
        pages = tuple(guest.vcpu.pages[first : first + IMAGE_PAGES])
        in_a_row = pages == tuple(range(pages[0], pages[0] + IMAGE_PAGES * PAGE, PAGE))
        place = pages[0] if in_a_row or guest.td.rd32(tdcs.XBUFF_SIZE) <= PAGE else None
        base, size = guest.g.seamrr
        bounce = base + size - IMAGE_PAGES * PAGE * (guest.cpu.apic_id + 1)
        area = guest.xstate_area = _Area(pages, place, bounce)
    return area
