"""The guest's extended state: its XSAVES image in the TDVPS (TDX Module Base Spec, "Extended Feature Set").

The image lies in three pages that need not follow each other; the processor wants one area. An image of at most a
page is used in place, a larger one goes through a buffer of the module's own.
"""

import struct
from typing import Final

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
    raw = guest.vcpu.read(tdvps.XBUFF + HEADER_AT, _HEADER.size)
    state, components, reserved = _HEADER.unpack(raw)
    return bool(
        components & COMPACTED
        and not components & ~COMPACTED & ~guest.xfam
        and not state & ~components
        and reserved == _ZERO
    )


def restore(guest: Guest) -> None:
    """XRSTORS of the guest's state. ValueError: the processor refused it (#GP)."""
    area = _in_place(guest)
    if area is None:
        area = _bounce(guest)
        for index, page in enumerate(_pages(guest)):
            guest.cpu.copy_page(area + PAGE * index, page)
    guest.cpu.xrstor(area, guest.xfam)


def save(guest: Guest) -> None:
    """XSAVES of the guest's state."""
    area = _in_place(guest)
    if area is not None:
        guest.cpu.xsave(area, guest.xfam)
        return
    area = _bounce(guest)
    guest.cpu.xsave(area, guest.xfam)
    for index, page in enumerate(_pages(guest)):
        guest.cpu.copy_page(page, area + PAGE * index)
    guest.cpu.zero_page(area, IMAGE_PAGES)


def _pages(guest: Guest) -> tuple[int, ...]:
    first = tdvps.XBUFF >> 12
    return tuple(guest.vcpu.pages[first : first + IMAGE_PAGES])


def _in_place(guest: Guest) -> int | None:
    first, second, third = _pages(guest)
    if third - first == 2 * PAGE and second - first == PAGE:
        return first
    return first if guest.td.rd32(tdcs.XBUFF_SIZE) <= PAGE else None


def _bounce(guest: Guest) -> int:
    """The buffer of this processor, at the top of SEAMRR."""
    base, size = guest.g.seamrr
    return base + size - IMAGE_PAGES * PAGE * (guest.cpu.apic_id + 1)
