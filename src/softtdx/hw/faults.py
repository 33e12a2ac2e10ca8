"""What an instruction of root-mode software can raise: the faults that hardware would deliver to it."""

from softtdx._silicon import BusFault, MachineCheck, SiliconFault, VmFail

__all__ = [
    "BusFault",
    "GeneralProtection",
    "MachineCheck",
    "ModeFault",
    "SeamShutdown",
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


class SeamShutdown(Exception):  # noqa: N818  what hardware does, not an error of a caller
    """SEAM software found that it cannot go on and executed UD2: it is gone for good."""
