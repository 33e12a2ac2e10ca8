"""What attestation raises: every one is a `SoftTdxError`, so a command line prints it as one line."""

from softtdx.errors import SoftTdxError

__all__ = ["CollateralError", "MalformedError", "PkiError", "QuotingError"]


class MalformedError(SoftTdxError):
    """Bytes or text that are not what they should be: too short, too long, or a field no such thing can have."""


class CollateralError(SoftTdxError):
    """Collateral is missing or is not for this quote."""


class PkiError(SoftTdxError):
    """A simulated PKI cannot be made, loaded or stored as asked."""


class QuotingError(SoftTdxError):
    """The quoting enclave refuses: the TDREPORT is not one of this platform, or is of a kind it does not quote."""
