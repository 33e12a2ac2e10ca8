"""The SGX extension of a PCK certificate (OID 1.2.840.113741.1.13.1): built and read as DER.

Intel "SGX PCK Certificate and CRL Profile Specification", section "Intel SGX PCK certificate extensions".
"""

from __future__ import annotations

from dataclasses import dataclass

from softtdx.attest import der
from softtdx.attest.errors import MalformedError

__all__ = ["CONFIGURATION_FLAGS", "SGX_EXTENSION_OID", "PckExtension"]

SGX_EXTENSION_OID = "1.2.840.113741.1.13.1"
BASE = bytes.fromhex("2a864886f84d010d01")
PPID, TCB, PCEID, FMSPC, SGX_TYPE, INSTANCE, CONFIGURATION = (bytes([n]) for n in range(1, 8))
PCESVN, CPUSVN = b"\x11", b"\x12"
COMPONENT_OIDS = tuple(BASE + TCB + bytes([n]) for n in range(1, 17))
CONFIGURATION_FLAGS = ("dynamic_platform", "cached_keys", "smt_enabled")

TRUE = b"\xff"

Table = dict[bytes, bytes]


def _entry(suffix: bytes, value: bytes) -> bytes:
    return der.tlv(der.SEQUENCE, der.tlv(der.OID, BASE + suffix) + value)


def _lookup(value: bytes) -> Table:
    """Values of SEQUENCE { OID, value } by OID; the first of a name counts, as for the verifiers in use."""
    found: Table = {}
    end = 0
    while end < len(value):
        tag, at, end = der.element(value, end)
        oid_tag, oid_at, oid_end = der.element(value, at)
        _, start, stop = der.element(value, oid_end)
        if tag != der.SEQUENCE or oid_tag != der.OID or stop > end:
            raise MalformedError("the SGX extension has an entry that is no SEQUENCE of OID and value")
        found.setdefault(value[oid_at:oid_end], value[start:stop])
    return found


@dataclass(frozen=True)
class PckExtension:
    """What a PCK certificate says of its platform.

    `cpu_svn` is given twice in the extension: as 16 components and as a string; `components` are the former.
    The last four are only in certificates of a platform CA (multi-package platforms).
    """

    ppid: bytes
    cpu_svn: bytes
    pce_svn: int
    pce_id: bytes
    fmspc: bytes
    sgx_type: int = 1
    components: bytes = b""
    platform_instance_id: bytes | None = None
    dynamic_platform: bool | None = None
    cached_keys: bool | None = None
    smt_enabled: bool | None = None

    def to_der(self) -> bytes:
        """The extension's value."""
        components = self.components or self.cpu_svn
        tcb = b"".join(_entry(TCB + bytes([n + 1]), der.integer(svn)) for n, svn in enumerate(components))
        tcb += _entry(TCB + PCESVN, der.integer(self.pce_svn))
        tcb += _entry(TCB + CPUSVN, der.tlv(der.OCTETS, self.cpu_svn))
        out = _entry(PPID, der.tlv(der.OCTETS, self.ppid)) + _entry(TCB, der.tlv(der.SEQUENCE, tcb))
        out += _entry(PCEID, der.tlv(der.OCTETS, self.pce_id)) + _entry(FMSPC, der.tlv(der.OCTETS, self.fmspc))
        out += _entry(SGX_TYPE, der.tlv(der.ENUMERATED, bytes([self.sgx_type])))
        if self.platform_instance_id is not None:
            out += _entry(INSTANCE, der.tlv(der.OCTETS, self.platform_instance_id))
            flags = b"".join(
                _entry(CONFIGURATION + bytes([n + 1]), der.tlv(der.BOOLEAN, TRUE if getattr(self, name) else b"\0"))
                for n, name in enumerate(CONFIGURATION_FLAGS)
            )
            out += _entry(CONFIGURATION, der.tlv(der.SEQUENCE, flags))
        return der.tlv(der.SEQUENCE, out)

    @classmethod
    def from_der(cls, data: bytes) -> PckExtension:
        """Reads the extension's value; raises `MalformedError` when a required entry is missing or odd."""
        tag, start, end = der.element(data)
        if tag != der.SEQUENCE or end != len(data):
            raise MalformedError("the SGX extension is not one DER SEQUENCE")
        top = _lookup(data[start:])
        tcb = _lookup(_need(top, TCB, "TCB"))
        config = _lookup(top[BASE + CONFIGURATION]) if BASE + CONFIGURATION in top else {}
        flags = {
            name: _boolean(config[oid], name)
            for n, name in enumerate(CONFIGURATION_FLAGS)
            if (oid := BASE + CONFIGURATION + bytes([n + 1])) in config
        }
        sgx_type = _need(top, SGX_TYPE, "SGX type")
        if len(sgx_type) not in (1, 2):
            raise MalformedError(f"the SGX extension's SGX type is {len(sgx_type)} bytes")
        return cls(
            ppid=_need(top, PPID, "PPID"),
            cpu_svn=_need(tcb, TCB + CPUSVN, "CPUSVN", 16),
            pce_svn=_small(_need(tcb, TCB + PCESVN, "PCESVN"), "PCESVN", 2),
            pce_id=_need(top, PCEID, "PCEID"),
            fmspc=_need(top, FMSPC, "FMSPC", 6),
            sgx_type=int.from_bytes(sgx_type, "big"),
            components=_components(tcb),
            platform_instance_id=top.get(BASE + INSTANCE),
            **flags,
        )


def _components(tcb: Table) -> bytes:
    try:
        return bytes([int.from_bytes(tcb[oid], "big") for oid in COMPONENT_OIDS])
    except (KeyError, ValueError):
        raise MalformedError("the SGX extension lacks one of its 16 SVN components, or one is over 255") from None


def _need(table: Table, suffix: bytes, name: str, size: int | None = None) -> bytes:
    if BASE + suffix not in table:
        raise MalformedError(f"the PCK certificate's SGX extension has no {name}")
    value = table[BASE + suffix]
    if size is not None and len(value) != size:
        raise MalformedError(f"the SGX extension's {name} is {len(value)} bytes, not {size}")
    return value


def _small(value: bytes, name: str, size: int) -> int:
    number = int.from_bytes(value, "big")
    if not value or number >> (8 * size):
        raise MalformedError(f"the SGX extension's {name} is {value.hex() or 'empty'}, not {size} byte(s)")
    return number


def _boolean(value: bytes, name: str) -> bool:
    if len(value) != 1:
        raise MalformedError(f"the SGX extension's {name} is {len(value)} bytes, not a BOOLEAN")
    return value != b"\0"
