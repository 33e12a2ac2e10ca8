"""Reads the tables under `data/`: JSON, loaded when first asked for and kept."""

import json
from functools import cache
from typing import Any


@cache
def load(name: str) -> dict[str, Any]:
    """The table `data/<name>.json`. Callers share it and must not change it."""
    from importlib import resources  # 5 ms that importing the numbers alone need not pay

    text = resources.files("softtdx.abi").joinpath("data", f"{name}.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table
