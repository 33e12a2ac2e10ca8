"""Verifiers that other people wrote, each behind the same few methods.

The JavaScript and the Go one are installed at their pinned versions into pytest's cache folder when first wanted, which
takes a network. Where that fails the tests skip and say why; with CI set they fail.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from softtdx.attest import Collateral, DcapRejectedError, verify_with_dcap_qvl

SOURCES = Path(__file__).parent / "verifiers"
INSTALL_TIMEOUT = 240


@dataclass(frozen=True)
class Opinion:
    """What a verifier says of a quote. `status` is None when it refuses it."""

    accepted: bool
    status: str | None
    advisory_ids: tuple[str, ...] | None
    error: str


class DcapQvl:
    """dcap-qvl (Rust), by its Python binding."""

    name = "dcap-qvl"

    def judge(self, quote: bytes, collateral: Collateral, root: bytes, now: int) -> Opinion:
        try:
            verdict = verify_with_dcap_qvl(quote, (collateral, root), now)
        except DcapRejectedError as error:
            return Opinion(False, None, None, str(error))
        return Opinion(True, verdict.status, verdict.advisory_ids, "")

    def close(self) -> None:
        """Nothing to stop."""


class LineVerifier:
    """A program that answers one JSON line with another."""

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def judge(self, quote: bytes, collateral: Collateral, root: bytes, now: int) -> Opinion:
        return self._ask(quote, root, now, collateral=json.loads(collateral.to_json()))

    def judge_by_pcs(self, quote: bytes, pcs: str, root: bytes, now: int) -> Opinion:
        """The verifier fetches the collateral itself."""
        return self._ask(quote, root, now, pcs=pcs)

    def _ask(self, quote: bytes, root: bytes, now: int, **more: Any) -> Opinion:
        request = {"quote": quote.hex(), "root": root.hex(), "now": now, **more}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        answer = json.loads(self._process.stdout.readline())
        ids = answer.get("advisory_ids")
        return Opinion(
            answer["accepted"],
            answer.get("status"),
            None if ids is None else tuple(ids),
            answer.get("error", ""),
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


def unavailable(reason: str) -> Any:
    """Skip, or in CI fail: there a verifier that cannot be had is a check that did not run."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _run(command: list[str], folder: Path, what: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        unavailable(f"{what} cannot be installed: {error}")
    if done.returncode:
        unavailable(f"{what} cannot be installed: {' '.join((done.stderr or done.stdout).split())[-300:]}")


def _installed(base: Path, name: str, install: Callable[[Path], None]) -> Path:
    """The folder where a verifier is installed; made once for each version of its sources."""
    sources = sorted((SOURCES / name).iterdir())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    folder = base / f"{name}-{digest}"
    ready = folder / "ready"
    if not ready.exists():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(SOURCES / name, folder)
        install(folder)
        ready.touch()
    return folder


def start_javascript(base: Path) -> LineVerifier:
    """@phala/dcap-qvl, installed with npm."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            unavailable(f"@phala/dcap-qvl needs {tool}, which is not installed")
    flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock", "--no-update-notifier"]
    flags += ["--fetch-retries=1", "--fetch-retry-maxtimeout=3000", "--fetch-timeout=60000"]
    folder = _installed(base, "js", lambda at: _run(["npm", "install", *flags], at, "@phala/dcap-qvl"))
    return LineVerifier("@phala/dcap-qvl", ["node", "main.js"], folder)


def start_go(base: Path) -> LineVerifier:
    """go-tdx-guest, built with Go."""
    if shutil.which("go") is None:
        unavailable("go-tdx-guest needs go, which is not installed")

    def install(folder: Path) -> None:
        (folder / "go.mod.in").rename(folder / "go.mod")
        _run(["go", "build", "-mod=mod", "-o", "verifier", "."], folder, "go-tdx-guest")

    folder = _installed(base, "go", install)
    return LineVerifier("go-tdx-guest", [str(folder / "verifier")], folder)
