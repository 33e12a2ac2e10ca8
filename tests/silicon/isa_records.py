"""Records of instruction tests: what goes in, what comes out, and how two results are compared.

The format is that of `softtdx._silicon.Trial`, and of the native oracle (native_oracle.c).
"""

import struct
from dataclasses import dataclass, field

RECORD = 1024
CODE = 0x1000_0000
DATA = 0x2000_0000
# The window of data that a record carries lies around the boundary of the two writable pages.
WINDOW = DATA + 0x1000 - 128
# The vector that ends a case: the code is followed by INT3.
BREAKPOINT = 3
# Condition code of the x87 status word: the last rounding was away from zero.
C1 = 1 << 9
READ_ONLY = DATA + 0x2000
MISSING = DATA + 0x3000

FLAGS = {"CF": 1, "PF": 4, "AF": 16, "ZF": 64, "SF": 128, "DF": 1 << 10, "OF": 1 << 11}
# The rest of RFLAGS belongs to whoever runs the guest: IF is set under an operating system, RF in a fault's image.
COMPARED_FLAGS = sum(FLAGS.values())

REGISTERS = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16))]


@dataclass
class Case:
    """One test: code, and the state it starts from.

    `undefined`: flags that the architecture leaves undefined at the end, and, by offset, where an instruction that
    faults finds them so.
    """

    code: bytes
    gpr: list[int]
    flags: int
    fx: bytes
    window: bytes
    name: str
    undefined: frozenset[str] = frozenset()
    undefined_at: dict[int, frozenset[str]] = field(default_factory=dict)
    # Results are approximations, and compared as such.
    loose: bool = False

    def record(self) -> bytes:
        assert len(self.code) < 64, self.name
        out = bytearray(RECORD)
        struct.pack_into("<16Q", out, 0, *self.gpr)
        struct.pack_into("<QQ", out, 128, self.flags | 2, len(self.code))
        out[160 : 160 + len(self.code)] = self.code
        out[256:768] = self.fx
        out[768:1024] = self.window
        return bytes(out)


def _x87(fx: bytes) -> dict[str, object]:
    fields: dict[str, object] = {"fcw": fx[0:2].hex(), "ftw": f"{fx[4]:08b}", "x87 pointers": fx[6:24].hex()}
    for n in range(8):
        fields[f"st{n}"] = fx[32 + 16 * n : 42 + 16 * n][::-1].hex()
    return fields


def outcome(record: bytes, case: Case) -> dict[str, object]:
    """What is compared of a result."""
    gpr = struct.unpack_from("<16Q", record, 0)
    flags, rip, vector, error, cr2 = struct.unpack_from("<QQIIQ", record, 128)
    undefined = case.undefined if vector == BREAKPOINT else case.undefined_at.get(rip - CODE, frozenset())
    compared = COMPARED_FLAGS & ~sum(FLAGS[name] for name in undefined)
    fx = record[256:768]
    out: dict[str, object] = dict(zip(REGISTERS, (f"{value:#x}" for value in gpr), strict=True))
    out["flags"] = " ".join(name for name, bit in FLAGS.items() if flags & compared & bit)
    out["rip"] = f"{rip - CODE:#x}"
    if cr2 >> 63:
        # The upper half is the memory of the oracle's own kernel, which is present.
        error &= ~1
    out["vector"], out["error"], out["cr2"] = vector, error, f"{cr2:#x}"
    out["fsw"] = f"{int.from_bytes(fx[2:4], 'little'):#06x}"
    out |= _x87(fx)
    out["mxcsr"] = fx[24:28][::-1].hex()
    for n in range(16):
        out[f"xmm{n}"] = fx[160 + 16 * n : 176 + 16 * n][::-1].hex()
    out["window"] = record[768:1024].hex()
    out["pages"] = record[224:232].hex()
    return out


def same(mine: bytes, theirs: bytes) -> bool:
    """Whether two results are equal to the last byte, as most are: then nothing needs taking apart."""
    return (
        mine[:128] == theirs[:128]
        and mine[136:160] == theirs[136:160]
        and (mine[128] ^ theirs[128]) & 0xD5 == 0
        and (mine[129] ^ theirs[129]) & 0x0C == 0
        and mine[224:232] == theirs[224:232]
        and mine[256:284] == theirs[256:284]
        and mine[416:672] == theirs[416:672]
        and mine[768:] == theirs[768:]
        and all(mine[a : a + 10] == theirs[a : a + 10] for a in range(288, 416, 16))
    )


def differences(case: Case, mine: bytes, theirs: bytes) -> list[str]:
    """What differs between two results of a case, as text; empty if nothing that is defined does."""
    if same(mine, theirs):
        return []
    ours, other = outcome(mine, case), outcome(theirs, case)
    wrong = [key for key in ours if ours[key] != other[key] and not _close(case, key, ours, other)]
    return [f"{key}: {ours[key]} instead of {other[key]}" for key in wrong]


def _close(case: Case, key: str, ours: dict[str, object], other: dict[str, object]) -> bool:
    """Approximate results: lanes of single precision within 2^-10, registers of the x87 within 2^-47."""
    if not case.loose:
        return False
    if key == "fsw":
        # C1 says which way the result was rounded.
        return (int(str(ours[key]), 16) ^ int(str(other[key]), 16)) == C1
    if key[:2] not in {"xm", "st"}:
        return False
    a, b = bytes.fromhex(str(ours[key])), bytes.fromhex(str(other[key]))
    if key.startswith("st"):
        return abs(int.from_bytes(a, "big") - int.from_bytes(b, "big")) < 1 << 17
    lanes = zip(struct.unpack(">4I", a), struct.unpack(">4I", b), strict=True)
    return all(abs(x - y) <= 1 << 13 for x, y in lanes)


def describe(case: Case, wrong: list[str]) -> str:
    """A failure as a person can use it."""
    inputs = ", ".join(f"{name}={value:#x}" for name, value in zip(REGISTERS, case.gpr, strict=True))
    return f"{case.name}: {case.code.hex()}\n  " + "\n  ".join(wrong) + f"\n  from {inputs}"
