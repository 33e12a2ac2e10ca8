"""TCB info and QE identity read, and a platform's versions matched against their levels.

The rules are those of Intel's quote verification library: first level whose every component is met; the TDX module's
own identity judges TEE_TCB_SVN[1:0] when the module has a major version; statuses converge.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from operator import ge, itemgetter
from typing import Any, TypeVar

from softtdx.attest.errors import MalformedError
from softtdx.attest.quote import EnclaveReport, TdBody10
from softtdx.attest.sgx_extension import PckExtension
from softtdx.attest.tcb import TcbStatus, converge

__all__ = [
    "AppraisalError",
    "EnclaveIdentity",
    "Level",
    "ModuleIdentity",
    "TcbInfo",
    "relaunch_advised",
]

T = TypeVar("T")

S = TcbStatus
PLATFORM_STATUSES = frozenset(
    (
        S.UP_TO_DATE,
        S.SW_HARDENING_NEEDED,
        S.CONFIGURATION_NEEDED,
        S.CONFIGURATION_AND_SW_HARDENING_NEEDED,
        S.OUT_OF_DATE,
        S.OUT_OF_DATE_CONFIGURATION_NEEDED,
        S.REVOKED,
    )
)
MODULE_STATUSES = frozenset((S.UP_TO_DATE, S.OUT_OF_DATE, S.REVOKED))
QE_STATUSES = PLATFORM_STATUSES - {S.SW_HARDENING_NEEDED, S.CONFIGURATION_AND_SW_HARDENING_NEEDED}
NEEDS_CONFIGURATION = frozenset(
    (
        S.CONFIGURATION_NEEDED,
        S.OUT_OF_DATE_CONFIGURATION_NEEDED,
        S.CONFIGURATION_AND_SW_HARDENING_NEEDED,
        S.TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED,
    )
)
TDX_TCB_INFO_VERSION = 3
QE_IDENTITY_VERSIONS = (2, 3)
SGX_DEBUG = 0x02
SVN_COUNT = 16
SVN = itemgetter("svn")


class AppraisalError(MalformedError):
    """The platform, its TDX module or its quoting enclave is not what the collateral allows."""


def _read(what: str, text: str, build: Callable[[dict[str, Any]], T]) -> T:
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise AppraisalError(f"the {what} is not a JSON object")
        return build(value)
    except AppraisalError:
        raise
    except KeyError as error:
        raise AppraisalError(f"the {what} has no {error}") from None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise AppraisalError(f"the {what} cannot be read: {error}") from None


def _date(value: Any) -> float:
    when = datetime.fromisoformat(value)
    if when.tzinfo is None:
        raise ValueError(f"the date {value} has no time zone")
    return when.timestamp()


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no number of the kind that belongs here")
    return value


def _hex(value: Any, size: int) -> bytes:
    data = bytes.fromhex(value)
    if len(data) != size:
        raise ValueError(f"{value} is {len(data)} bytes, not {size}")
    return data


@dataclass(frozen=True)
class Level:
    """A TCB level: what it asks for, and what it says of those who meet it."""

    status: TcbStatus
    advisory_ids: tuple[str, ...]
    date: str
    isv_svn: int = 0
    sgx: bytes = b""
    tdx: bytes = b""
    pce_svn: int = 0

    @classmethod
    def read(cls, value: dict[str, Any]) -> Level:
        """From an entry of `tcbLevels`, of any of the three kinds."""
        tcb = value["tcb"]
        _date(value["tcbDate"])
        return cls(
            status=TcbStatus(value["tcbStatus"]),
            advisory_ids=tuple(str(item) for item in value.get("advisoryIDs", ())),
            date=str(value["tcbDate"]),
            isv_svn=_number(tcb.get("isvsvn", 0)),
            sgx=bytes(map(SVN, tcb.get("sgxtcbcomponents", ()))),
            tdx=bytes(map(SVN, tcb.get("tdxtcbcomponents", ()))),
            pce_svn=_number(tcb.get("pcesvn", 0)),
        )

    def met_by(self, pck: PckExtension, tee_tcb_svn: bytes) -> bool:
        """Whether the platform has at least every version the level asks for."""
        if len(self.sgx) != SVN_COUNT or len(self.tdx) != SVN_COUNT:
            raise AppraisalError(f"a TCB level lists {len(self.sgx)} SGX and {len(self.tdx)} TDX components, not 16")
        skip = 2 if tee_tcb_svn[1] else 0
        return (
            pck.pce_svn >= self.pce_svn
            and all(map(ge, pck.cpu_svn, self.sgx))
            and all(map(ge, tee_tcb_svn[skip:], self.tdx[skip:]))
        )

    def checked(self, allowed: frozenset[TcbStatus], what: str) -> Level:
        """The level, if its status is one that such a document may have."""
        if self.status not in allowed:
            raise AppraisalError(f"a {what} cannot say {self.status}")
        return self


@dataclass(frozen=True)
class ModuleIdentity:
    """Who signs a TDX module, and its SEAM attributes."""

    id: str
    mr_signer: bytes
    attributes: bytes
    mask: bytes
    levels: tuple[Level, ...] = ()

    @classmethod
    def read(cls, value: dict[str, Any], name: str | None = None) -> ModuleIdentity:
        """From `tdxModule` (which has no id and no levels) or an entry of `tdxModuleIdentities`."""
        return cls(
            id=value["id"] if name is None else name,
            mr_signer=_hex(value["mrsigner"], 48),
            attributes=_hex(value["attributes"], 8),
            mask=_hex(value["attributesMask"], 8),
            levels=tuple(Level.read(item) for item in value.get("tcbLevels", ())),
        )

    def check(self, body: TdBody10) -> None:
        """Refuse a quote whose TDX module has another signer or other attributes."""
        if body.mr_signer_seam != self.mr_signer:
            raise AppraisalError(f"MRSIGNERSEAM is {body.mr_signer_seam.hex()}, not {self.mr_signer.hex()}")
        for have, want, mask in zip(body.seam_attributes, self.attributes, self.mask, strict=True):
            if have & mask != want & mask or have & ~mask & 0xFF:
                raise AppraisalError(f"SEAM attributes are {body.seam_attributes.hex()}, not {self.attributes.hex()}")


@dataclass(frozen=True)
class TcbInfo:
    """TCB info of TDs, version 3."""

    id: str
    version: int
    issued: float
    next_update: float
    fmspc: bytes
    evaluation_data_number: int
    levels: tuple[Level, ...]
    module: ModuleIdentity | None
    modules: tuple[ModuleIdentity, ...]

    @classmethod
    def parse(cls, text: str) -> TcbInfo:
        """From the signed text. Levels are put in Intel's order, best first, whatever order they come in."""

        def build(value: dict[str, Any]) -> TcbInfo:
            levels = [Level.read(item) for item in value["tcbLevels"]]
            levels.sort(key=lambda level: (level.sgx, level.pce_svn, level.tdx), reverse=True)
            module = value.get("tdxModule")
            return cls(
                id=value["id"],
                version=_number(value["version"]),
                issued=_date(value["issueDate"]),
                next_update=_date(value["nextUpdate"]),
                fmspc=_hex(value["fmspc"], 6),
                evaluation_data_number=_number(value["tcbEvaluationDataNumber"]),
                levels=tuple(levels),
                module=None if module is None else ModuleIdentity.read(module, ""),
                modules=tuple(ModuleIdentity.read(item) for item in value.get("tdxModuleIdentities", ())),
            )

        return _read("TCB info", text, build)

    def check_kind(self) -> None:
        """Refuse TCB info that is not for TDs."""
        if self.id != "TDX" or self.version < TDX_TCB_INFO_VERSION:
            raise AppraisalError(f"the TCB info is {self.id} version {self.version}; a TD needs TDX version 3")

    def module_identity(self, tee_tcb_svn: bytes) -> ModuleIdentity | None:
        """The identity for the module's major version, TEE_TCB_SVN[1]; None for modules of TDX 1.0."""
        if not tee_tcb_svn[1]:
            return None
        wanted = f"TDX_{tee_tcb_svn[1]:02X}"
        for identity in self.modules:
            if identity.id.upper() == wanted:
                return identity
        raise AppraisalError(f"the TCB info knows no TDX module {wanted}")

    def check_module(self, body: TdBody10) -> ModuleIdentity:
        """Refuse a quote whose TDX module is not signed as the TCB info says."""
        if self.module is None:
            raise AppraisalError("the TCB info has no tdxModule")
        identity = self.module_identity(body.tee_tcb_svn) or self.module
        identity.check(body)
        return identity

    def evaluate(self, pck: PckExtension, tee_tcb_svn: bytes) -> Level:
        """The level that the platform meets, converged with its TDX module's."""
        for level in self.levels:
            if level.met_by(pck, tee_tcb_svn):
                return self._with_module(level.checked(PLATFORM_STATUSES, "TCB level"), tee_tcb_svn)
        raise AppraisalError(
            f"no TCB level matches: CPUSVN {pck.cpu_svn.hex()}, PCESVN {pck.pce_svn}, "
            f"TEE_TCB_SVN {tee_tcb_svn.hex()} are below the lowest"
        )

    def _with_module(self, level: Level, tee_tcb_svn: bytes) -> Level:
        identity = self.module_identity(tee_tcb_svn)
        if identity is None:
            return level
        for found in identity.levels:
            if tee_tcb_svn[0] >= found.isv_svn:
                found.checked(MODULE_STATUSES, "TDX module level")
                return replace(
                    level,
                    status=converge(level.status, found.status),
                    advisory_ids=_union(level.advisory_ids, found.advisory_ids),
                    date=min(level.date, found.date, key=_date),
                )
        raise AppraisalError(f"the TDX module's ISVSVN {tee_tcb_svn[0]} is below the lowest that {identity.id} has")


@dataclass(frozen=True)
class EnclaveIdentity:
    """The QE identity: what a TD quoting enclave must be."""

    id: str
    version: int
    issued: float
    next_update: float
    evaluation_data_number: int
    misc_select: int
    misc_select_mask: int
    attributes: bytes
    attributes_mask: bytes
    mr_signer: bytes
    isv_prod_id: int
    levels: tuple[Level, ...]

    @classmethod
    def parse(cls, text: str) -> EnclaveIdentity:
        """From the signed text."""

        def build(value: dict[str, Any]) -> EnclaveIdentity:
            return cls(
                id=value["id"],
                version=_number(value["version"]),
                issued=_date(value["issueDate"]),
                next_update=_date(value["nextUpdate"]),
                evaluation_data_number=_number(value["tcbEvaluationDataNumber"]),
                misc_select=int.from_bytes(_hex(value["miscselect"], 4), "little"),
                misc_select_mask=int.from_bytes(_hex(value["miscselectMask"], 4), "little"),
                attributes=_hex(value["attributes"], 16),
                attributes_mask=_hex(value["attributesMask"], 16),
                mr_signer=_hex(value["mrsigner"], 32),
                isv_prod_id=_number(value["isvprodid"]),
                levels=tuple(Level.read(item) for item in value["tcbLevels"]),
            )

        return _read("QE identity", text, build)

    def check_kind(self) -> None:
        """Refuse an identity that is not the TD quoting enclave's."""
        if self.id != "TD_QE" or self.version not in QE_IDENTITY_VERSIONS:
            raise AppraisalError(f"the QE identity is {self.id} version {self.version}; a TD needs TD_QE version 2")

    def evaluate(self, report: EnclaveReport) -> Level:
        """The level that the quoting enclave meets; refuses one that is not the enclave described."""
        if report.mr_signer != self.mr_signer:
            raise AppraisalError(f"the QE's MRSIGNER is {report.mr_signer.hex()}, not {self.mr_signer.hex()}")
        if report.attributes[0] & SGX_DEBUG:
            raise AppraisalError("the QE is a debug enclave")
        if report.isv_prod_id != self.isv_prod_id:
            raise AppraisalError(f"the QE's ISVPRODID is {report.isv_prod_id}, not {self.isv_prod_id}")
        if (report.misc_select ^ self.misc_select) & self.misc_select_mask:
            raise AppraisalError(f"the QE's MISCSELECT is {report.misc_select:#010x}, not {self.misc_select:#010x}")
        for have, want, mask in zip(report.attributes, self.attributes, self.attributes_mask, strict=True):
            if (have ^ want) & mask:
                raise AppraisalError(f"the QE's attributes are {report.attributes.hex()}, not {self.attributes.hex()}")
        for level in self.levels:
            if report.isv_svn >= level.isv_svn:
                return level.checked(QE_STATUSES, "QE level")
        raise AppraisalError(f"the QE's ISVSVN {report.isv_svn} is below the lowest in its identity")


def relaunch_advised(launch: TcbStatus, current: TcbStatus) -> TcbStatus:
    """The status of a TD launched under one TCB that now runs under another (a TD-preserving update)."""
    if launch not in (S.OUT_OF_DATE, S.OUT_OF_DATE_CONFIGURATION_NEEDED):
        return launch
    if current in (S.OUT_OF_DATE, S.OUT_OF_DATE_CONFIGURATION_NEEDED, S.REVOKED):
        return launch
    if launch in NEEDS_CONFIGURATION or current in NEEDS_CONFIGURATION:
        return S.TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED
    return S.TD_RELAUNCH_ADVISED


def _union(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return first + tuple(item for item in dict.fromkeys(second) if item not in first)
