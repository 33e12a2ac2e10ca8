"""Collateral: what a verifier needs beside a quote, as one object, exchanged as JSON.

The JSON is that of `QuoteCollateralV3`. Texts of TCB info and QE identity are kept exactly as they were signed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from softtdx.attest.errors import MalformedError

__all__ = ["Collateral"]

BYTES_FIELDS = ("root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature")


@dataclass(frozen=True)
class Collateral:
    """Issuer chains are PEM, leaf first; CRLs are DER; signatures are 64 bytes `r || s`."""

    pck_crl_issuer_chain: str
    root_ca_crl: bytes
    pck_crl: bytes
    tcb_info_issuer_chain: str
    tcb_info: str
    tcb_info_signature: bytes
    qe_identity_issuer_chain: str
    qe_identity: str
    qe_identity_signature: bytes
    pck_certificate_chain: str | None = None
    """Set when the quote itself carries no PCK chain; a verifier prefers it to the quote's."""

    def to_json(self) -> str:
        """As JSON, bytes in hex: the form `dcap_qvl.QuoteCollateralV3.from_json` takes."""
        values = {key: v.hex() if isinstance(v, bytes) else v for key, v in asdict(self).items() if v is not None}
        return json.dumps(values, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Collateral:
        """Reads what `to_json` writes, or another tool's `QuoteCollateralV3`."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MalformedError(f"this collateral is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise MalformedError("this collateral is not a JSON object")
        known: dict[str, str | bytes | None] = {}
        for item in fields(cls):
            value = values.get(item.name)
            if item.name == "pck_certificate_chain" and value is None:
                continue
            if not isinstance(value, str):
                raise MalformedError(f"the collateral's {item.name} is missing or not a string")
            known[item.name] = _hex(item.name, value) if item.name in BYTES_FIELDS else value
        return cls(**known)  # type: ignore[arg-type]  # each is of its field's type by the loop above

    @classmethod
    def load(cls, path: str | Path) -> Collateral:
        """From a file of JSON."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise MalformedError(f"collateral {path} cannot be read: {error}") from None

    def save(self, path: str | Path) -> None:
        """To a file of JSON."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")


def _hex(name: str, value: str) -> bytes:
    try:
        return bytes.fromhex(value)
    except ValueError:
        raise MalformedError(f"the collateral's {name} is not hexadecimal") from None
