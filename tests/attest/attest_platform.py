"""A platform that vouches for TDREPORTs with an HMAC of its own: what the quoting tests report from."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import replace

from softtdx.attest import PlatformTcb, TdReport
from softtdx.attest.tdreport import ReportMac, TdInfo, TeeTcbInfo

NOW = 1_767_225_600
"""2026-01-01, inside the validity of everything a PKI makes by default."""

SEPT_VE_DISABLE = 1 << 28


class ReportingPlatform:
    """Makes TDREPORTs and knows its own again, as the CPU does with its report key."""

    def __init__(self, tcb: PlatformTcb, key: bytes = b"the report key of the test platform") -> None:
        self.tcb = tcb
        self._key = key

    def _mac(self, head: bytes) -> bytes:
        return hmac.new(self._key, head[:224], hashlib.sha256).digest()

    def report(self, td: TdInfo | None = None, report_data: bytes = bytes(64), **tcb_changes: object) -> TdReport:
        tcb = TeeTcbInfo(
            valid=0x301FF,
            tee_tcb_svn=self.tcb.tee_tcb_svn,
            mr_seam=hashlib.sha384(b"module").digest(),
            mr_signer_seam=self.tcb.mr_signer_seam,
            attributes=self.tcb.seam_attributes,
            tee_tcb_svn2=self.tcb.tee_tcb_svn,
        )
        tcb = replace(tcb, **tcb_changes)  # type: ignore[arg-type]
        td = td or TdInfo(attributes=SEPT_VE_DISABLE, xfam=0xE7, mr_td=hashlib.sha384(b"td").digest())
        head = ReportMac(
            cpu_svn=self.tcb.cpu_svn,
            tee_tcb_info_hash=hashlib.sha384(tcb.to_bytes()).digest(),
            tee_info_hash=hashlib.sha384(td.to_bytes()).digest(),
            report_data=report_data,
        )
        return TdReport(replace(head, mac=self._mac(head.to_bytes())), tcb, td)

    def verify(self, head: bytes) -> bool:
        return hmac.compare_digest(self._mac(head), head[224:256])
