"""Operand values that are worth trying: the edges of every format, and random bits."""

import random
import struct

_EDGES = [0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 63, 64, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF]
_EDGES += [0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 0x7FFF_FFFF_FFFF_FFFF, 1 << 63, (1 << 64) - 1]

_SINGLES = [
    0x0000_0000, 0x8000_0000, 0x3F80_0000, 0xBF80_0000, 0x0000_0001, 0x007F_FFFF, 0x8000_0001, 0x0080_0000,
    0x8080_0000, 0x7F7F_FFFF, 0xFF7F_FFFF, 0x7F80_0000, 0xFF80_0000, 0x7FC0_0000, 0xFFC0_0000, 0x7F80_0001,
    0xFFA0_0000, 0x4F00_0000, 0xCF00_0000, 0x4EFF_FFFF, 0x3F00_0000, 0x3FC0_0000, 0x4020_0000, 0x5F00_0000,
    0xDF00_0000, 0x3F7F_FFFF, 0x3400_0000, 0x4B80_0000,
]  # fmt: skip
_DOUBLES = [
    0x0000_0000_0000_0000, 0x8000_0000_0000_0000, 0x3FF0_0000_0000_0000, 0xBFF0_0000_0000_0000,
    0x0000_0000_0000_0001, 0x000F_FFFF_FFFF_FFFF, 0x8000_0000_0000_0001, 0x0010_0000_0000_0000,
    0x8010_0000_0000_0000, 0x7FEF_FFFF_FFFF_FFFF, 0xFFEF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000,
    0xFFF0_0000_0000_0000, 0x7FF8_0000_0000_0000, 0xFFF8_0000_0000_0000, 0x7FF0_0000_0000_0001,
    0xFFF4_0000_0000_0000, 0x41E0_0000_0000_0000, 0xC1E0_0000_0000_0000, 0xC1E0_0000_0010_0000,
    0x43E0_0000_0000_0000, 0xC3E0_0000_0000_0000, 0x3FE0_0000_0000_0000, 0x3FF8_0000_0000_0000,
    0x4004_0000_0000_0000, 0x36A0_0000_0000_0000, 0x3810_0000_0000_0000, 0x380F_FFFF_FFFF_FFFF,
    0x47EF_FFFF_E000_0000, 0x47EF_FFFF_F000_0000, 0x47F0_0000_0000_0000, 0x3690_0000_0000_0000,
    0x380F_FFFF_F000_0000,
]  # fmt: skip
# Exponents with the sign, of the extended format: zero or denormal, tiny, ordinary, huge, infinite or NaN.
_EXPONENTS = [
    0,
    0x8000,
    1,
    2,
    0x3FBF,
    0x3FFE,
    0x3FFF,
    0xBFFF,
    0x4000,
    0x401D,
    0x401E,
    0x403D,
    0x403E,
    0xC03E,
    0x7FFE,
    0x7FFF,
]
_SIGNIFICANDS = [
    0, 1, 1 << 63, (1 << 63) | 1, 3 << 62, (1 << 62) | 1, (1 << 64) - 1, 0xC000_0000_0000_0001, 0xA000_0000_0000_0000,
    0xFFFF_FF00_0000_0000, 0xFFFF_FFFF_FFFF_F800, 0x8000_0000_0000_0400,
]  # fmt: skip


def integer(rng: random.Random) -> int:
    """64 bits."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(_EDGES)
    if kind < 0.6:
        return rng.getrandbits(rng.choice([8, 16, 32]))
    if kind < 0.7:
        return (1 << 64) - 1 - rng.getrandbits(rng.choice([8, 16, 32]))
    return rng.getrandbits(64)


def _single(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(_SINGLES)
    if kind < 0.8:
        (bits,) = struct.unpack("<I", struct.pack("<f", rng.uniform(-1000, 1000)))
        return int(bits)
    return rng.getrandbits(32)


def _double(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(_DOUBLES)
    if kind < 0.8:
        (bits,) = struct.unpack("<Q", struct.pack("<d", rng.uniform(-1e6, 1e6)))
        return int(bits)
    return rng.getrandbits(64)


def vector(rng: random.Random) -> int:
    """128 bits, of lanes of one kind."""
    kind = rng.randrange(4)
    if kind == 0:
        return sum(_single(rng) << 32 * n for n in range(4))
    if kind == 1:
        return _double(rng) | _double(rng) << 64
    if kind == 2:
        return integer(rng) | integer(rng) << 64
    return rng.getrandbits(128)


def extended(rng: random.Random) -> bytes:
    """The ten bytes of an x87 register."""
    kind = rng.random()
    if kind < 0.4:
        exponent, sig = rng.choice(_EXPONENTS), rng.choice(_SIGNIFICANDS)
    elif kind < 0.9:
        exponent = rng.choice([0, 0x8000]) | rng.choice([0x3FFF + rng.randrange(-70, 70), rng.getrandbits(15)])
        sig = 1 << 63 | rng.getrandbits(64)
        if rng.random() < 0.3:
            sig &= -1 << rng.choice([11, 40, 60]) & ((1 << 64) - 1)
    else:
        exponent, sig = rng.getrandbits(16), rng.getrandbits(64)
    return sig.to_bytes(8, "little") + exponent.to_bytes(2, "little")


def memory_float(rng: random.Random) -> bytes:
    """Bytes that read well as singles, doubles or integers."""
    return vector(rng).to_bytes(16, "little")


def mxcsr(rng: random.Random) -> int:
    if rng.random() < 0.4:
        return rng.choice([0x1F80, 0x1FA0])
    masks = 0x3F if rng.random() < 0.8 else rng.getrandbits(6)
    flags = rng.choice([0, 0, 0x20, rng.getrandbits(6)])
    return flags | masks << 7 | rng.getrandbits(2) << 13 | rng.choice([0, 0x40, 0x8000, 0x8040])


def x87(rng: random.Random, *, depth: int | None = None) -> bytearray:
    """An FXSAVE image's x87 part. `depth`: registers in use from the top; `None`: any."""
    fx = bytearray(512)
    masks = 0x3F if rng.random() < 0.85 else rng.getrandbits(6)
    control = 0x40 | masks | rng.choice([0, 2, 3, 3, 3]) << 8 | rng.getrandbits(2) << 10
    top = rng.randrange(8)
    sticky = rng.choice([0, 0, rng.getrandbits(6)]) & masks
    status = sticky | top << 11 | rng.choice([0, 0x4700 & rng.getrandbits(16)])
    tags = rng.getrandbits(8) if depth is None else sum(1 << ((top + n) & 7) for n in range(depth))
    struct.pack_into("<HHB", fx, 0, control, status, tags)
    for n in range(8):
        fx[32 + 16 * n : 42 + 16 * n] = extended(rng)
    return fx


def image(rng: random.Random, *, depth: int | None = 0) -> bytes:
    """A whole FXSAVE image."""
    fx = x87(rng, depth=depth)
    struct.pack_into("<II", fx, 24, mxcsr(rng), 0xFFFF)
    for n in range(16):
        fx[160 + 16 * n : 176 + 16 * n] = vector(rng).to_bytes(16, "little")
    return bytes(fx)
