"""The one family of exceptions that bad user input raises; a guest or host across a wall never sees these."""

__all__ = ["SoftTdxError"]


class SoftTdxError(Exception):
    """Something the user gave cannot be used: says what, with the offending value, and the way out.

    The command line prints it as one line and exits with `exit_code`.
    """

    exit_code = 1
