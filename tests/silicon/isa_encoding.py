"""x86-64 machine code from its parts: prefixes, REX, opcode, ModRM, SIB, displacement, immediate."""

from dataclasses import dataclass

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
R8, R9, R10, R11, R12, R13, R14, R15 = range(8, 16)


@dataclass(frozen=True)
class Mem:
    """A memory operand: [base + index * 2**scale + disp]."""

    base: int
    disp: int = 0
    index: int | None = None
    scale: int = 0


def _modrm(reg: int, rm: "int | Mem") -> bytes:
    if isinstance(rm, int):
        return bytes([0xC0 | (reg & 7) << 3 | rm & 7])
    if rm.disp == 0 and rm.base & 7 != RBP:
        mod, disp = 0, b""
    elif -128 <= rm.disp < 128:
        mod, disp = 1, rm.disp.to_bytes(1, "little", signed=True)
    else:
        mod, disp = 2, rm.disp.to_bytes(4, "little", signed=True)
    if rm.index is None and rm.base & 7 != RSP:
        return bytes([mod << 6 | (reg & 7) << 3 | rm.base & 7]) + disp
    index = RSP if rm.index is None else rm.index
    sib = rm.scale << 6 | (index & 7) << 3 | rm.base & 7
    return bytes([mod << 6 | (reg & 7) << 3 | 4, sib]) + disp


def _bits(reg: int, rm: "int | Mem") -> tuple[int, int, int]:
    """REX.R, REX.X, REX.B."""
    if isinstance(rm, int):
        return reg >> 3, 0, rm >> 3
    return reg >> 3, (rm.index or 0) >> 3, rm.base >> 3


def modrm(
    opcode: bytes,
    reg: int,
    rm: "int | Mem",
    *,
    prefix: bytes = b"",
    wide: bool = False,
    rex: bool = False,
    imm: bytes = b"",
) -> bytes:
    """An instruction with a ModRM byte. `wide` sets REX.W; `rex` asks for a REX prefix even without bits."""
    r, x, b = _bits(reg, rm)
    bits = wide << 3 | r << 2 | x << 1 | b
    head = bytes([0x40 | bits]) if bits or rex else b""
    return prefix + head + opcode + _modrm(reg, rm) + imm


def vex(
    opcode: int,
    reg: int,
    other: int,
    rm: "int | Mem",
    *,
    space: int,
    pp: int = 0,
    wide: bool = False,
    imm: bytes = b"",
) -> bytes:
    """A VEX-encoded instruction of 128 bits. `space`: 1 = 0F, 2 = 0F38, 3 = 0F3A; `pp`: 0, 66, F3, F2."""
    r, x, b = _bits(reg, rm)
    first = (r ^ 1) << 7 | (x ^ 1) << 6 | (b ^ 1) << 5 | space
    second = wide << 7 | (~other & 15) << 3 | pp
    return bytes([0xC4, first, second, opcode]) + _modrm(reg, rm) + imm
