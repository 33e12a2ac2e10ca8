"""Between two loads: what another processor may do to memory while software on this one looks at it.

A store of another processor can land between any two instructions. To try such a race in the same way every time, the
loads of all processors are watched, by the host's software and by SEAM software alike:

    with platform.after_load(params, 8, act):    # `act` once, right behind the first load that touches the 8 bytes
        lp.seamcall(rax=SeamcallLeaf.MNG_INIT, rcx=tdr, rdx=params)

Only the loads of root-mode software are seen, not a guest's, nor those of page walks and the PAMT's. Nothing is
watched, and nothing costs anything, outside the with statement.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softtdx.hw.platform import Platform

__all__ = ["after_load"]

_SIZES = {"rd8": 1, "rd16": 2, "rd32": 4, "rd64": 8, "cas64": 8}
_OTHERS = ("read", "copy_page", "extend_sha384")
_PAGE = 4096


@contextmanager
def after_load(platform: "Platform", address: int, size: int, act: Callable[[], None], skip: int) -> Iterator[None]:
    """See `Platform.after_load`."""
    mask = (1 << 52 - platform.description.keyid_bits) - 1
    left = skip + 1

    def loaded(pa: int, length: int) -> None:
        nonlocal left
        if (pa & mask) < address + size and address < (pa & mask) + length and left:
            left -= 1
            if not left:
                act()

    def watched(name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        def read(pa: int, length: int) -> Any:
            value = load(pa, length)
            loaded(pa, length)
            return value

        def copy_page(target: int, source: int) -> Any:
            load(target, source)
            loaded(source, _PAGE)

        def word(pa: int, *operands: int) -> Any:
            value = load(pa, *operands)
            loaded(pa, _SIZES[name])
            return value

        def extend_sha384(pa: int, record: bytes, source: int = 0, length: int = 0) -> Any:
            load(pa, record, source, length)
            loaded(source, length)

        special: dict[str, Callable[..., Any]] = {
            "read": read, "copy_page": copy_page, "extend_sha384": extend_sha384,
        }  # fmt: skip
        return special.get(name, word)

    owners = [owner for lp in platform.lps for owner in (lp, lp._seam_cpu)]
    names = [(owner, name) for owner in owners for name in (*_OTHERS, *_SIZES) if hasattr(owner, name)]
    before = [(owner, name, getattr(owner, name)) for owner, name in names]
    try:
        for owner, name, load in before:
            setattr(owner, name, watched(name, load))
        yield
    finally:
        for owner, name, load in before:
            setattr(owner, name, load)
