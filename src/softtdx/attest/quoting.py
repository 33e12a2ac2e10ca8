"""The TD quoting enclave: turns a TDREPORT of this platform into a quote.

As in hardware, a report is believed only if the platform vouches for its MAC (EVERIFYREPORT2), and its type and the two
hashes that carry the MAC to the measurements are checked. The attestation key is certified once by a QE report that the
PCK key signs.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace

from softtdx.abi.structs import REPORT_TYPE_TDX
from softtdx.attest.errors import QuotingError
from softtdx.attest.keys import public_point, sign_raw
from softtdx.attest.pki import Pki
from softtdx.attest.quote import (
    INTEL_QE_VENDOR_ID,
    BodyType,
    EnclaveReport,
    Quote,
    QuoteHeader,
    SignatureData,
    TdBody15Ex,
    body_of_report,
)
from softtdx.attest.tdreport import TdReport, hashes_hold, parse_tdreport

__all__ = ["QuotingEnclave"]

QUOTE_V4, QUOTE_V5 = 4, 5


class QuotingEnclave:
    """Quotes TDREPORTs of one platform.

    `verify_report` answers whether a REPORTMACSTRUCT (the report's first 256 bytes) carries this platform's MAC: it
    holds the report key, this enclave does not. Safe to use from several threads.
    """

    def __init__(self, pki: Pki, verify_report: Callable[[bytes], bool]) -> None:
        self.pki = pki
        self._verify_report = verify_report
        self._lock = threading.Lock()
        self._certification = self._certify()
        self.quotes = 0

    def _certify(self) -> SignatureData:
        """The signature data without a signature: attestation key, QE report, and the chain."""
        pki = self.pki
        qe, key = pki.options.qe, public_point(pki.keys["attestation"])
        report = EnclaveReport(
            cpu_svn=pki.options.tcb.cpu_svn,
            misc_select=qe.misc_select,
            attributes=qe.attributes,
            mr_enclave=qe.mr_enclave,
            mr_signer=qe.mr_signer,
            isv_prod_id=qe.isv_prod_id,
            isv_svn=qe.isv_svn,
            report_data=hashlib.sha256(key + pki.ids.auth_data).digest() + bytes(32),
        )
        return SignatureData(
            signature=bytes(64),
            attestation_key=key,
            qe_report=report,
            qe_report_signature=sign_raw(pki.keys["pck"], report.to_bytes()),
            auth_data=pki.ids.auth_data,
            chain=pki.pck_chain.encode(),
        )

    def quote(self, tdreport: bytes, *, version: int | None = None, body_type: int | None = None) -> bytes:
        """A quote of the TDREPORT (1024 bytes).

        `version` 4, or 5 with `body_type` 2 (TDX 1.0), 3 (1.5, the default) or 4 (1.5 extended); if None, what Intel's
        enclave makes of such a report: 5 when the TD is bound to service TDs, else 4. Raises `QuotingError` when the
        report is not this platform's, `MalformedError` when it is no TDREPORT.
        """
        report = self.check(tdreport)
        bound = report.report_mac.report_type.version > 0 or any(report.td_info.servtd_hash)
        if version is None:
            version = QUOTE_V5 if bound or body_type not in (None, BodyType.TD10) else QUOTE_V4
        kind = _body_kind(version, body_type)
        if bound and kind is BodyType.TD10:
            raise QuotingError("the TD is bound to service TDs, which a TDX 1.0 body cannot say; ask for a 1.5 body")
        body = body_of_report(report, kind)
        if isinstance(body, TdBody15Ex):
            tcb = self.pki.options.tcb
            body = replace(
                body,
                init_cpu_svn=report.report_mac.cpu_svn,
                init_tee_tcb_svn=report.tee_tcb_info.tee_tcb_svn,
                init_tee_fmspc=tcb.fmspc + bytes(6),
            )
        header = QuoteHeader(version=version, qe_vendor_id=INTEL_QE_VENDOR_ID, user_data=self.pki.ids.qe_id + bytes(4))
        unsigned = Quote(header, body, self._certification)
        signature = sign_raw(self.pki.keys["attestation"], unsigned.signed_bytes())
        with self._lock:
            self.quotes += 1
        return replace(unsigned, signature=replace(self._certification, signature=signature)).to_bytes()

    def check(self, tdreport: bytes) -> TdReport:
        """The TDREPORT, if this platform made it."""
        report = parse_tdreport(tdreport)
        head = report.report_mac
        if head.report_type.type != REPORT_TYPE_TDX:
            raise QuotingError(f"report type {head.report_type.type:#x} is not a TD's ({REPORT_TYPE_TDX:#x})")
        if not self._verify_report(bytes(tdreport[:256])):
            raise QuotingError("the TDREPORT's MAC is not this platform's: it was made elsewhere or changed")
        if not hashes_hold(report):
            raise QuotingError("the TDREPORT's TEE_TCB_INFO or TDINFO is not the one its MAC covers")
        if head.cpu_svn != self.pki.options.tcb.cpu_svn:
            raise QuotingError(
                f"the TDREPORT's CPUSVN {head.cpu_svn.hex()} is not the one the PCK certificate is for "
                f"({self.pki.options.tcb.cpu_svn.hex()}); make the PKI with the platform's cpu_svn"
            )
        return report


def _body_kind(version: int, body_type: int | None) -> BodyType:
    if version == QUOTE_V4:
        if body_type not in (None, BodyType.TD10):
            raise QuotingError(f"a version 4 quote has no body type {body_type}; ask for version 5")
        return BodyType.TD10
    if version != QUOTE_V5:
        raise QuotingError(f"quote version {version} does not exist for TDs; there are 4 and 5")
    if body_type is None:
        return BodyType.TD15
    if body_type not in list(BodyType):
        raise QuotingError(f"body type {body_type} does not exist for TDs; there are 2, 3 and 4")
    return BodyType(body_type)
