"""How a leaf function stops: it raises its status; only the dispatcher builds RAX from it."""

from softtdx.abi.status import Operand, Status

__all__ = ["LeafError", "operand_busy", "operand_invalid"]


class LeafError(Exception):
    """A leaf ends with `status`; `detail` goes into RAX bits 31:0 (an operand, a state, an MSR index...).

    Registers written before the raise stay written: several leaves return information beside an error.
    """

    __slots__ = ("rax",)

    def __init__(self, status: int, detail: int = 0) -> None:
        """`status` has bits 31:0 clear, as in `abi.status.Status`."""
        self.rax = int(status) | int(detail)


def operand_invalid(operand: Operand) -> LeafError:
    """OPERAND_INVALID of one operand: the most frequent refusal."""
    return LeafError(Status.OPERAND_INVALID, operand)


def operand_busy(operand: Operand) -> LeafError:
    """OPERAND_BUSY: a lock that the leaf needs is held."""
    return LeafError(Status.OPERAND_BUSY, operand)
