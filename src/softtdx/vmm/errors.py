"""What the VMM tells its user: the payload, the machine's size, or the guest itself is at fault."""

from softtdx.errors import SoftTdxError

__all__ = ["GuestError", "MachineError", "PayloadError"]


class PayloadError(SoftTdxError):
    """A payload that cannot be loaded, with the reason and the way out."""


class MachineError(SoftTdxError):
    """A machine that cannot be built as asked."""


class GuestError(SoftTdxError):
    """The guest ended in a way it did not mean to."""
