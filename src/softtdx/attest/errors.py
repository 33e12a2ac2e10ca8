"""What attestation raises: every one is a `SoftTdxError`, so a command line prints it as one line."""

from softtdx.errors import SoftTdxError

__all__ = ["CollateralError", "MalformedError", "PkiError", "QuotingError", "ServiceUnavailableError"]


class MalformedError(SoftTdxError):
    """Bytes or text that are not what they should be: a wrong length, or a field none can have."""


class CollateralError(SoftTdxError):
    """Collateral is missing or is not for this quote."""


class PkiError(SoftTdxError):
    """A simulated PKI cannot be made, loaded or stored as asked."""


class QuotingError(SoftTdxError):
    """The quoting enclave refuses: the TDREPORT is not this platform's, or of no kind it quotes."""


class ServiceUnavailableError(SoftTdxError):
    """A service is not there, or gave no answer: try again, or start it."""
