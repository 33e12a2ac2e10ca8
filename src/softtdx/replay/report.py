"""What a replay found: how many steps were compared and agreed, by leaf and by status, and what did not."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Mismatch", "Report"]


@dataclass(frozen=True)
class Mismatch:
    """One step whose answer differs: where, the recorded step, and each difference as (what, recorded, ours)."""

    trace: str
    number: int
    kind: str
    step: dict[str, Any]
    differences: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        """Two or more lines for people."""
        lines = [f"{self.trace}:{self.number} {self.kind}"]
        lines += [f"    {what}: recorded {recorded}, got {ours}" for what, recorded, ours in self.differences]
        return "\n".join(lines)


@dataclass
class Report:
    """Counts of a replay. `kinds` and `statuses` count (compared, matched) steps by leaf or event, and by status."""

    compared: int = 0
    matched: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, list[int]] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    files: dict[str, list[int]] = field(default_factory=dict)
    mismatches: list[Mismatch] = field(default_factory=list)
    keep: int = 1000

    @property
    def mismatched(self) -> int:
        """Steps whose answer differs."""
        return self.compared - self.matched

    def count(self, trace: str, kind: str, status: str, mismatch: Mismatch | None) -> None:
        """One more step was compared."""
        good = mismatch is None
        self.compared += 1
        self.matched += good
        for table, key in ((self.kinds, kind), (self.statuses, status), (self.files, trace)):
            row = table.setdefault(key, [0, 0])
            row[0] += 1
            row[1] += good
        if mismatch is not None and len(self.mismatches) < self.keep:
            self.mismatches.append(mismatch)

    def skip(self, why: str) -> None:
        """A step was not compared."""
        self.skipped[why] += 1

    def add(self, other: "Report") -> None:
        """Take over another report's counts."""
        self.compared += other.compared
        self.matched += other.matched
        self.skipped.update(other.skipped)
        for mine, theirs in (
            (self.kinds, other.kinds),
            (self.statuses, other.statuses),
            (self.files, other.files),
        ):
            for key, (compared, matched) in theirs.items():
                row = mine.setdefault(key, [0, 0])
                row[0] += compared
                row[1] += matched
        self.mismatches += other.mismatches[: max(0, self.keep - len(self.mismatches))]

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {
            "compared": self.compared,
            "matched": self.matched,
            "mismatched": self.mismatched,
            "skipped": dict(self.skipped),
            "files": _table(self.files),
            "leaves": _table(self.kinds),
            "statuses": _table(self.statuses),
            "mismatches": [
                {
                    "trace": m.trace,
                    "n": m.number,
                    "kind": m.kind,
                    "differences": [{"what": w, "recorded": r, "got": g} for w, r, g in m.differences],
                    "step": m.step,
                }
                for m in self.mismatches
            ],
        }


def _table(rows: dict[str, list[int]]) -> dict[str, dict[str, int]]:
    return {key: {"compared": c, "matched": m, "mismatched": c - m} for key, (c, m) in sorted(rows.items())}
