"""When the module itself cannot go on: a state that its own checks should have made impossible."""

__all__ = ["ModuleFatal"]


class ModuleFatal(Exception):  # noqa: N818  it ends the module, nobody handles it as an error
    """The module shuts down: SEAMCALL finds no module any more until the platform is reset (TDX Base Spec, "Fatal
    Shutdown"). The message says what was found.
    """
