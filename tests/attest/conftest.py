"""A PKI, a platform that goes with it, and the real samples where they are to be had."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from attest_platform import ReportingPlatform
from other_verifiers import LineVerifier, start_go, start_javascript

from softtdx.attest import Pki, QuotingEnclave


@pytest.fixture(scope="session")
def pki() -> Pki:
    return Pki.create(seed=6)


@pytest.fixture(scope="session")
def platform(pki: Pki) -> ReportingPlatform:
    return ReportingPlatform(pki.options.tcb)


@pytest.fixture(scope="session")
def enclave(pki: Pki, platform: ReportingPlatform) -> QuotingEnclave:
    return QuotingEnclave(pki, platform.verify)


@pytest.fixture(scope="session")
def quote_bytes(enclave: QuotingEnclave, platform: ReportingPlatform) -> bytes:
    return enclave.quote(platform.report(report_data=bytes(range(64))))


@pytest.fixture(scope="session")
def fixture_file() -> Callable[[str], bytes]:
    """Real samples, in a folder beside the checkout; a test that wants one skips where it is absent."""
    base = Path(os.environ.get("SOFTTDX_SHARED", Path(__file__).parents[2].parent / "shared")) / "fixtures"

    def read(name: str) -> bytes:
        path = base / name
        if not path.is_file():
            pytest.skip(f"the sample {name} is not here (set SOFTTDX_SHARED to the folder that holds fixtures/)")
        return path.read_bytes()

    return read


@pytest.fixture(scope="session")
def install_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the other verifiers are installed: kept from run to run, where pytest keeps anything."""
    cache = getattr(request.config, "cache", None)
    return cache.mkdir("softtdx-verifiers") if cache else tmp_path_factory.mktemp("verifiers")


@pytest.fixture(scope="session")
def javascript_verifier(install_folder: Path) -> Iterator[LineVerifier]:
    verifier = start_javascript(install_folder)
    yield verifier
    verifier.close()


@pytest.fixture(scope="session")
def go_verifier(install_folder: Path) -> Iterator[LineVerifier]:
    verifier = start_go(install_folder)
    yield verifier
    verifier.close()


@pytest.fixture(scope="session")
def http() -> Iterator[httpx.Client]:
    """One client for all, for making one takes longer than most requests."""
    with httpx.Client(timeout=30) as client:
        yield client
