"""What a user asks of a TD beyond a genuine quote: measurements, attributes, TCB status, report data.

A policy is TOML:

    [tcb]
    allow = ["UpToDate", "SWHardeningNeeded"]      # default: ["UpToDate"]
    reject_advisories = ["INTEL-SA-00837"]
    min_evaluation_data_number = 15

    [td]
    allow_debug = false
    allow_service_td = false
    mr_td = ["9f1c...", "77aa..."]                 # any one of them; likewise mr_seam, mr_signer_seam,
    rtmr0 = "..."                                  # mr_config_id, mr_owner, mr_owner_config, rtmr0..rtmr3
    report_data = "hex"                            # 64 bytes; a shorter value must be its beginning
    attributes_required = ["SEPT_VE_DISABLE"]
    attributes_forbidden = ["PERFMON"]
    xfam_allowed = 0x600e7
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from softtdx.attest.errors import MalformedError
from softtdx.attest.quote import TdBody10
from softtdx.attest.tcb import TcbStatus
from softtdx.attest.tdreport import attribute_bits

__all__ = ["Policy", "PolicyError"]

MEASUREMENTS = (
    "mr_td",
    "mr_seam",
    "mr_signer_seam",
    "mr_config_id",
    "mr_owner",
    "mr_owner_config",
    "rtmr0",
    "rtmr1",
    "rtmr2",
    "rtmr3",
)
MEASUREMENT_SIZE = 48
REPORT_DATA_SIZE = 64
TCB_KEYS = {"allow", "reject_advisories", "min_evaluation_data_number"}
TD_KEYS = {
    *MEASUREMENTS,
    "allow_debug",
    "allow_service_td",
    "report_data",
    "attributes_required",
    "attributes_forbidden",
    "xfam_allowed",
}


class PolicyError(MalformedError):
    """A policy cannot be read, or asks for something that cannot be."""


@dataclass(frozen=True)
class Policy:
    """What must hold of a genuine quote for its TD to be accepted. The default asks for UpToDate and no debugging."""

    allow: frozenset[TcbStatus] = frozenset((TcbStatus.UP_TO_DATE,))
    reject_advisories: frozenset[str] = frozenset()
    min_evaluation_data_number: int = 0
    allow_debug: bool = False
    allow_service_td: bool = False
    measurements: Mapping[str, frozenset[bytes]] = field(default_factory=dict)
    report_data: bytes | None = None
    attributes_required: int = 0
    attributes_forbidden: int = 0
    xfam_allowed: int | None = None

    @classmethod
    def any_status(cls) -> Policy:
        """Accepts every TCB status that is not Revoked: for who looks at the status himself."""
        return cls(allow=frozenset(TcbStatus) - {TcbStatus.REVOKED})

    def expecting(self, report_data: bytes) -> Policy:
        """The same policy, and the report data must be, or begin with, this."""
        if len(report_data) > REPORT_DATA_SIZE:
            raise PolicyError(f"report data is at most {REPORT_DATA_SIZE} bytes, this is {len(report_data)}")
        return replace(self, report_data=report_data)

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """From a TOML file."""
        try:
            return cls.from_toml(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(f"the policy {path} cannot be read: {error}") from None

    @classmethod
    def from_toml(cls, text: str) -> Policy:
        """From TOML text; a key that no policy has is refused, so that a slip of the pen does not pass for a check."""
        try:
            data = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise PolicyError(f"the policy is not TOML: {error}") from None
        _known(data, {"tcb", "td"}, "the policy")
        tcb, td = _table(data, "tcb"), _table(data, "td")
        _known(tcb, TCB_KEYS, "[tcb]")
        _known(td, TD_KEYS, "[td]")
        return cls(
            allow=frozenset(_status(item) for item in _strings(tcb, "allow", ["UpToDate"])),
            reject_advisories=frozenset(_strings(tcb, "reject_advisories", [])),
            min_evaluation_data_number=_integer(tcb, "min_evaluation_data_number", 0),
            allow_debug=_flag(td, "allow_debug"),
            allow_service_td=_flag(td, "allow_service_td"),
            measurements={
                name: frozenset(_hex(name, item, MEASUREMENT_SIZE) for item in _strings(td, name, []))
                for name in MEASUREMENTS
                if name in td
            },
            report_data=_hex("report_data", td["report_data"], None) if "report_data" in td else None,
            attributes_required=_bits(_strings(td, "attributes_required", [])),
            attributes_forbidden=_bits(_strings(td, "attributes_forbidden", [])),
            xfam_allowed=_integer(td, "xfam_allowed", 0) if "xfam_allowed" in td else None,
        )

    def complaints(
        self, body: TdBody10, status: TcbStatus, advisory_ids: tuple[str, ...], evaluation_data_number: int
    ) -> list[str]:
        """What of the quote goes against the policy, one sentence each; empty when all holds."""
        out = []
        if status not in self.allow:
            out.append(f"TCB status {status} is not among those allowed ({', '.join(sorted(self.allow))})")
        out += [f"advisory {item} is rejected" for item in sorted(self.reject_advisories & set(advisory_ids))]
        if evaluation_data_number < self.min_evaluation_data_number:
            out.append(f"TCB evaluation data {evaluation_data_number} is older than {self.min_evaluation_data_number}")
        for name, allowed in self.measurements.items():
            if getattr(body, name) not in allowed:
                out.append(f"{name} {getattr(body, name).hex()} is none of the {len(allowed)} allowed")
        if self.report_data is not None and not body.report_data.startswith(self.report_data):
            out.append(f"report data {body.report_data.hex()} does not begin with {self.report_data.hex()}")
        return out + self._attribute_complaints(body)

    def _attribute_complaints(self, body: TdBody10) -> list[str]:
        out = []
        if missing := self.attributes_required & ~body.td_attributes:
            out.append(f"TD attributes {body.td_attributes:#x} lack {missing:#x}")
        if extra := self.attributes_forbidden & body.td_attributes:
            out.append(f"TD attributes {body.td_attributes:#x} have {extra:#x}, which is forbidden")
        if self.xfam_allowed is not None and body.xfam & ~self.xfam_allowed:
            out.append(f"XFAM {body.xfam:#x} goes beyond {self.xfam_allowed:#x}")
        return out


def _known(table: dict[str, Any], keys: set[str], where: str) -> None:
    for key in table:
        if key not in keys:
            raise PolicyError(f"{where} has the key {key!r}; it may have {', '.join(sorted(keys))}")


def _table(data: dict[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name, {})
    if not isinstance(value, dict):
        raise PolicyError(f"{name} is a table ([{name}]) in a policy, not {value!r}")
    return value


def _strings(table: dict[str, Any], name: str, default: list[str]) -> list[str]:
    value = table.get(name, default)
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise PolicyError(f"{name} is a string or a list of strings, not {value!r}")
    return items


def _integer(table: dict[str, Any], name: str, default: int) -> int:
    value = table.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise PolicyError(f"{name} is a number from 0 up, not {value!r}")
    return value


def _flag(table: dict[str, Any], name: str) -> bool:
    value = table.get(name, False)
    if not isinstance(value, bool):
        raise PolicyError(f"{name} is true or false, not {value!r}")
    return value


def _status(value: str) -> TcbStatus:
    try:
        return TcbStatus(value)
    except ValueError:
        raise PolicyError(f"{value!r} is no TCB status; there are {', '.join(TcbStatus)}") from None


def _hex(name: str, value: Any, size: int | None) -> bytes:
    try:
        data = bytes.fromhex(value)
    except (ValueError, TypeError):
        raise PolicyError(f"{name} {value!r} is not hexadecimal") from None
    if size is not None and len(data) != size:
        raise PolicyError(f"{name} {value} is {len(data)} bytes, not {size}")
    if len(data) > REPORT_DATA_SIZE:
        raise PolicyError(f"{name} {value} is {len(data)} bytes, more than {REPORT_DATA_SIZE}")
    return data


def _bits(names: list[str]) -> int:
    by_name = attribute_bits()
    out = 0
    for name in names:
        if name not in by_name:
            raise PolicyError(f"{name!r} is no TD attribute; there are {', '.join(by_name)}")
        out |= by_name[name]
    return out
