"""TCB info and QE identity: the signed JSON that says which security versions are good.

Intel PCS API version 4: `/tdx/certification/v4/tcb` (TCB info version 3, id "TDX") and
`/tdx/certification/v4/qe/identity` (id "TD_QE", version 2).
A signature covers the object's exact text, so text is built once and never re-serialised.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

__all__ = [
    "PlatformTcb",
    "QeIdentityValues",
    "TcbStatus",
    "TcbVariation",
    "converge",
    "qe_identity_text",
    "tcb_info_text",
]

SVN_COUNT = 16
SGX_COMPONENTS = {
    0: ("BIOS", "Early Microcode Update"),
    1: ("OS/VMM", "SGX Late Microcode Update"),
    2: ("OS/VMM", "TXT SINIT"),
    3: ("BIOS", ""),
    4: ("BIOS", ""),
    5: ("BIOS", ""),
    7: ("OS/VMM", "SEAMLDR ACM"),
}
TDX_COMPONENTS = {
    0: ("OS/VMM", "TDX Module"),
    1: ("OS/VMM", "TDX Module"),
    2: ("OS/VMM", "TDX Late Microcode Update"),
}
OLD_DATE = "2018-01-04T00:00:00Z"


class TcbStatus(StrEnum):
    """What TCB info or an identity says of a level, and what a verification concludes."""

    UP_TO_DATE = "UpToDate"
    SW_HARDENING_NEEDED = "SWHardeningNeeded"
    CONFIGURATION_NEEDED = "ConfigurationNeeded"
    CONFIGURATION_AND_SW_HARDENING_NEEDED = "ConfigurationAndSWHardeningNeeded"
    OUT_OF_DATE = "OutOfDate"
    OUT_OF_DATE_CONFIGURATION_NEEDED = "OutOfDateConfigurationNeeded"
    REVOKED = "Revoked"
    TD_RELAUNCH_ADVISED = "TDRelaunchAdvised"
    TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED = "TDRelaunchAdvisedConfigurationNeeded"


def converge(platform: TcbStatus, component: TcbStatus) -> TcbStatus:
    """A platform's status together with that of its TDX module or quoting enclave."""
    if component is TcbStatus.REVOKED:
        return TcbStatus.REVOKED
    if component is TcbStatus.OUT_OF_DATE:
        if platform in (TcbStatus.UP_TO_DATE, TcbStatus.SW_HARDENING_NEEDED):
            return TcbStatus.OUT_OF_DATE
        if platform in (TcbStatus.CONFIGURATION_NEEDED, TcbStatus.CONFIGURATION_AND_SW_HARDENING_NEEDED):
            return TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED
    return platform


@dataclass(frozen=True)
class PlatformTcb:
    """The security versions of the simulated platform, which its TDREPORTs must agree with.

    The defaults are those of the platform that is simulated when nothing else is asked for.
    `tee_tcb_svn`: byte 0 the TDX module's ISVSVN, byte 1 its major version, byte 2 the late microcode's SVN.
    """

    cpu_svn: bytes = bytes(range(1, 17))
    pce_svn: int = 11
    tee_tcb_svn: bytes = bytes([5, 1]) + bytes(14)
    mr_signer_seam: bytes = bytes(48)
    seam_attributes: bytes = bytes(8)
    fmspc: bytes = bytes.fromhex("50806f000000")
    pce_id: bytes = bytes(2)


@dataclass(frozen=True)
class QeIdentityValues:
    """What the TD quoting enclave is: its QE report says this, and the QE identity allows it."""

    mr_signer: bytes
    mr_enclave: bytes
    isv_prod_id: int = 2
    isv_svn: int = 4
    misc_select: int = 0
    attributes: bytes = bytes.fromhex("1500000000000000e700000000000000")


@dataclass(frozen=True)
class TcbVariation:
    """How the collateral judges this platform, so that a user sees his verifier react to every verdict.

    `status` is the platform level's, `module_status` the TDX module identity's, `qe_status` the QE's. With
    `no_match` every level asks for more than the platform has.
    """

    status: TcbStatus = TcbStatus.UP_TO_DATE
    module_status: TcbStatus = TcbStatus.UP_TO_DATE
    qe_status: TcbStatus = TcbStatus.UP_TO_DATE
    advisory_ids: tuple[str, ...] = ()
    module_advisory_ids: tuple[str, ...] = ()
    qe_advisory_ids: tuple[str, ...] = ()
    no_match: bool = False
    evaluation_data_number: int = 17


def timestamp(when: datetime) -> str:
    """ISO 8601 in UTC with seconds, as the PCS writes it."""
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def _components(svns: bytes, names: dict[int, tuple[str, str]]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for index, svn in enumerate(svns):
        entry: dict[str, Any] = {"svn": svn}
        category, kind = names.get(index, ("", ""))
        if category:
            entry["category"] = category
        if kind:
            entry["type"] = kind
        out.append(entry)
    return out


def _level(tcb: dict[str, Any], date: str, status: TcbStatus, advisories: tuple[str, ...]) -> dict[str, Any]:
    level: dict[str, Any] = {"tcb": tcb, "tcbDate": date, "tcbStatus": str(status)}
    if advisories:
        level["advisoryIDs"] = list(advisories)
    return level


def _platform_levels(tcb: PlatformTcb, vary: TcbVariation, date: str) -> list[dict[str, Any]]:
    """The levels, best first: if the platform is not up to date, one above it is, as in real TCB info."""

    def needs(cpu: bytes, pce: int, tee: bytes) -> dict[str, Any]:
        return {
            "sgxtcbcomponents": _components(cpu, SGX_COMPONENTS),
            "pcesvn": pce,
            "tdxtcbcomponents": _components(tee, TDX_COMPONENTS),
        }

    levels = []
    above = needs(_raised(tcb.cpu_svn), tcb.pce_svn + 1, tcb.tee_tcb_svn)
    if vary.no_match:
        return [_level(above, date, TcbStatus.UP_TO_DATE, ())]
    if vary.status is not TcbStatus.UP_TO_DATE:
        levels.append(_level(above, date, TcbStatus.UP_TO_DATE, ()))
    here, here_status, advisories = tcb.tee_tcb_svn, vary.status, vary.advisory_ids
    if vary.module_status is not TcbStatus.UP_TO_DATE:
        # Verifiers that know module identities leave the module's SVN to them and take this level; those that do not
        # find the module too old for it and take the next, which says what the others conclude.
        newer = needs(tcb.cpu_svn, tcb.pce_svn, _raised(tcb.tee_tcb_svn))
        levels.append(_level(newer, date, vary.status, vary.advisory_ids))
        here_status = converge(vary.status, vary.module_status)
        advisories += tuple(item for item in vary.module_advisory_ids if item not in advisories)
    levels.append(_level(needs(tcb.cpu_svn, tcb.pce_svn, here), date, here_status, advisories))
    floor_tee = bytes([0, tcb.tee_tcb_svn[1]]) + bytes(SVN_COUNT - 2)
    floor = needs(bytes(SVN_COUNT), min(5, tcb.pce_svn), floor_tee)
    levels.append(_level(floor, OLD_DATE, TcbStatus.OUT_OF_DATE, ("INTEL-SA-00837",)))
    return levels


def _raised(svns: bytes) -> bytes:
    """The same security versions with the first one higher."""
    return bytes([min(svns[0] + 1, 0xFF)]) + svns[1:]


def _module_identities(tcb: PlatformTcb, vary: TcbVariation, date: str) -> list[dict[str, Any]]:
    isv_svn, version = tcb.tee_tcb_svn[0], tcb.tee_tcb_svn[1]
    levels = []
    if vary.module_status is not TcbStatus.UP_TO_DATE:
        levels.append(_level({"isvsvn": min(isv_svn + 1, 0xFF)}, date, TcbStatus.UP_TO_DATE, ()))
    levels.append(_level({"isvsvn": isv_svn}, date, vary.module_status, vary.module_advisory_ids))
    if isv_svn:
        levels.append(_level({"isvsvn": 0}, OLD_DATE, TcbStatus.OUT_OF_DATE, ("INTEL-SA-01036",)))
    return [{"id": f"TDX_{version:02X}", **_module(tcb), "tcbLevels": levels}]


def _module(tcb: PlatformTcb) -> dict[str, Any]:
    return {
        "mrsigner": tcb.mr_signer_seam.hex().upper(),
        "attributes": tcb.seam_attributes.hex().upper(),
        "attributesMask": "FF" * len(tcb.seam_attributes),
    }


def tcb_info_text(tcb: PlatformTcb, vary: TcbVariation, issued: datetime, next_update: datetime) -> str:
    """The TCB info object's text, which the TCB signing key signs."""
    date = timestamp(issued)
    info: dict[str, Any] = {
        "id": "TDX",
        "version": 3,
        "issueDate": date,
        "nextUpdate": timestamp(next_update),
        "fmspc": tcb.fmspc.hex(),
        "pceId": tcb.pce_id.hex(),
        "tcbType": 0,
        "tcbEvaluationDataNumber": vary.evaluation_data_number,
        "tdxModule": _module(tcb),
    }
    if tcb.tee_tcb_svn[1]:
        info["tdxModuleIdentities"] = _module_identities(tcb, vary, date)
    info["tcbLevels"] = _platform_levels(tcb, vary, date)
    return json.dumps(info, separators=(",", ":"))


def qe_identity_text(qe: QeIdentityValues, vary: TcbVariation, issued: datetime, next_update: datetime) -> str:
    """The enclave identity object's text."""
    date = timestamp(issued)
    levels = []
    if vary.qe_status is not TcbStatus.UP_TO_DATE:
        levels.append(_level({"isvsvn": qe.isv_svn + 1}, date, TcbStatus.UP_TO_DATE, ()))
    levels.append(_level({"isvsvn": qe.isv_svn}, date, vary.qe_status, vary.qe_advisory_ids))
    mask = bytes.fromhex("fbffffffffffffff0000000000000000")
    identity = {
        "id": "TD_QE",
        "version": 2,
        "issueDate": date,
        "nextUpdate": timestamp(next_update),
        "tcbEvaluationDataNumber": vary.evaluation_data_number,
        "miscselect": qe.misc_select.to_bytes(4, "little").hex().upper(),
        "miscselectMask": "FFFFFFFF",
        "attributes": bytes(a & m for a, m in zip(qe.attributes, mask, strict=True)).hex().upper(),
        "attributesMask": mask.hex().upper(),
        "mrsigner": qe.mr_signer.hex().upper(),
        "isvprodid": qe.isv_prod_id,
        "tcbLevels": levels,
    }
    return json.dumps(identity, separators=(",", ":"))
