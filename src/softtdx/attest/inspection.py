"""Files of unknown kind decoded: quotes, TDREPORTs, event logs, CCEL tables, collateral, certificates, CRLs."""

from __future__ import annotations

import json
from collections.abc import Callable

from cryptography import x509

from softtdx.abi.structs import TdReport
from softtdx.attest.appraisal import EnclaveIdentity, TcbInfo
from softtdx.attest.chain import Cert, Crl, pck_extension, split_pem
from softtdx.attest.collateral import Collateral
from softtdx.attest.errors import MalformedError
from softtdx.attest.eventlog import CCEL_SIGNATURE, SIGNATURE, EventLog, parse_ccel
from softtdx.attest.quote import CERTIFICATION_PCK_CHAIN, QUOTE_VERSIONS, Quote
from softtdx.attest.tdreport import describe_tdreport, parse_tdreport
from softtdx.errors import SoftTdxError

__all__ = ["inspect_bytes"]

PEM_MARK = b"-----BEGIN CERTIFICATE-----"
SPEC_ID_AT = 32
DER_SEQUENCE = 0x30


def inspect_bytes(data: bytes) -> dict[str, object]:
    """Every field of whatever this is; `kind` names it. Raises `MalformedError` if it is nothing known."""
    return _kind_of(data)(data)


def _kind_of(data: bytes) -> Callable[[bytes], dict[str, object]]:
    if len(data) == TdReport.SIZE:
        return lambda found: describe_tdreport(parse_tdreport(found))
    if data[:4] == CCEL_SIGNATURE:
        return lambda found: {"kind": "CCEL table", **parse_ccel(found).as_dict()}
    if data[SPEC_ID_AT : SPEC_ID_AT + len(SIGNATURE)] == SIGNATURE:
        return lambda found: EventLog.parse(found).describe()
    if data.lstrip().startswith(PEM_MARK):
        return lambda found: {"kind": "certificates", "certificates": _certificates(found)}
    if data.lstrip()[:1] == b"{":
        return _json
    if data[:1] and data[0] == DER_SEQUENCE:
        return _der
    if int.from_bytes(data[:2], "little") in QUOTE_VERSIONS:
        return _quote
    raise MalformedError(
        f"{len(data)} bytes that are no quote, TDREPORT, event log, CCEL table, certificate, CRL or collateral"
    )


def _quote(data: bytes) -> dict[str, object]:
    quote = Quote.parse(data)
    found = quote.describe()
    if quote.signature.chain_type == CERTIFICATION_PCK_CHAIN:
        found["pck_chain"] = _certificates(quote.signature.chain)
    return found


def _certificates(pem: bytes) -> list[dict[str, object]]:
    try:
        return [_certificate(Cert(data)) for data in split_pem(pem)]
    except SoftTdxError as error:
        return [{"unreadable": str(error)}]


def _certificate(cert: Cert) -> dict[str, object]:
    found: dict[str, object] = {
        "subject": cert.name,
        "issuer": cert.issuer_common_name,
        "serial": f"{cert.x509.serial_number:x}",
        "not_before": cert.not_before.isoformat(),
        "not_after": cert.not_after.isoformat(),
    }
    try:
        extension = pck_extension(cert)
    except SoftTdxError:
        return found
    values = {name: value.hex() if isinstance(value, bytes) else value for name, value in vars(extension).items()}
    return found | {"sgx_extension": values}


def _der(data: bytes) -> dict[str, object]:
    try:
        return {"kind": "certificate", **_certificate(Cert(data))}
    except SoftTdxError:
        return _crl(Crl(data, "CRL").x509)


def _crl(crl: x509.CertificateRevocationList) -> dict[str, object]:
    try:
        return {
            "kind": "CRL",
            "issuer": crl.issuer.rfc4514_string(),
            "this_update": crl.last_update_utc.isoformat(),
            "next_update": crl.next_update_utc.isoformat() if crl.next_update_utc else None,
            "revoked": [f"{entry.serial_number:x}" for entry in crl],
        }
    except Exception as error:  # the parts of a CRL are read only now, and fail in a dozen ways
        raise MalformedError(f"the CRL cannot be read: {error}") from None


def _json(data: bytes) -> dict[str, object]:
    try:
        text = data.decode()
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"this begins like JSON, but is not: {error}") from None
    if "tcbInfo" in value:
        TcbInfo.parse(json.dumps(value["tcbInfo"]))
        return {"kind": "TCB info", **value}
    if "enclaveIdentity" in value:
        EnclaveIdentity.parse(json.dumps(value["enclaveIdentity"]))
        return {"kind": "QE identity", **value}
    collateral = Collateral.from_json(text)
    return {
        "kind": "collateral",
        "tcb_info": json.loads(collateral.tcb_info),
        "qe_identity": json.loads(collateral.qe_identity),
        "tcb_info_issuer_chain": _certificates(collateral.tcb_info_issuer_chain.encode()),
        "pck_crl_issuer_chain": _certificates(collateral.pck_crl_issuer_chain.encode()),
        "root_ca_crl": _der(collateral.root_ca_crl),
        "pck_crl": _der(collateral.pck_crl),
    }
