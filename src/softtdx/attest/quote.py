"""DCAP quotes of TDs, versions 4 and 5: parse, build, serialise.

Layouts: Intel "TDX DCAP Quoting Library API", appendix "Quote format", and the header `sgx_quote_5.h` for
bodies of type 4. All integers little endian. What follows the signature data is kept as `trailer`: a quote
fetched from a fixed buffer has zeroes there, and no signature covers them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from softtdx.attest.errors import MalformedError
from softtdx.attest.tdreport import TdReport, attribute_names
from softtdx.attest.wire import Layout, Reader, raw, uint, zero

__all__ = [
    "ATTESTATION_KEY_ECDSA_P256",
    "CERTIFICATION_PCK_CHAIN",
    "CERTIFICATION_QE_REPORT",
    "INTEL_QE_VENDOR_ID",
    "TEE_TYPE_TDX",
    "BodyType",
    "EnclaveReport",
    "Quote",
    "QuoteHeader",
    "SignatureData",
    "TdBody10",
    "TdBody15",
    "TdBody15Ex",
    "body_of_report",
]

INTEL_QE_VENDOR_ID = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
TEE_TYPE_TDX = 0x81
ATTESTATION_KEY_ECDSA_P256 = 2
CERTIFICATION_PCK_CHAIN = 5
CERTIFICATION_QE_REPORT = 6
QUOTE_VERSIONS = (4, 5)
MAX_VARIABLE = 1 << 20
"""No variable-length part of a quote is longer than this: a length field beyond it is a lie."""


class BodyType(IntEnum):
    """What a version 5 quote's body is."""

    TD10 = 2
    TD15 = 3
    TD15_EX = 4


@dataclass(frozen=True)
class QuoteHeader(Layout):
    """The 48 bytes at the head of a quote."""

    version: int = uint(2, 4)
    attestation_key_type: int = uint(2, ATTESTATION_KEY_ECDSA_P256)
    tee_type: int = uint(4, TEE_TYPE_TDX)
    qe_svn: int = uint(2)
    pce_svn: int = uint(2)
    qe_vendor_id: bytes = raw(16)
    user_data: bytes = raw(20)


@dataclass(frozen=True)
class TdBody10(Layout):
    """The body of a version 4 quote, and of body type 2: 584 bytes."""

    tee_tcb_svn: bytes = raw(16)
    mr_seam: bytes = raw(48)
    mr_signer_seam: bytes = raw(48)
    seam_attributes: bytes = raw(8)
    td_attributes: int = uint(8)
    xfam: int = uint(8)
    mr_td: bytes = raw(48)
    mr_config_id: bytes = raw(48)
    mr_owner: bytes = raw(48)
    mr_owner_config: bytes = raw(48)
    rtmr0: bytes = raw(48)
    rtmr1: bytes = raw(48)
    rtmr2: bytes = raw(48)
    rtmr3: bytes = raw(48)
    report_data: bytes = raw(64)

    @property
    def rtmrs(self) -> tuple[bytes, bytes, bytes, bytes]:
        """RTMR0 to RTMR3."""
        return self.rtmr0, self.rtmr1, self.rtmr2, self.rtmr3


@dataclass(frozen=True)
class TdBody15(TdBody10):
    """Body type 3, TDX 1.5: 648 bytes."""

    tee_tcb_svn2: bytes = raw(16)
    mr_service_td: bytes = raw(48)


@dataclass(frozen=True)
class TdBody15Ex(TdBody15):
    """Body type 4: 885 bytes. After MRSERVICETD come the VM, the TD's origin and its service TDs."""

    vm_id: int = uint(1)
    td_id: bytes = raw(32)
    dev_info: bytes = raw(48)
    init_service_td_hash: bytes = raw(48)
    init_service_td_attributes: bytes = raw(8)
    init_cpu_svn: bytes = raw(16)
    init_tee_tcb_svn: bytes = raw(16)
    init_tee_fmspc: bytes = raw(12)
    cur_service_td_hash: bytes = raw(48)
    cur_service_td_attributes: bytes = raw(8)


BODIES: dict[BodyType, type[TdBody10]] = {
    BodyType.TD10: TdBody10,
    BodyType.TD15: TdBody15,
    BodyType.TD15_EX: TdBody15Ex,
}


@dataclass(frozen=True)
class EnclaveReport(Layout):
    """An SGX REPORT body, 384 bytes: here always the quoting enclave's own."""

    cpu_svn: bytes = raw(16)
    misc_select: int = uint(4)
    reserved1: bytes = zero(28)
    attributes: bytes = raw(16)
    mr_enclave: bytes = raw(32)
    reserved2: bytes = zero(32)
    mr_signer: bytes = raw(32)
    reserved3: bytes = zero(96)
    isv_prod_id: int = uint(2)
    isv_svn: int = uint(2)
    reserved4: bytes = zero(60)
    report_data: bytes = raw(64)


@dataclass(frozen=True)
class SignatureData:
    """What proves a quote: the signature, the key that made it, and the chain of proof for that key.

    `qe_report` binds the attestation key (its report data is SHA-256 of the key and `auth_data`); the PCK
    certificate's key signs it. `chain` is the PCK chain in PEM, leaf first.
    """

    signature: bytes
    attestation_key: bytes
    qe_report: EnclaveReport
    qe_report_signature: bytes
    auth_data: bytes
    chain: bytes
    chain_type: int = CERTIFICATION_PCK_CHAIN
    slack: bytes = b""
    """Bytes inside the outer certification data that follow the chain; none in a well-made quote."""
    certification_type: int = CERTIFICATION_QE_REPORT
    outer_slack: bytes = b""
    """Bytes of the signature data that follow the certification data; none in a well-made quote."""

    @classmethod
    def parse(cls, data: bytes) -> SignatureData:
        """Reads the signature data of a version 4 or 5 quote with certification data of type 6."""
        outer = Reader(data, "signature data")
        signature, key = outer.take(64, "signature"), outer.take(64, "attestation key")
        outer_type = outer.uint(2, "certification data type")
        if outer_type != CERTIFICATION_QE_REPORT:
            raise MalformedError(f"certification data of type {outer_type}; a TD quote has type 6")
        size = _length(outer, 4, "certification data")
        inner = Reader(outer.take(size, "certification data"), "certification data")
        report = EnclaveReport.parse(inner.take(EnclaveReport.size(), "QE report"))
        report_signature = inner.take(64, "QE report signature")
        auth = inner.take(_length(inner, 2, "auth data"), "auth data")
        chain_type = inner.uint(2, "PCK certification data type")
        chain = inner.take(_length(inner, 4, "PCK certification data"), "PCK certification data")
        return cls(
            signature,
            key,
            report,
            report_signature,
            auth,
            chain,
            chain_type,
            inner.take(inner.left(), "slack"),
            outer_type,
            outer.take(outer.left(), "slack"),
        )

    def to_bytes(self) -> bytes:
        """The signature data without its length."""
        inner = b"".join(
            (
                self.qe_report.to_bytes(),
                self.qe_report_signature,
                len(self.auth_data).to_bytes(2, "little"),
                self.auth_data,
                self.chain_type.to_bytes(2, "little"),
                len(self.chain).to_bytes(4, "little"),
                self.chain,
                self.slack,
            )
        )
        head = self.certification_type.to_bytes(2, "little") + len(inner).to_bytes(4, "little")
        return self.signature + self.attestation_key + head + inner + self.outer_slack


def _length(reader: Reader, size: int, what: str) -> int:
    value = reader.uint(size, f"length of {what}")
    if value > MAX_VARIABLE:
        raise MalformedError(f"{what} claims {value} bytes; nothing in a quote is longer than {MAX_VARIABLE}")
    return value


@dataclass(frozen=True)
class Quote:
    """A quote: header, body, signature data. `signed_bytes` is what the attestation key signs."""

    header: QuoteHeader
    body: TdBody10
    signature: SignatureData
    trailer: bytes = b""

    @property
    def body_type(self) -> BodyType:
        """The body's type in version 5 terms (a version 4 body is type 2)."""
        return next(kind for kind, cls in BODIES.items() if type(self.body) is cls)

    @classmethod
    def parse(cls, data: bytes) -> Quote:
        """Reads a quote; raises `MalformedError` if it is not a TD quote of version 4 or 5."""
        reader = Reader(data, "quote")
        header = QuoteHeader.parse(reader.take(QuoteHeader.size(), "header"))
        if header.version not in QUOTE_VERSIONS:
            raise MalformedError(f"quote version {header.version}; TD quotes are of version 4 or 5")
        if header.tee_type != TEE_TYPE_TDX:
            raise MalformedError(f"TEE type {header.tee_type:#x}; this reads quotes of TDs (0x81)")
        body = _parse_body(reader, header.version)
        signature = reader.take(_length(reader, 4, "signature data"), "signature data")
        return cls(header, body, SignatureData.parse(signature), reader.take(reader.left(), "trailer"))

    def signed_bytes(self) -> bytes:
        """Header, body descriptor (version 5) and body."""
        return signed_bytes(self.header, self.body)

    def to_bytes(self) -> bytes:
        """The quote as it is sent."""
        signature = self.signature.to_bytes()
        return self.signed_bytes() + len(signature).to_bytes(4, "little") + signature + self.trailer

    def describe(self) -> dict[str, object]:
        """Every field, decoded, for `softtdx inspect`."""
        sig = self.signature
        return {
            "kind": "quote",
            "header": self.header.describe(),
            "body_type": self.body_type.name,
            "body": {**self.body.describe(), "td_attribute_names": attribute_names(self.body.td_attributes)},
            "signature": {
                "signature": sig.signature.hex(),
                "attestation_key": sig.attestation_key.hex(),
                "qe_report": sig.qe_report.describe(),
                "qe_report_signature": sig.qe_report_signature.hex(),
                "auth_data": sig.auth_data.hex(),
                "certification_type": sig.chain_type,
                "certification_bytes": len(sig.chain),
            },
            "trailing_bytes": len(self.trailer),
        }


def _parse_body(reader: Reader, version: int) -> TdBody10:
    if version == QUOTE_VERSIONS[0]:
        return TdBody10.parse(reader.take(TdBody10.size(), "TD report body"))
    number, size = reader.uint(2, "body type"), reader.uint(4, "body size")
    if number not in list(BodyType):
        raise MalformedError(f"body type {number}; TD bodies are 2 (TDX 1.0), 3 (1.5) and 4 (1.5 extended)")
    kind = BODIES[BodyType(number)]
    if size != kind.size():
        raise MalformedError(f"a body of type {number} is {kind.size()} bytes, the quote says {size}")
    return kind.parse(reader.take(size, "TD report body"))


def signed_bytes(header: QuoteHeader, body: TdBody10) -> bytes:
    """What the attestation key signs: the header, in version 5 the body's type and size, and the body."""
    descriptor = b""
    if header.version == QUOTE_VERSIONS[1]:
        kind = next(kind for kind, cls in BODIES.items() if type(body) is cls)
        descriptor = kind.to_bytes(2, "little") + type(body).size().to_bytes(4, "little")
    return header.to_bytes() + descriptor + body.to_bytes()


def body_of_report(report: TdReport, kind: BodyType) -> TdBody10:
    """The quote body that says what the TDREPORT says."""
    tcb, td = report.tee_tcb_info, report.td_info
    base = TdBody10(
        tee_tcb_svn=tcb.tee_tcb_svn,
        mr_seam=tcb.mrseam,
        mr_signer_seam=tcb.mrsignerseam,
        seam_attributes=tcb.attributes.to_bytes(8, "little"),
        td_attributes=td.attributes,
        xfam=td.xfam,
        mr_td=td.mrtd,
        mr_config_id=td.mrconfigid,
        mr_owner=td.mrowner,
        mr_owner_config=td.mrownerconfig,
        rtmr0=td.rtmr0,
        rtmr1=td.rtmr1,
        rtmr2=td.rtmr2,
        rtmr3=td.rtmr3,
        report_data=report.report_mac.report_data,
    )
    if kind is BodyType.TD10:
        return base
    later = TdBody15(**vars(base), tee_tcb_svn2=tcb.tee_tcb_svn2, mr_service_td=td.servtd_hash)
    return later if kind is BodyType.TD15 else TdBody15Ex(**vars(later))
