"""What an attack is, and how its outcome is judged.

An attack is a function of a `Scene`. It returns what it saw; the lab compares that with what the attack says must
happen on each side. The docstring of the function is its page: what the attacker does, step by step.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from time import perf_counter
from typing import TYPE_CHECKING

from softtdx.errors import SoftTdxError

if TYPE_CHECKING:
    from softtdx.attack.scene import Scene

__all__ = [
    "Attack",
    "Observation",
    "Outcome",
    "Report",
    "Side",
    "SideReport",
    "all_attacks",
    "attack",
    "find",
    "run_attack",
]

_HOMES = (
    "memory", "mapping", "races", "control", "caches", "parameters", "modes", "module_image", "vcpu", "events",
    "stepping", "replies", "attestation",
)  # fmt: skip
_registry: dict[str, "Attack"] = {}


class Outcome(Enum):
    """What became of the victim and its secret."""

    STOPPED = "stopped"  # the attacker got an error or nothing, the victim never noticed
    DETECTED = "detected"  # the tampering was noticed before the victim used it: #MC, the TD is dead
    DENIED = "denied"  # the victim lost service, nothing else; TDX does not promise service
    LEAKED = "leaked"  # the attacker has the secret
    CORRUPTED = "corrupted"  # the victim took the attacker's data for its own

    @property
    def attacker_won(self) -> bool:
        """Whether confidentiality or integrity is gone."""
        return self in (Outcome.LEAKED, Outcome.CORRUPTED)


class Side(Enum):
    """Which platform the attack runs on."""

    PROTECTED = "protected"  # a TD, memory with cryptographic integrity
    UNPROTECTED = "unprotected"  # an ordinary VM, or the protection in question switched off


@dataclass(frozen=True)
class Observation:
    """What happened: the outcome, and the evidence for it in one line."""

    outcome: Outcome
    evidence: str


@dataclass(frozen=True)
class Attack:
    """One attack. `promise` is what TDX says of it; `expected` the outcome on the protected platform.

    An attack whose expected outcome there is one that the attacker wins documents a limit of the real scheme.
    `unprotected` says what the other side is.
    """

    name: str
    family: str
    title: str
    promise: str
    expected: Outcome
    unprotected: str
    page: str
    function: Callable[["Scene"], Observation]


@dataclass(frozen=True)
class SideReport:
    """One run of an attack."""

    side: Side
    outcome: Outcome
    evidence: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """An attack on both sides. `holds`: the outcomes are those that the attack's page states."""

    attack: Attack
    sides: tuple[SideReport, ...]

    @property
    def holds(self) -> bool:
        """The protected outcome is the stated one, and the attack works where the protection is missing."""
        return all(
            side.outcome is self.attack.expected if side.side is Side.PROTECTED else side.outcome.attacker_won
            for side in self.sides
        )


def attack(
    name: str, family: str, *, title: str, promise: str, expected: Outcome, unprotected: str
) -> Callable[[Callable[["Scene"], Observation]], Callable[["Scene"], Observation]]:
    """Register a function as an attack; its docstring is the attack's page."""

    def register(function: Callable[["Scene"], Observation]) -> Callable[["Scene"], Observation]:
        if name in _registry:
            raise ValueError(f"two attacks are named {name}")
        page = function.__doc__ or ""
        _registry[name] = Attack(name, family, title, promise, expected, unprotected, page, function)
        return function

    return register


def all_attacks() -> list[Attack]:
    """Every attack, in the order of its files."""
    for home in _HOMES:
        importlib.import_module(f"softtdx.attack.{home}")
    return sorted(_registry.values(), key=_place)


def _place(chosen: Attack) -> int:
    """Which file an attack is in, whatever was imported first; attacks of others come last."""
    home = chosen.function.__module__.removeprefix("softtdx.attack.")
    return _HOMES.index(home) if home in _HOMES else len(_HOMES)


def find(name: str) -> Attack:
    """The attack of that name. SoftTdxError names near ones."""
    attacks = {a.name: a for a in all_attacks()}
    if name not in attacks:
        near = [n for n in attacks if name.split("-", maxsplit=1)[0] in n]
        raise SoftTdxError(
            f"no attack is named {name!r}; {'near: ' + ', '.join(near) if near else 'see softtdx attack list'}"
        )
    return attacks[name]


def run_attack(chosen: Attack, *, unprotected_only: bool = False) -> Report:
    """Run an attack on both sides (or one), each on a machine of its own."""
    sides = (Side.UNPROTECTED,) if unprotected_only else (Side.PROTECTED, Side.UNPROTECTED)
    return Report(chosen, tuple(_run_side(chosen, side) for side in sides))


def _run_side(chosen: Attack, side: Side) -> SideReport:
    from softtdx.attack.scene import Scene

    start = perf_counter()
    with Scene(side) as scene:
        seen = chosen.function(scene)
    return SideReport(side, seen.outcome, seen.evidence, perf_counter() - start)
