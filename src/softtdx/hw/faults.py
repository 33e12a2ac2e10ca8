"""What an instruction of root-mode software can raise: the faults that hardware would deliver to it."""

from softtdx._silicon import BusFault, MachineCheck, SiliconFault, VmFail

__all__ = [
    "BusFault",
    "GeneralProtection",
    "MachineCheck",
    "ModeFault",
    "SiliconFault",
    "UndefinedOpcode",
    "VmFail",
]


class ModeFault(Exception):  # noqa: N818 - a fault is the architecture's word
    """An instruction was issued where the processor does not allow it."""


class UndefinedOpcode(ModeFault):
    """#UD: the instruction does not exist in the current mode."""


class GeneralProtection(ModeFault):
    """#GP(0): the instruction exists but its operand or a mode bit forbids it."""
