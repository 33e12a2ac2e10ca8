"""Operand ids as plain integers, for what every call passes along: CPython 3.11 needs 0.3 us to find an Enum member."""

from typing import Final

from softtdx.abi.status import Operand

__all__ = ["OP_STATE", "R8", "R9", "RCX", "RDX", "SEPT_TREE", "TD_EPOCH"]

RCX: Final = int(Operand.RCX)
RDX: Final = int(Operand.RDX)
R8: Final = int(Operand.R8)
R9: Final = int(Operand.R9)
OP_STATE: Final = int(Operand.OP_STATE)
SEPT_TREE: Final = int(Operand.SEPT_TREE)
TD_EPOCH: Final = int(Operand.TD_EPOCH)
