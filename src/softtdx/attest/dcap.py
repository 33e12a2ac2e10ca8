"""The independent verifier that comes with the project: `dcap-qvl`, given our root, collateral and clock."""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import dataclass
from typing import Any

from softtdx.attest.collateral import Collateral
from softtdx.attest.pki import Pki
from softtdx.errors import SoftTdxError

__all__ = ["DcapRejectedError", "DcapVerdict", "verify_with_dcap_qvl"]


class DcapRejectedError(SoftTdxError):
    """dcap-qvl refuses the quote; the message is its own."""


@dataclass(frozen=True)
class DcapVerdict:
    """What dcap-qvl says of a quote it accepts."""

    status: str
    advisory_ids: tuple[str, ...]
    report: dict[str, Any]


def verify_with_dcap_qvl(quote: bytes, trust: Pki | tuple[Collateral, bytes], now: int | None = None) -> DcapVerdict:
    """Let dcap-qvl judge the quote.

    `trust` is the PKI, or (collateral, root certificate in DER); `now` is in Unix seconds, the clock's if None. Raises
    `DcapRejectedError`.
    """
    # It takes long to import, which only those who verify with it should pay.
    dcap_qvl: Any = importlib.import_module("dcap_qvl")

    collateral, root = (trust.collateral(), trust.root_der) if isinstance(trust, Pki) else trust
    try:
        qvl_collateral = dcap_qvl.QuoteCollateralV3.from_json(collateral.to_json())
        verdict = dcap_qvl.verify_with_root_ca(
            bytes(quote), qvl_collateral, root, int(time.time()) if now is None else now
        )
    except (ValueError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise DcapRejectedError(f"dcap-qvl rejects the quote: {reason}") from None
    body = json.loads(verdict.to_json())
    return DcapVerdict(verdict.status, tuple(verdict.advisory_ids), body)
