"""What a template of an instruction asks while it emits one: registers, memory operands, immediates."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import isa_values
from isa_encoding import R8, R12, R13, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP, Mem
from isa_records import FLAGS, MISSING, READ_ONLY, WINDOW, Case

ALL_FLAGS = frozenset(FLAGS) - {"DF"}
# Registers that hold addresses in a case with memory operands, and are not written there.
BASES = (RBX, RSI, R12, R13)
_POINTERS = (*BASES, RSP)
_FREE = tuple(n for n in range(16) if n not in _POINTERS)


@dataclass
class Context:
    """The state of one case under construction."""

    rng: random.Random
    memory: bool
    gpr: list[int] = field(default_factory=list)
    undefined: set[str] = field(default_factory=set)
    loose: bool = False

    def __post_init__(self) -> None:
        self.gpr = [isa_values.integer(self.rng) for _ in range(16)]
        if self.memory:
            for base in BASES:
                self.gpr[base] = WINDOW + self.rng.choice([128, 128, 64, 96, 160, self.rng.randrange(256)])
        self.gpr[RSP] = WINDOW + 128 + 8 * self.rng.randrange(-6, 6)
        if self.rng.random() < 0.03:
            self.gpr[RSP] = self.rng.choice([1 << 63, READ_ONLY + 4, MISSING, MISSING - 4, 0x8000_0000_0003])

    # --- operands

    def dst(self) -> int:
        """A general register that may be written."""
        return self.rng.choice(_FREE) if self.memory else self.rng.choice([n for n in range(16) if n != RSP])

    def src(self) -> int:
        return self.rng.randrange(16)

    def xmm(self) -> int:
        return self.rng.randrange(16)

    def mm(self) -> int:
        return self.rng.randrange(8)

    def mem(self, size: int, *, aligned: bool = False) -> Mem:
        """A place in the data window; now and then misaligned, across the pages, read-only or missing."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.02:
            target = rng.choice([READ_ONLY, MISSING, READ_ONLY - 4, MISSING - 2, 8])
        elif aligned and kind > 0.1:
            target = WINDOW + 16 * rng.randrange(15)
        elif kind < 0.2:
            target = WINDOW + 128 - rng.randrange(size + 1)
        else:
            target = WINDOW + rng.randrange(256 - size)
        base = rng.choice(BASES)
        disp = target - self.gpr[base]
        if not -(1 << 31) <= disp < 1 << 31:
            self.gpr[base] = WINDOW
            disp = target - WINDOW
        return Mem(base, disp)

    def rm(self, size: int, *, write: bool = False) -> "int | Mem":
        """A general register or memory."""
        if self.memory and self.rng.random() < 0.5:
            return self.mem(size)
        return self.dst() if write else self.src()

    def xmm_rm(self, size: int = 16, *, aligned: bool = True) -> "int | Mem":
        if self.memory and self.rng.random() < 0.4:
            return self.mem(size, aligned=aligned and size == 16)
        return self.xmm()

    def mm_rm(self, size: int = 8) -> "int | Mem":
        if self.memory and self.rng.random() < 0.4:
            return self.mem(size)
        return self.mm()

    def imm(self, size: int) -> bytes:
        return (isa_values.integer(self.rng) & ((1 << 8 * size) - 1)).to_bytes(size, "little")

    def imm8(self) -> int:
        return self.rng.getrandbits(8)

    # --- flags

    def undefine(self, *names: str) -> None:
        self.undefined |= set(names)

    def define(self, *names: str) -> None:
        self.undefined -= set(names)

    def define_all(self, *but: str) -> None:
        """All six arithmetic flags are written, those of `but` with undefined values."""
        self.undefined = set(but)


@dataclass(frozen=True)
class Template:
    """One way to emit an instruction. `reads`: flags whose value it depends on."""

    name: str
    family: str
    emit: Callable[[Context], bytes]
    reads: frozenset[str] = frozenset()


def build(rng: random.Random, templates: list[Template], *, length: int, depth: int | None = 0) -> Case:
    """A case of `length` instructions picked from `templates`."""
    context = Context(rng, memory=rng.random() < 0.6)
    code, names, undefined_at = b"", list[str](), dict[int, frozenset[str]]()
    while len(names) < length:
        template = rng.choice(templates)
        if template.reads & context.undefined:
            continue
        before = frozenset(context.undefined)
        piece = template.emit(context)
        if len(code) + len(piece) > 60:
            context.undefined = set(before)
            break
        # A template of several instructions begins with ones that leave undefined flags alone.
        undefined_at |= dict.fromkeys(range(len(code), len(code) + len(piece)), before)
        code += piece
        names.append(template.name)
    flags = sum(bit for name, bit in FLAGS.items() if rng.random() < 0.5 and name != "DF")
    if rng.random() < 0.1:
        flags |= FLAGS["DF"]
    window = b"".join(isa_values.memory_float(rng) for _ in range(16))
    return Case(
        code,
        context.gpr,
        flags,
        isa_values.image(rng, depth=depth),
        window,
        "; ".join(names),
        frozenset(context.undefined),
        undefined_at,
        context.loose,
    )


__all__ = ["ALL_FLAGS", "BASES", "R8", "RAX", "RBP", "RCX", "RDI", "RDX", "Context", "Template", "build"]
