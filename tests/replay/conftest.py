"""The shared recordings, which are not part of the repository."""

import os
from pathlib import Path

import pytest

TRACES = Path(os.environ.get("SOFTTDX_SHARED", Path(__file__).parents[2].parent / "shared")) / "traces"


@pytest.fixture(scope="session")
def traces() -> Path:
    if not (TRACES / "platform.json").exists():
        pytest.skip("the recordings are not here (set SOFTTDX_SHARED to the folder that holds traces/)")
    return TRACES
