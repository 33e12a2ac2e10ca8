"""What a call is made of: a leaf, and for each register a recipe for a number that means something to it.

A recipe names a kind of number and which of them, so that the same call can be made on another machine. The kinds of
a leaf's operands are read from the description of the leaf.
"""

import random
import re
from collections import deque
from dataclasses import dataclass, replace
from functools import cache
from typing import Final, NamedTuple

from softtdx.abi.leaves import SeamcallLeaf, TdcallLeaf, leaf_infos

__all__ = ["Call", "Operands", "Recipe", "change", "fresh", "kinds_of", "resolve", "sequence"]

Leaf = SeamcallLeaf | TdcallLeaf

_OTHERS: Final = ("rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13")
_KINDS: Final = (  # the first that occurs in what the description says of a register
    ("GPA_LIST", "buffer"), ("MBMD", "buffer"), ("TDVPR", "tdvpr"), ("TDR:", "tdr"), ("TDR of", "tdr"),
    ("GPA 51:12", "info"), ("GPA", "gpa"), ("entries of", "edge"), ("bytes of", "edge"),
    ("MD_FIELD_ID", "field"), ("field id", "field"), ("private HKID", "hkid"), ("TD_PARAMS", "buffer"),
    ("buffer", "buffer"), ("array", "buffer"), ("list", "buffer"), ("filters", "buffer"), ("HASH", "buffer"),
    ("region", "region"), ("page pair", "page"), ("base of the TDMR", "tdmr"), ("of a page", "used"),
    ("physical address", "page"),
)  # fmt: skip
_ALL_KINDS: Final = (
    "page",
    "large",
    "region",
    "tdr",
    "tdvpr",
    "used",
    "info",
    "gpa",
    "field td",
    "field vp",
    "field sys",
    "hkid",
    "tdmr",
    "edge",
    "edge",
)
_SCOPES: Final = ((".SYS.", "field sys"), (".VP.", "field vp"))
_VERSIONS: Final = (*[0] * 12, 1, 1, 2)
_NO_FLIP: Final = -1
_KEPT, _REUSED = 64, 0.3


class Recipe(NamedTuple):
    """A number: the `which`-th of `kind` on the machine at hand, or `which` itself for "number", one bit flipped."""

    kind: str
    which: int
    flip: int = _NO_FLIP


@dataclass(frozen=True)
class Call:
    """RAX's parts and the other registers. `lp` is taken modulo the number of processors."""

    leaf: int
    version: int
    operands: tuple[tuple[str, Recipe], ...]
    lp: int = 0
    rax: int | None = None  # instead of leaf and version


def kinds_of(leaf: Leaf) -> dict[str, str]:
    """Register -> kind of its operand."""
    return _kinds(leaf.mnemonic)  # a host leaf and a guest leaf of the same number are equal


@cache
def _kinds(mnemonic: str) -> dict[str, str]:
    info = leaf_infos().get(mnemonic)
    kinds: dict[str, str] = {}
    scope = next((scope for part, scope in _SCOPES if part in mnemonic), "field td")
    for register in info.inputs if info is not None else ():
        kind = next((kind for word, kind in _KINDS if word in register.meaning), "edge")
        kind = scope if kind == "field" else kind
        for name in _names(register.name):
            kinds[name] = kind
    return kinds


def _names(text: str) -> list[str]:
    """RCX; R9-R11; R12, R13."""
    if span := re.fullmatch(r"R(\d+)-R(\d+)", text):
        return [f"r{n}" for n in range(int(span[1]), int(span[2]) + 1)]
    return [name.strip().lower() for name in text.split(",") if re.fullmatch(r"R\w{1,2}", name.strip())]


def _recipe(rng: random.Random, kind: str) -> Recipe:
    """Mostly of the kind that is meant, seldom of another, seldom a bit off."""
    roll = rng.randrange(24)
    if roll == 0 and kind != "buffer":  # what is no buffer of the host's must not be written to as one
        kind = rng.choice(_ALL_KINDS)
    elif roll == 1:
        return Recipe("number", rng.getrandbits(64))
    elif roll == 2:
        kind = "edge"
    flip = rng.randrange(64) if rng.randrange(24) == 0 else _NO_FLIP
    return Recipe(kind, rng.randrange(1 << 12), flip)


def fresh(rng: random.Random, leaf: Leaf) -> Call:
    """A call of a leaf with operands of the kinds it takes, and any number in the other registers."""
    kinds = kinds_of(leaf)
    operands = [(name, _recipe(rng, kind)) for name, kind in kinds.items()]
    if rng.randrange(8) == 0:
        has_buffer = "buffer" in kinds.values()
        others = [name for name in _OTHERS if name not in kinds]
        operands += [(name, _recipe(rng, "edge" if has_buffer else rng.choice(_ALL_KINDS))) for name in others]
    rax = rng.getrandbits(63) if rng.randrange(256) == 0 else None
    return Call(int(leaf), rng.choice(_VERSIONS), tuple(operands), rng.randrange(2), rax)


class Operands:
    """Recipes of calls that led somewhere new, by kind: what they named is worth naming again."""

    def __init__(self, rng: random.Random) -> None:
        """None yet."""
        self._rng = rng
        self._known: dict[str, deque[Recipe]] = {}

    def add(self, call: Call, kinds: dict[str, str]) -> None:
        """Take those of a call."""
        for name, recipe in call.operands:
            if name in kinds:
                self._known.setdefault(kinds[name], deque(maxlen=_KEPT)).append(recipe)

    def mixed_in(self, call: Call, kinds: dict[str, str]) -> Call:
        """The call with some of its operands replaced by known ones of their kinds."""
        rng, operands = self._rng, []
        for name, recipe in call.operands:
            known = self._known.get(kinds.get(name, ""))
            operands.append((name, rng.choice(known) if known and rng.random() < _REUSED else recipe))
        return replace(call, operands=tuple(operands))


def change(rng: random.Random, call: Call, kinds: dict[str, str]) -> Call:
    """The same call with another register, version or processor."""
    roll = rng.randrange(8)
    if roll == 0:
        return Call(call.leaf, rng.choice(_VERSIONS), call.operands, call.lp)
    if roll == 1 or not call.operands:
        return Call(call.leaf, call.version, call.operands, call.lp ^ 1)
    at = rng.randrange(len(call.operands))
    name, old = call.operands[at]
    kind = kinds.get(name, "edge")
    new = old._replace(which=rng.randrange(1 << 12)) if rng.randrange(2) else _recipe(rng, kind)
    return Call(call.leaf, call.version, (*call.operands[:at], (name, new), *call.operands[at + 1 :]), call.lp)


def resolve(recipe: Recipe, numbers: dict[str, list[int]]) -> int:
    """The number itself."""
    kind, which, flip = recipe
    if kind == "number":
        value = which
    else:
        known = numbers[kind]
        value = known[which % len(known)]
    return value ^ 1 << flip if flip >= 0 else value


def sequence(*steps: tuple[Leaf, dict[str, Recipe]]) -> tuple[Call, ...]:
    """Good calls in a row, for a corpus to start from."""
    return tuple(Call(int(leaf), 0, tuple(operands.items())) for leaf, operands in steps)
