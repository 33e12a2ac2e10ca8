"""When the module itself cannot go on: a state that its own checks should have made impossible."""

from softtdx.hw.faults import SeamShutdown

__all__ = ["ModuleFatal"]


class ModuleFatal(SeamShutdown):
    """The module shuts down: SEAMCALL finds no module any more until the platform is reset (TDX Base Spec, "Fatal
    Shutdown"). The message says what was found.
    """
