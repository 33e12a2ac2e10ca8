"""Replays recorded behaviour of a TDX module: the same calls, memory writes and TD exits, each answer compared.

`trace` reads recordings, `player` drives a module with one, `report` says what agreed; `recorder` makes new ones.
A recording is JSON lines (gzipped or not) beside a `platform.json` that describes the machine it was made on.
"""

from .player import replay
from .recorder import record
from .report import Mismatch, Report
from .trace import TraceError

__all__ = ["Mismatch", "Report", "TraceError", "record", "replay"]
