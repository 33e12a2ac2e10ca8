"""A PKI in a directory: keys that only their owner may read, and every document as a file of its own.

    pki.json                    what `PkiOptions` says, and the platform's identities
    keys/NAME.pem               private keys, mode 0600, in a directory of mode 0700
    root.pem root.der           the root certificate: what verifiers are told to trust
    pck-chain.pem               PCK leaf, PCK CA, root
    collateral.json             all that a verifier needs beside a quote
    tcb-info.json qe-identity.json root-ca.crl pck-platform.crl pck-processor.crl    the same, one by one

What counts on loading is pki.json and the keys; the rest is written for others to read.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from softtdx.attest.errors import PkiError
from softtdx.attest.pki import KEY_NAMES, Pki, PkiOptions, PlatformIds
from softtdx.attest.tcb import PlatformTcb, QeIdentityValues, TcbStatus, TcbVariation
from softtdx.errors import SoftTdxError

__all__ = ["key_pem", "load_pki", "save_pki", "write_private"]

FORMAT = 1
STATUS_FIELDS = ("status", "module_status", "qe_status")
TUPLE_FIELDS = ("advisory_ids", "module_advisory_ids", "qe_advisory_ids")


def save_pki(pki: Pki, directory: str | Path, *, replace: bool = False) -> Path:
    """Write the PKI; refuses a directory that holds one already unless `replace`."""
    base = Path(directory)
    if (base / "pki.json").exists() and not replace:
        raise PkiError(f"{base} already holds a PKI; name another directory, or ask to replace it")
    try:
        (base / "keys").mkdir(parents=True, exist_ok=True, mode=0o700)
        (base / "keys").chmod(0o700)
        for name, key in pki.keys.items():
            write_private(base / "keys" / f"{name}.pem", key_pem(key))
        for name, data in _documents(pki).items():
            (base / name).write_bytes(data)
    except OSError as error:
        raise PkiError(f"the PKI cannot be written to {base}: {error}") from None
    return base


def load_pki(directory: str | Path) -> Pki:
    """Read a PKI that `save_pki` wrote."""
    base = Path(directory)
    try:
        record = json.loads((base / "pki.json").read_text(encoding="utf-8"))
        keys = {name: _load_key(base / "keys" / f"{name}.pem") for name in KEY_NAMES}
        if record["format"] != FORMAT:
            raise PkiError(f"{base} holds a PKI of format {record['format']!r}; this reads format {FORMAT}")
        return Pki(keys, _ids(record["ids"]), _options(record["options"]))
    except FileNotFoundError as error:
        raise PkiError(
            f"{base} holds no PKI: {error.filename} is missing; make one with `softtdx pki init {base}`"
        ) from None
    except SoftTdxError:
        raise
    except KeyError as error:
        raise PkiError(f"{base}/pki.json lacks {error}") from None
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise PkiError(f"the PKI in {base} cannot be read: {error}") from None


def _documents(pki: Pki) -> dict[str, bytes]:
    record = {"format": FORMAT, "ids": _plain(pki.ids), "options": _plain(pki.options)}
    return {
        "pki.json": (json.dumps(record, indent=1) + "\n").encode(),
        "root.pem": pki.root_pem.encode(),
        "root.der": pki.root_der,
        "pck-chain.pem": pki.pck_chain.encode(),
        "collateral.json": (pki.collateral().to_json() + "\n").encode(),
        "tcb-info.json": pki.tcb_info_response().encode(),
        "qe-identity.json": pki.qe_identity_response().encode(),
        "root-ca.crl": pki.root_crl,
        "pck-platform.crl": pki.pck_crls["platform"],
        "pck-processor.crl": pki.pck_crls["processor"],
    }


def write_private(path: Path, data: bytes) -> None:
    """A file that is never, not even for a moment, readable by others."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The private key in PEM, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError):
        raise PkiError(f"{path} is not a private key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise PkiError(f"{path} is not a P-256 key")
    return key


def _plain(value: Any) -> Any:
    """As JSON has it: bytes in hex, dates in ISO 8601, sets in order."""
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _ids(record: dict[str, Any]) -> PlatformIds:
    return PlatformIds(
        **{name: bytes.fromhex(record[name]) for name in ("ppid", "instance_id", "qe_id", "auth_data")},
        serials={name: int(record["serials"][name]) for name in KEY_NAMES},
    )


def _options(record: dict[str, Any]) -> PkiOptions:
    vary = dict(record["vary"])
    vary |= {name: TcbStatus(vary[name]) for name in STATUS_FIELDS}
    vary |= {name: tuple(vary[name]) for name in TUPLE_FIELDS}
    return PkiOptions(
        tcb=PlatformTcb(**_unhexed(record["tcb"])),
        vary=TcbVariation(**vary),
        qe=QeIdentityValues(**_unhexed(record["qe"])),
        ca=record["ca"],
        revoked=frozenset(record["revoked"]),
        expired=frozenset(record["expired"]),
        platform_flags=frozenset(record["platform_flags"]),
        issued=datetime.fromisoformat(record["issued"]),
        pcs_url=record["pcs_url"],
    )


def _unhexed(record: dict[str, Any]) -> dict[str, Any]:
    return {name: bytes.fromhex(value) if isinstance(value, str) else value for name, value in record.items()}
