"""A platform that vouches for TDREPORTs with an HMAC of its own: what the quoting tests report from."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

from softtdx.abi.structs import REPORT_TYPE_TDX, TEE_TCB_INFO_VALID, Attributes, TdReport
from softtdx.attest import PlatformTcb

NOW = 1_767_225_600
"""2026-01-01, inside the validity of everything a PKI makes by default."""


class ReportingPlatform:
    """Makes TDREPORTs and knows its own again, as the CPU does with its report key."""

    def __init__(self, tcb: PlatformTcb, key: bytes = b"the report key of the test platform") -> None:
        self.tcb = tcb
        self._key = key

    def _mac(self, head: bytes) -> bytes:
        return hmac.new(self._key, head[:224], hashlib.sha256).digest()

    def report(self, report_data: bytes = bytes(64), *, tcb: Mapping[str, Any] | None = None, **td: Any) -> bytes:
        """A TDREPORT; `td` are fields of TDINFO_STRUCT, `tcb` of TEE_TCB_INFO, where they are not the usual ones."""
        report = TdReport()
        usual = {
            "valid": TEE_TCB_INFO_VALID,
            "tee_tcb_svn": self.tcb.tee_tcb_svn,
            "mrseam": hashlib.sha384(b"module").digest(),
            "mrsignerseam": self.tcb.mr_signer_seam,
            "attributes": int.from_bytes(self.tcb.seam_attributes, "little"),
            "tee_tcb_svn2": self.tcb.tee_tcb_svn,
        }
        for name, value in {**usual, **(tcb or {})}.items():
            setattr(report.tee_tcb_info, name, value)
        td = {"attributes": Attributes.SEPT_VE_DISABLE, "xfam": 0xE7, "mrtd": hashlib.sha384(b"td").digest()} | td
        for name, value in td.items():
            setattr(report.td_info, name, value)
        head = report.report_mac
        head.report_type.type = REPORT_TYPE_TDX
        head.cpu_svn = self.tcb.cpu_svn
        head.tee_tcb_info_hash = hashlib.sha384(report.tee_tcb_info.view).digest()
        head.tee_info_hash = hashlib.sha384(report.td_info.view).digest()
        head.report_data = report_data
        head.mac = self._mac(bytes(head))
        return bytes(report)

    def verify(self, head: bytes) -> bool:
        return hmac.compare_digest(self._mac(head), head[224:256])
