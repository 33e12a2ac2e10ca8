"""Which function serves which leaf: filled by decorators when the leaf modules are imported."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from softtdx.abi.leaves import SeamcallLeaf, TdcallLeaf

if TYPE_CHECKING:
    from .context import Call

__all__ = [
    "ALL_VERSIONS",
    "HOST_LEAVES",
    "GuestHandler",
    "HostHandler",
    "HostLeaf",
    "guest_leaves",
    "host_leaf",
    "seamcall",
    "tdcall",
]

HostHandler = Callable[["Call"], int | None]
"""A host-side leaf: operands and results in `call.regs`; None or a status for RAX; LeafError stops it."""

GuestHandler = Callable[..., int | None]
"""A guest-side leaf; its arguments are the guest dispatcher's business."""

H = TypeVar("H", bound=HostHandler)
G = TypeVar("G", bound=GuestHandler)


ALL_VERSIONS = tuple(range(256))
"""For a leaf that looks at its version itself, because it answers more than OPERAND_INVALID to one it does not know."""


class HostLeaf:
    """A host-side leaf function and the versions of it that exist."""

    __slots__ = ("before_ready", "function", "leaf", "versions")

    def __init__(
        self, leaf: SeamcallLeaf, function: HostHandler, versions: tuple[int, ...], before_ready: bool
    ) -> None:
        """`before_ready`: the leaf may run before the module is in SYS_READY."""
        self.leaf = leaf
        self.function = function
        self.versions = versions
        self.before_ready = before_ready


HOST_LEAVES: dict[int, HostLeaf] = {}
guest_leaves: dict[int, GuestHandler] = {}


def seamcall(leaf: SeamcallLeaf, *, versions: tuple[int, ...] = (0,), before_ready: bool = False) -> Callable[[H], H]:
    """Make a function the handler of a SEAMCALL leaf."""

    def register(function: H) -> H:
        HOST_LEAVES[int(leaf)] = HostLeaf(leaf, function, versions, before_ready)
        return function

    return register


def tdcall(leaf: TdcallLeaf) -> Callable[[G], G]:
    """Make a function the handler of a TDCALL leaf."""

    def register(function: G) -> G:
        guest_leaves[int(leaf)] = function
        return function

    return register


def host_leaf(leaf: int) -> HostLeaf | None:
    """The handler of a SEAMCALL leaf."""
    return HOST_LEAVES.get(leaf)
