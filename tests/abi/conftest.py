"""Facts and recordings beside the checkout; a test that wants one skips where it is absent."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(os.environ.get("SOFTTDX_SHARED", Path(__file__).parents[2].parent / "shared"))


@pytest.fixture(scope="session")
def facts() -> Callable[[str], Any]:
    def read(name: str) -> Any:
        path = SHARED / "facts" / "tables" / f"{name}.json"
        if not path.is_file():
            pytest.skip(f"{path.name} is not here")
        return json.loads(path.read_text(encoding="utf-8"))

    return read


@pytest.fixture(scope="session")
def recording() -> Callable[[str], list[dict[str, Any]]]:
    """The steps of one recording of a real module."""

    def read(name: str) -> list[dict[str, Any]]:
        path = SHARED / "traces" / f"{name}.jsonl.gz"
        if not path.is_file():
            pytest.skip(f"{path.name} is not here")
        with gzip.open(path, "rt") as lines:
            return [json.loads(line) for line in lines]

    return read
