"""Templates of general-purpose instructions, with the flags that each leaves undefined (SDM volume 2)."""

from collections.abc import Callable, Iterator

import isa_values
from isa_context import ALL_FLAGS, RAX, RBP, RCX, RDI, RDX, Context, Template
from isa_encoding import RSI, Mem, modrm, vex
from isa_records import MISSING, WINDOW

_SIZES = (1, 2, 4, 8)
_CONDITIONS = ["o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g"]
_CONDITION_FLAGS = [{"OF"}, {"CF"}, {"ZF"}, {"CF", "ZF"}, {"SF"}, {"PF"}, {"SF", "OF"}, {"ZF", "SF", "OF"}]


def _op(size: int, opcode: int) -> bytes:
    """The opcode byte of a size: the even one is for bytes."""
    return bytes([opcode | (size != 1)])


def _encode(ctx: Context, size: int, opcode: bytes, reg: int, rm: "int | Mem", imm: bytes = b"") -> bytes:
    # Byte registers 4 to 7 are SPL to DIL with REX and AH to BH without: both are wanted, but a store to the high
    # byte of a pointer is not.
    rex = size == 1 and (ctx.memory or ctx.rng.random() < 0.5)
    prefix = b"\x66" if size == 2 else b""
    return modrm(opcode, reg, rm, prefix=prefix, wide=size == 8, rex=rex, imm=imm)


def _each_size(
    name: str,
    emit: Callable[[Context, int], bytes],
    family: str,
    reads: frozenset[str] = frozenset(),
    sizes: tuple[int, ...] = _SIZES,
) -> Iterator[Template]:
    for size in sizes:

        def emit_sized(ctx: Context, size: int = size) -> bytes:
            return emit(ctx, size)

        yield Template(f"{name}{8 * size}", family, emit_sized, reads)


# --- arithmetic and logic


def _arithmetic() -> Iterator[Template]:
    names = ["add", "or", "adc", "sbb", "and", "sub", "xor", "cmp"]
    for n, name in enumerate(names):
        undefined = ("AF",) if name in {"or", "and", "xor"} else ()
        reads = frozenset({"CF"}) if name in {"adc", "sbb"} else frozenset()

        def to_rm(ctx: Context, size: int, n: int = n, undefined: tuple[str, ...] = undefined) -> bytes:
            ctx.define_all(*undefined)
            return _encode(ctx, size, _op(size, n << 3), ctx.src(), ctx.rm(size, write=True))

        def from_rm(ctx: Context, size: int, n: int = n, undefined: tuple[str, ...] = undefined) -> bytes:
            ctx.define_all(*undefined)
            return _encode(ctx, size, _op(size, n << 3 | 2), ctx.dst(), ctx.rm(size))

        def by_imm(ctx: Context, size: int, n: int = n, undefined: tuple[str, ...] = undefined) -> bytes:
            ctx.define_all(*undefined)
            rm = ctx.rm(size, write=True)
            if size > 1 and ctx.rng.random() < 0.5:
                return _encode(ctx, size, b"\x83", n, rm, ctx.imm(1))
            return _encode(ctx, size, _op(size, 0x80), n, rm, ctx.imm(min(size, 4)))

        def locked(ctx: Context, size: int, n: int = n, undefined: tuple[str, ...] = undefined) -> bytes:
            ctx.define_all(*undefined)
            rm = ctx.mem(size) if ctx.memory else ctx.dst()
            return (b"\xf0" if ctx.memory else b"") + _encode(ctx, size, _op(size, n << 3), ctx.src(), rm)

        yield from _each_size(f"{name}_rm_r", to_rm, "arith", reads)
        yield from _each_size(f"{name}_r_rm", from_rm, "arith", reads)
        yield from _each_size(f"{name}_imm", by_imm, "arith", reads)
        if name != "cmp":
            yield from _each_size(f"lock_{name}", locked, "arith", reads)


def _unary() -> Iterator[Template]:
    def test(ctx: Context, size: int) -> bytes:
        ctx.define_all("AF")
        if ctx.rng.random() < 0.5:
            return _encode(ctx, size, _op(size, 0x84), ctx.src(), ctx.rm(size))
        return _encode(ctx, size, _op(size, 0xF6), 0, ctx.rm(size), ctx.imm(min(size, 4)))

    def inc(ctx: Context, size: int) -> bytes:
        ctx.define("OF", "SF", "ZF", "AF", "PF")
        return _encode(ctx, size, _op(size, 0xFE), ctx.rng.randrange(2), ctx.rm(size, write=True))

    def neg(ctx: Context, size: int) -> bytes:
        ctx.define_all()
        return _encode(ctx, size, _op(size, 0xF6), 3, ctx.rm(size, write=True))

    def complement(ctx: Context, size: int) -> bytes:
        return _encode(ctx, size, _op(size, 0xF6), 2, ctx.rm(size, write=True))

    def xadd(ctx: Context, size: int) -> bytes:
        ctx.define_all()
        return _encode(ctx, size, b"\x0f" + _op(size, 0xC0), ctx.dst(), ctx.rm(size, write=True))

    def cmpxchg(ctx: Context, size: int) -> bytes:
        ctx.define_all()
        return _encode(ctx, size, b"\x0f" + _op(size, 0xB0), ctx.src(), ctx.rm(size, write=True))

    yield from _each_size("test", test, "arith")
    yield from _each_size("inc_dec", inc, "arith")
    yield from _each_size("neg", neg, "arith")
    yield from _each_size("not", complement, "arith")
    yield from _each_size("xadd", xadd, "arith")
    yield from _each_size("cmpxchg", cmpxchg, "arith")

    def pair(ctx: Context) -> bytes:
        wide = ctx.rng.random() < 0.5
        ctx.define("ZF")
        rm = ctx.mem(16, aligned=wide) if ctx.memory else Mem(RSI, 0)
        if not ctx.memory:
            ctx.gpr[RSI] = WINDOW
        lock = b"\xf0" if ctx.rng.random() < 0.5 else b""
        return lock + modrm(b"\x0f\xc7", 1, rm, wide=wide)

    yield Template("cmpxchg8b_16b", "arith", pair)


# --- multiplication and division


def _multiply() -> Iterator[Template]:
    undefined = ("SF", "ZF", "AF", "PF")

    def mul(ctx: Context, size: int) -> bytes:
        ctx.define_all(*undefined)
        return _encode(ctx, size, _op(size, 0xF6), ctx.rng.choice([4, 5]), ctx.rm(size))

    def imul2(ctx: Context, size: int) -> bytes:
        ctx.define_all(*undefined)
        return _encode(ctx, size, b"\x0f\xaf", ctx.dst(), ctx.rm(size))

    def imul3(ctx: Context, size: int) -> bytes:
        ctx.define_all(*undefined)
        if ctx.rng.random() < 0.5:
            return _encode(ctx, size, b"\x6b", ctx.dst(), ctx.rm(size), ctx.imm(1))
        return _encode(ctx, size, b"\x69", ctx.dst(), ctx.rm(size), ctx.imm(min(size, 4)))

    def div(ctx: Context, size: int) -> bytes:
        ctx.undefine(*ALL_FLAGS)
        if ctx.rng.random() < 0.6:
            # A dividend that fits: the high half is zero (AH), or the sign.
            head = b"\x31\xd2" if ctx.rng.random() < 0.5 else b"\x48\x99"
            head = b"\x0f\xb6\xc0" if size == 1 else head
        else:
            head = b""
        return head + _encode(ctx, size, _op(size, 0xF6), ctx.rng.choice([6, 7]), ctx.rm(size))

    yield from _each_size("mul_imul", mul, "muldiv")
    yield from _each_size("imul_r_rm", imul2, "muldiv", sizes=(2, 4, 8))
    yield from _each_size("imul_r_rm_imm", imul3, "muldiv", sizes=(2, 4, 8))
    yield from _each_size("div_idiv", div, "muldiv")

    def convert(ctx: Context) -> bytes:
        return ctx.rng.choice([b"\x98", b"\x66\x98", b"\x48\x98", b"\x99", b"\x66\x99", b"\x48\x99"])

    yield Template("cbw_cwd", "muldiv", convert)


# --- shifts and rotates


def _shifts() -> Iterator[Template]:
    names = ["rol", "ror", "rcl", "rcr", "shl", "shr", "sal", "sar"]

    def flags(ctx: Context, n: int, size: int, count: int | None) -> None:
        """`count` is None if a register holds it, so that what it defines cannot be told."""
        rotates = n < 4
        if count is None:
            ctx.undefine("OF", *(() if rotates else ("AF",)))
            if not rotates and n != 7 and size < 4:
                ctx.undefine("CF")
            return
        count &= 63 if size == 8 else 31
        if count == 0:
            return
        if rotates:
            ctx.define("CF", "OF")
        else:
            ctx.define_all("AF")
        if count != 1:
            ctx.undefine("OF")
        if not rotates and n != 7 and count >= 8 * size:
            ctx.undefine("CF")

    for n, name in enumerate(names):
        reads = frozenset({"CF"}) if name in {"rcl", "rcr"} else frozenset()

        def once(ctx: Context, size: int, n: int = n) -> bytes:
            flags(ctx, n, size, 1)
            return _encode(ctx, size, _op(size, 0xD0), n, ctx.rm(size, write=True))

        def by_cl(ctx: Context, size: int, n: int = n) -> bytes:
            flags(ctx, n, size, None)
            return _encode(ctx, size, _op(size, 0xD2), n, ctx.rm(size, write=True))

        def by_imm(ctx: Context, size: int, n: int = n) -> bytes:
            count = ctx.imm8()
            flags(ctx, n, size, count)
            return _encode(ctx, size, _op(size, 0xC0), n, ctx.rm(size, write=True), bytes([count]))

        yield from _each_size(f"{name}_1", once, "shift", reads)
        yield from _each_size(f"{name}_cl", by_cl, "shift", reads)
        yield from _each_size(f"{name}_imm", by_imm, "shift", reads)

    def double(ctx: Context, size: int) -> bytes:
        opcode = ctx.rng.choice([0xA4, 0xAC])
        # A 16-bit operand has no defined result for counts above 16.
        count = ctx.rng.randrange(16) if size == 2 else ctx.imm8()
        effective = count & (63 if size == 8 else 31)
        if effective:
            ctx.define_all("AF", *(() if effective == 1 else ("OF",)))
        rm = ctx.rm(size, write=True)
        return _encode(ctx, size, bytes([0x0F, opcode]), ctx.src(), rm, bytes([count]))

    def double_cl(ctx: Context, size: int) -> bytes:
        ctx.undefine("AF", "OF")
        rm = ctx.rm(size, write=True)
        return _encode(ctx, size, bytes([0x0F, ctx.rng.choice([0xA5, 0xAD])]), ctx.src(), rm)

    yield from _each_size("shld_shrd_imm", double, "shift", sizes=(2, 4, 8))
    yield from _each_size("shld_shrd_cl", double_cl, "shift", sizes=(4, 8))


# --- bits


def _bits() -> Iterator[Template]:
    def bt_imm(ctx: Context, size: int) -> bytes:
        ctx.define("CF")
        ctx.undefine("OF", "SF", "AF", "PF")
        lock = ctx.memory and ctx.rng.random() < 0.3
        op = ctx.rng.choice([5, 6, 7] if lock else [4, 5, 6, 7])
        rm = ctx.mem(size) if lock else ctx.rm(size, write=True)
        return (b"\xf0" if lock else b"") + _encode(ctx, size, b"\x0f\xba", op, rm, ctx.imm(1))

    def bt_reg(ctx: Context, size: int) -> bytes:
        ctx.define("CF")
        ctx.undefine("OF", "SF", "AF", "PF")
        opcode = bytes([0x0F, ctx.rng.choice([0xA3, 0xAB, 0xB3, 0xBB])])
        if ctx.memory and ctx.rng.random() < 0.5:
            # The offset reaches as far as the window: a few hundred bits either way.
            ctx.gpr[RDX] = ctx.rng.randrange(-300, 300) & ((1 << 64) - 1)
            return _encode(ctx, size, opcode, RDX, Mem(RSI, WINDOW + 128 - ctx.gpr[RSI]))
        return _encode(ctx, size, opcode, ctx.src(), ctx.dst())

    def scan(ctx: Context, size: int) -> bytes:
        ctx.define("ZF")
        ctx.undefine("CF", "OF", "SF", "AF", "PF")
        # The destination keeps its value for a source of zero: Intel documents it since 2023, and always did it; but
        # the upper half of a 32-bit destination is undefined then, so the source is never zero here.
        rm = ctx.dst()
        head = modrm(b"\x83", 1, rm, wide=True, imm=b"\x40")
        return head + _encode(ctx, size, bytes([0x0F, ctx.rng.choice([0xBC, 0xBD])]), ctx.dst(), rm)

    def count(ctx: Context, size: int) -> bytes:
        ctx.define("CF", "ZF")
        ctx.undefine("OF", "SF", "AF", "PF")
        opcode = bytes([0x0F, ctx.rng.choice([0xBC, 0xBD])])
        return _repeat(_encode(ctx, size, opcode, ctx.dst(), ctx.rm(size)))

    def popcnt(ctx: Context, size: int) -> bytes:
        ctx.define_all()
        return _repeat(_encode(ctx, size, b"\x0f\xb8", ctx.dst(), ctx.rm(size)))

    def swap(ctx: Context) -> bytes:
        reg = ctx.dst()
        wide = ctx.rng.random() < 0.5
        return bytes([0x40 | wide << 3 | reg >> 3, 0x0F, 0xC8 | reg & 7])

    def movbe(ctx: Context, size: int) -> bytes:
        if not ctx.memory:
            return b"\x90"
        store = ctx.rng.random() < 0.5
        reg = ctx.src() if store else ctx.dst()
        return _encode(ctx, size, b"\x0f\x38\xf1" if store else b"\x0f\x38\xf0", reg, ctx.mem(size))

    def crc(ctx: Context, size: int) -> bytes:
        opcode = b"\x0f\x38\xf0" if size == 1 else b"\x0f\x38\xf1"
        return _repeat(_encode(ctx, size, opcode, ctx.dst(), ctx.rm(size)), b"\xf2")

    sizes = (2, 4, 8)
    yield from _each_size("bt_imm", bt_imm, "bit", sizes=sizes)
    yield from _each_size("bt_reg", bt_reg, "bit", sizes=sizes)
    yield from _each_size("bsf_bsr", scan, "bit", sizes=sizes)
    yield from _each_size("tzcnt_lzcnt", count, "bit", sizes=sizes)
    yield from _each_size("popcnt", popcnt, "bit", sizes=sizes)
    yield Template("bswap", "bit", swap)
    yield from _each_size("movbe", movbe, "bit", sizes=sizes)
    yield from _each_size("crc32", crc, "bit")


def _repeat(code: bytes, prefix: bytes = b"\xf3") -> bytes:
    """The mandatory prefix goes before REX, and anywhere among the others."""
    return prefix + code


def _bmi() -> Iterator[Template]:
    def three(opcode: int, pp: int, undefined: tuple[str, ...] | None) -> Callable[[Context, int], bytes]:
        def emit(ctx: Context, size: int) -> bytes:
            if undefined is not None:
                ctx.define_all(*undefined)
            # MULX writes both registers.
            other = ctx.dst() if opcode == 0xF6 else ctx.src()
            return vex(opcode, ctx.dst(), other, ctx.rm(size), space=2, pp=pp, wide=size == 8)

        return emit

    sizes = (4, 8)
    rows = [
        ("andn", 0xF2, 0, ("AF", "PF")),
        ("bextr", 0xF7, 0, ("AF", "SF", "PF")),
        ("bzhi", 0xF5, 0, ("AF", "PF")),
        ("shlx", 0xF7, 1, None),
        ("sarx", 0xF7, 2, None),
        ("shrx", 0xF7, 3, None),
        ("pdep", 0xF5, 3, None),
        ("pext", 0xF5, 2, None),
        ("mulx", 0xF6, 3, None),
    ]
    for name, opcode, pp, undefined in rows:
        yield from _each_size(name, three(opcode, pp, undefined), "bmi", sizes=sizes)

    def lowest(ctx: Context, size: int) -> bytes:
        ctx.define_all("AF", "PF")
        return vex(0xF3, ctx.rng.choice([1, 2, 3]), ctx.dst(), ctx.rm(size), space=2, wide=size == 8)

    def rorx(ctx: Context, size: int) -> bytes:
        return vex(0xF0, ctx.dst(), 0, ctx.rm(size), space=3, pp=3, wide=size == 8, imm=ctx.imm(1))

    def adx(ctx: Context, size: int) -> bytes:
        prefix = ctx.rng.choice([b"\x66", b"\xf3"])
        return modrm(b"\x0f\x38\xf6", ctx.dst(), ctx.rm(size), prefix=prefix, wide=size == 8)

    yield from _each_size("blsi_blsmsk_blsr", lowest, "bmi", sizes=sizes)
    yield from _each_size("rorx", rorx, "bmi", sizes=sizes)
    yield from _each_size("adcx_adox", adx, "bmi", frozenset({"CF", "OF"}), sizes=sizes)


# --- moves


def _moves() -> Iterator[Template]:
    def mov(ctx: Context, size: int) -> bytes:
        kind = ctx.rng.randrange(3)
        if kind == 0:
            return _encode(ctx, size, _op(size, 0x88), ctx.src(), ctx.rm(size, write=True))
        if kind == 1:
            return _encode(ctx, size, _op(size, 0x8A), ctx.dst(), ctx.rm(size))
        return _encode(ctx, size, _op(size, 0xC6), 0, ctx.rm(size, write=True), ctx.imm(min(size, 4)))

    def widen(ctx: Context, size: int) -> bytes:
        opcode, source = ctx.rng.choice([(0xB6, 1), (0xB7, 2), (0xBE, 1), (0xBF, 2)])
        prefix = b"\x66" if size == 2 else b""
        rm = ctx.rm(source)
        return modrm(bytes([0x0F, opcode]), ctx.dst(), rm, prefix=prefix, wide=size == 8, rex=True)

    def movsxd(ctx: Context) -> bytes:
        return modrm(b"\x63", ctx.dst(), ctx.rm(4), wide=True)

    def xchg(ctx: Context, size: int) -> bytes:
        return _encode(ctx, size, _op(size, 0x86), ctx.dst(), ctx.rm(size, write=True))

    def lea(ctx: Context, size: int) -> bytes:
        index = ctx.rng.choice([n for n in range(16) if n != 4])
        rm = Mem(ctx.src(), ctx.rng.randrange(-(1 << 31), 1 << 31), index, ctx.rng.randrange(4))
        prefix = ctx.rng.choice([b"", b"\x67"])
        return prefix + _encode(ctx, size, b"\x8d", ctx.dst(), rm)

    def imm64(ctx: Context) -> bytes:
        reg = ctx.dst()
        return bytes([0x48 | reg >> 3, 0xB8 | reg & 7]) + isa_values.integer(ctx.rng).to_bytes(8, "little")

    def stack(ctx: Context) -> bytes:
        reg = ctx.dst()
        rex = bytes([0x41]) if reg > 7 else b""
        prefix = ctx.rng.choice([b"", b"", b"\x66"])
        kind = ctx.rng.randrange(4)
        if kind == 0:
            return prefix + rex + bytes([0x50 | reg & 7])
        if kind == 1:
            return prefix + rex + bytes([0x58 | reg & 7])
        if kind == 2:
            return b"\x6a" + ctx.imm(1)
        return b"\x68" + ctx.imm(4)

    yield from _each_size("mov", mov, "mov")
    yield from _each_size("movzx_movsx", widen, "mov", sizes=(2, 4, 8))
    yield Template("movsxd", "mov", movsxd)
    yield from _each_size("xchg", xchg, "mov")
    yield from _each_size("lea", lea, "mov", sizes=(2, 4, 8))
    yield Template("mov_imm64", "mov", imm64)
    yield Template("push_pop", "mov", stack)

    def leave(ctx: Context) -> bytes:
        # A frame pointer into the upper half would read the memory of the oracle's own kernel.
        ctx.gpr[RBP] = ctx.rng.choice([WINDOW + 128, WINDOW + 64, 1 << 63, MISSING])
        return ctx.rng.choice([b"\xc9", b"\xc8\x10\x00\x00", b"\xc8\x08\x00\x02"])

    yield Template("enter_leave", "mov", leave)


def _conditional() -> Iterator[Template]:
    for n, condition in enumerate(_CONDITIONS):
        reads = frozenset(_CONDITION_FLAGS[n >> 1])

        def setcc(ctx: Context, n: int = n) -> bytes:
            return _encode(ctx, 1, bytes([0x0F, 0x90 | n]), 0, ctx.rm(1, write=True))

        def cmov(ctx: Context, size: int, n: int = n) -> bytes:
            return _encode(ctx, size, bytes([0x0F, 0x40 | n]), ctx.dst(), ctx.rm(size))

        def jump(ctx: Context, n: int = n) -> bytes:
            # Over one instruction, or not.
            over = modrm(b"\x8d", ctx.dst(), Mem(ctx.src(), 1), wide=True)
            if ctx.rng.random() < 0.5:
                return bytes([0x70 | n, len(over)]) + over
            return bytes([0x0F, 0x80 | n]) + len(over).to_bytes(4, "little") + over

        yield Template(f"set{condition}", "flags", setcc, reads)
        yield from _each_size(f"cmov{condition}", cmov, "flags", reads, sizes=(2, 4, 8))
        yield Template(f"j{condition}", "flags", jump, reads)

    def simple(code: bytes, defines: tuple[str, ...]) -> Callable[[Context], bytes]:
        def emit(ctx: Context) -> bytes:
            ctx.define(*defines)
            return code

        return emit

    yield Template("clc", "flags", simple(b"\xf8", ("CF",)))
    yield Template("stc", "flags", simple(b"\xf9", ("CF",)))
    yield Template("cmc", "flags", simple(b"\xf5", ()), frozenset({"CF"}))
    yield Template("cld", "flags", simple(b"\xfc", ()))
    yield Template("std", "flags", simple(b"\xfd", ()))
    yield Template("sahf", "flags", simple(b"\x9e", ("CF", "PF", "AF", "ZF", "SF")))
    yield Template("lahf", "flags", simple(b"\x9f", ()), ALL_FLAGS)

    def loop(ctx: Context) -> bytes:
        over = modrm(b"\x8d", ctx.dst(), Mem(ctx.src(), 1), wide=True)
        prefix = ctx.rng.choice([b"", b"\x67"])
        return prefix + bytes([ctx.rng.choice([0xE0, 0xE1, 0xE2, 0xE3]), len(over)]) + over

    yield Template("loop_jcxz", "flags", loop, frozenset({"ZF"}))


# --- strings


def _strings() -> Iterator[Template]:
    def prepare(ctx: Context) -> None:
        ctx.gpr[RSI] = WINDOW + ctx.rng.randrange(256)
        ctx.gpr[RDI] = WINDOW + ctx.rng.choice([ctx.rng.randrange(256), 0x1080 - ctx.rng.randrange(40), 128])
        ctx.gpr[RCX] = ctx.rng.choice([0, 1, 2, ctx.rng.randrange(40)])
        if ctx.rng.random() < 0.3:
            ctx.gpr[RAX] = ctx.rng.choice([0, 0x3F80_0000, 0x80])

    def emit(ctx: Context, size: int, opcode: int) -> bytes:
        prepare(ctx)
        rep = ctx.rng.choice([b"", b"\xf3", b"\xf3", b"\xf2"])
        head = b"\x66" if size == 2 else b""
        address = ctx.rng.choice([b"", b"", b"", b"\x67"])
        rex = b"\x48" if size == 8 else b""
        return address + head + rep + rex + _op(size, opcode)

    for name, opcode in [("movs", 0xA4), ("cmps", 0xA6), ("stos", 0xAA), ("lods", 0xAC), ("scas", 0xAE)]:

        def one(ctx: Context, size: int, opcode: int = opcode) -> bytes:
            return emit(ctx, size, opcode)

        reads = ALL_FLAGS if name in {"cmps", "scas"} else frozenset()
        yield from _each_size(name, one, "string", reads)


INTEGER = [
    *_arithmetic(),
    *_unary(),
    *_multiply(),
    *_shifts(),
    *_bits(),
    *_bmi(),
    *_moves(),
    *_conditional(),
]
STRINGS = list(_strings())
