"""TDREPORT_STRUCT as attestation looks at it: what TDG.MR.REPORT gave a TD, and a quoting enclave makes a quote of.

The layout is `softtdx.abi.structs.TdReport`; here are the questions asked of one.
"""

from __future__ import annotations

import hashlib

from softtdx.abi.structs import Attributes, TdReport
from softtdx.attest.errors import MalformedError

__all__ = ["TdReport", "attribute_bits", "attribute_names", "describe_tdreport", "hashes_hold", "parse_tdreport"]


def parse_tdreport(data: bytes) -> TdReport:
    """Reads a TDREPORT of exactly 1024 bytes, reserved ones whatever they are; its MAC is not judged here."""
    if len(data) != TdReport.SIZE:
        raise MalformedError(f"a TDREPORT is {TdReport.SIZE} bytes, this is {len(data)}")
    return TdReport.parse(data, strict=False)


def hashes_hold(report: TdReport) -> bool:
    """Whether TEE_TCB_INFO_HASH and TEE_INFO_HASH are the SHA-384 of the two structures that follow the MAC."""
    head = report.report_mac
    return (
        head.tee_tcb_info_hash == hashlib.sha384(report.tee_tcb_info.view).digest()
        and head.tee_info_hash == hashlib.sha384(report.td_info.view).digest()
    )


def attribute_bits() -> dict[str, int]:
    """TD ATTRIBUTES that have a name, each with its value."""
    return {str(item.name): int(item) for item in Attributes}


def attribute_names(attributes: int) -> list[str]:
    """The names of the bits set, an unnamed one as `bit N`."""
    names = []
    while attributes:
        lowest = attributes & -attributes
        names.append(NAMES.get(lowest) or f"bit {lowest.bit_length() - 1}")
        attributes ^= lowest
    return names


NAMES = {value: name for name, value in attribute_bits().items()}


def describe_tdreport(report: TdReport) -> dict[str, object]:
    """Every field, decoded, for `softtdx inspect`."""
    fields = report.as_dict()
    fields["td_info"]["attribute_names"] = attribute_names(report.td_info.attributes)
    return {"kind": "TDREPORT", **fields, "hashes_hold": hashes_hold(report)}
