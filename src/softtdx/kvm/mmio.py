"""Emulation of a load or store to an address without memory, for ordinary VMs (arch/x86/kvm/emulate.c).

A TD decodes such an instruction itself and makes a hypercall of it; an ordinary VM exits with the address, and KVM
reads the instruction. The forms here are those that compilers and kernels use for device registers.
"""

from dataclasses import dataclass
from typing import Final

__all__ = ["MAX_INSTRUCTION", "MmioInstruction", "decode_mmio"]

MAX_INSTRUCTION: Final = 15
_LEGACY_PREFIXES: Final = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x67\xf0\xf2\xf3")
_OPERAND_SIZE: Final = 0x66
_TWO_BYTE: Final = 0x0F


@dataclass(frozen=True)
class MmioInstruction:
    """What an instruction does with the register at the faulting address.

    A store's value is `immediate`, or register `reg`; a load goes to `reg`, extended from `size` to `reg_size` bytes.
    `high` says that `reg` is AH to BH. RMW forms and string instructions are not among them.
    """

    length: int
    write: bool
    size: int
    reg: int = 0
    reg_size: int = 0
    high: bool = False
    signed: bool = False
    immediate: int | None = None


def decode_mmio(code: bytes) -> MmioInstruction | None:
    """Decode the instruction at the start of `code`, in 64-bit mode; None for one that is not emulated."""
    at, rex, operand_size = 0, 0, 4
    while at < len(code) and (code[at] in _LEGACY_PREFIXES or code[at] == _OPERAND_SIZE):
        operand_size = 2 if code[at] == _OPERAND_SIZE else operand_size
        at += 1
    if at < len(code) and code[at] & 0xF0 == 0x40:
        rex = code[at]
        at += 1
    if rex & 8:
        operand_size = 8
    if at < len(code) and code[at] == _TWO_BYTE:
        opcode, at = code[at + 1 : at + 2], at + 2
        return _extending_load(code, at, opcode[0], rex, operand_size) if opcode else None
    if at >= len(code):
        return None
    opcode_byte, at = code[at], at + 1
    if opcode_byte in (0x88, 0x89, 0x8A, 0x8B):
        size = operand_size if opcode_byte & 1 else 1
        modrm = _modrm(code, at)
        if modrm is None:
            return None
        reg, length = modrm
        reg, high = _register(reg, rex, byte=size == 1)
        return MmioInstruction(at + length, opcode_byte < 0x8A, size, reg, size, high)
    if opcode_byte in (0xC6, 0xC7):
        size = operand_size if opcode_byte & 1 else 1
        modrm = _modrm(code, at)
        if modrm is None or modrm[0] != 0:
            return None
        at += modrm[1]
        width = min(size, 4)
        raw = code[at : at + width]
        if len(raw) < width:
            return None
        value = int.from_bytes(raw, "little", signed=True) & (1 << 8 * size) - 1
        return MmioInstruction(at + width, True, size, immediate=value)
    return None


def _extending_load(code: bytes, at: int, opcode: int, rex: int, operand_size: int) -> MmioInstruction | None:
    """MOVZX and MOVSX."""
    if opcode not in (0xB6, 0xB7, 0xBE, 0xBF):
        return None
    modrm = _modrm(code, at)
    if modrm is None:
        return None
    reg, length = modrm
    return MmioInstruction(
        at + length, False, 2 if opcode & 1 else 1, reg | (rex & 4) << 1, operand_size, signed=bool(opcode & 8)
    )


def _register(reg: int, rex: int, *, byte: bool) -> tuple[int, bool]:
    """The number of the register operand, and whether it is the second byte of it."""
    if byte and not rex and reg >= 4:
        return reg - 4, True
    return reg | (rex & 4) << 1, False


def _modrm(code: bytes, at: int) -> tuple[int, int] | None:
    """(reg field, bytes that ModRM, SIB and displacement take); None for a register operand or a cut-off one."""
    if at >= len(code):
        return None
    mod, reg, rm = code[at] >> 6, code[at] >> 3 & 7, code[at] & 7
    if mod == 3:
        return None
    length = 1
    if rm == 4:
        if at + 1 >= len(code):
            return None
        if mod == 0 and code[at + 1] & 7 == 5:
            length += 4
        length += 1
    elif mod == 0 and rm == 5:
        length += 4
    length += {0: 0, 1: 1, 2: 4}[mod]
    return (reg, length) if at + length <= len(code) else None
