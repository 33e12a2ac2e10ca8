"""TDREPORT_STRUCT: what TDG.MR.REPORT gives a TD, and what the quoting enclave turns into a quote.

Layouts: Intel TDX Module ABI specification, "TDREPORT_STRUCT", "REPORTMACSTRUCT", "TEE_TCB_INFO",
"TDINFO_STRUCT".
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import ClassVar

from softtdx.attest.errors import MalformedError
from softtdx.attest.wire import Layout, raw, uint, zero

__all__ = [
    "ATTRIBUTE_BITS",
    "REPORT_TYPE_TDX",
    "ReportMac",
    "TdInfo",
    "TdReport",
    "TeeTcbInfo",
    "attribute_names",
]

REPORT_TYPE_TDX = 0x81
"""REPORTTYPE.TYPE of a report whose subject is a TD."""

TEE_TCB_INFO_END = 256 + 239

ATTRIBUTE_BITS = {
    0: "DEBUG",
    4: "HGS_PLUS_PROF",
    5: "PERF_PROF",
    6: "PMT_PROF",
    16: "ICSSD",
    17: "SERVTD_EXT",
    27: "LASS",
    28: "SEPT_VE_DISABLE",
    29: "MIGRATABLE",
    30: "PKS",
    31: "KL",
    62: "TPA",
    63: "PERFMON",
}
"""TD ATTRIBUTES by bit (TDX Module ABI specification, "ATTRIBUTES")."""


def attribute_names(attributes: int) -> list[str]:
    """The names of the bits set, an unnamed one as `bit N`."""
    return [ATTRIBUTE_BITS.get(bit, f"bit {bit}") for bit in range(64) if attributes >> bit & 1]


@dataclass(frozen=True)
class ReportMac(Layout):
    """REPORTMACSTRUCT: the head of a TDREPORT, and the part its MAC protects.

    The MAC, made with the platform's report key, reaches TEE_TCB_INFO and TDINFO through the two hashes.
    """

    report_type: int = uint(1, REPORT_TYPE_TDX)
    report_subtype: int = uint(1)
    report_version: int = uint(1)
    report_type_reserved: bytes = zero(1)
    reserved1: bytes = zero(12)
    cpu_svn: bytes = raw(16)
    tee_tcb_info_hash: bytes = raw(48)
    tee_info_hash: bytes = raw(48)
    report_data: bytes = raw(64)
    reserved2: bytes = zero(32)
    mac: bytes = raw(32)


@dataclass(frozen=True)
class TeeTcbInfo(Layout):
    """TEE_TCB_INFO: which TDX module, of which security version, made the report.

    `valid` says which of the fields are; `tee_tcb_svn2` is the TCB of the module running now, `tee_tcb_svn`
    that of the module which launched the TD.
    """

    valid: int = uint(8)
    tee_tcb_svn: bytes = raw(16)
    mr_seam: bytes = raw(48)
    mr_signer_seam: bytes = raw(48)
    attributes: bytes = raw(8)
    tee_tcb_svn2: bytes = raw(16)
    reserved: bytes = zero(95)


@dataclass(frozen=True)
class TdInfo(Layout):
    """TDINFO_STRUCT: the TD's attributes and measurements. Its SHA-384 is REPORTMACSTRUCT's TEE_INFO_HASH."""

    RTMRS: ClassVar[int] = 4

    attributes: int = uint(8)
    xfam: int = uint(8)
    mr_td: bytes = raw(48)
    mr_config_id: bytes = raw(48)
    mr_owner: bytes = raw(48)
    mr_owner_config: bytes = raw(48)
    rtmr0: bytes = raw(48)
    rtmr1: bytes = raw(48)
    rtmr2: bytes = raw(48)
    rtmr3: bytes = raw(48)
    servtd_hash: bytes = raw(48)
    reserved: bytes = zero(64)

    @property
    def rtmrs(self) -> tuple[bytes, bytes, bytes, bytes]:
        """RTMR0 to RTMR3."""
        return self.rtmr0, self.rtmr1, self.rtmr2, self.rtmr3


@dataclass(frozen=True)
class TdReport:
    """TDREPORT_STRUCT, 1024 bytes: REPORTMACSTRUCT @0, TEE_TCB_INFO @256, 17 reserved, TDINFO @512."""

    SIZE: ClassVar[int] = 1024

    mac: ReportMac = field(default_factory=ReportMac)
    tcb: TeeTcbInfo = field(default_factory=TeeTcbInfo)
    td: TdInfo = field(default_factory=TdInfo)
    reserved: bytes = bytes(17)

    @classmethod
    def parse(cls, data: bytes) -> TdReport:
        """Reads a TDREPORT of exactly 1024 bytes; the MAC is not judged here."""
        if len(data) != cls.SIZE:
            raise MalformedError(f"a TDREPORT is {cls.SIZE} bytes, this is {len(data)}")
        return cls(
            ReportMac.parse(data[:256]),
            TeeTcbInfo.parse(data[256:TEE_TCB_INFO_END]),
            TdInfo.parse(data[512:]),
            bytes(data[TEE_TCB_INFO_END:512]),
        )

    def to_bytes(self) -> bytes:
        """The 1024 bytes as TDG.MR.REPORT writes them."""
        return self.mac.to_bytes() + self.tcb.to_bytes() + self.reserved + self.td.to_bytes()

    def hashes_hold(self) -> bool:
        """Whether TEE_TCB_INFO_HASH and TEE_INFO_HASH are those of the two structures that follow."""
        return (
            self.mac.tee_tcb_info_hash == hashlib.sha384(self.tcb.to_bytes()).digest()
            and self.mac.tee_info_hash == hashlib.sha384(self.td.to_bytes()).digest()
        )

    def describe(self) -> dict[str, object]:
        """Every field, decoded, for `softtdx inspect`."""
        return {
            "kind": "TDREPORT",
            "report_mac": self.mac.describe(),
            "tee_tcb_info": self.tcb.describe(),
            "td_info": {**self.td.describe(), "attribute_names": attribute_names(self.td.attributes)},
            "hashes_hold": self.hashes_hold(),
        }
