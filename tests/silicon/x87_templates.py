"""Templates of x87 instructions."""

from collections.abc import Callable, Iterator

from isa_context import ALL_FLAGS, Context, Template
from isa_encoding import modrm

_C = 0x4700


def _register(first: int, second: int) -> Callable[[Context], bytes]:
    def emit(ctx: Context) -> bytes:
        return bytes([first, second | ctx.rng.randrange(8)])

    return emit


def _plain(second: int) -> Callable[[Context], bytes]:
    def emit(ctx: Context) -> bytes:
        return bytes([0xD9, second])

    return emit


def _memory(first: int, op: int, size: int) -> Callable[[Context], bytes]:
    def emit(ctx: Context) -> bytes:
        if not ctx.memory:
            return b"\xd9\xd0"
        return modrm(bytes([first]), op, ctx.mem(size))

    return emit


def _arith() -> Iterator[Template]:
    names = ["fadd", "fmul", "fcom", "fcomp", "fsub", "fsubr", "fdiv", "fdivr"]
    for n, name in enumerate(names):
        yield Template(f"{name}_m32", "x87", _memory(0xD8, n, 4))
        yield Template(f"{name}_m64", "x87", _memory(0xDC, n, 8))
        yield Template(f"{name}_i32", "x87", _memory(0xDA, n, 4))
        yield Template(f"{name}_i16", "x87", _memory(0xDE, n, 2))
        yield Template(f"{name}_st", "x87", _register(0xD8, 0xC0 | n << 3))
        if n not in {2, 3}:
            yield Template(f"{name}_to", "x87", _register(0xDC, 0xC0 | n << 3))
            yield Template(f"{name}_pop", "x87", _register(0xDE, 0xC0 | n << 3))
    yield Template("fcompp", "x87", lambda ctx: b"\xde\xd9")
    yield Template("fucompp", "x87", lambda ctx: b"\xda\xe9")
    yield Template("fucom", "x87", _register(0xDD, 0xE0))
    yield Template("fucomp", "x87", _register(0xDD, 0xE8))


def _flags() -> Iterator[Template]:
    for name, first, second in [
        ("fcomi", 0xDB, 0xF0),
        ("fucomi", 0xDB, 0xE8),
        ("fcomip", 0xDF, 0xF0),
        ("fucomip", 0xDF, 0xE8),
    ]:

        def emit(ctx: Context, first: int = first, second: int = second) -> bytes:
            ctx.define_all()
            return bytes([first, second | ctx.rng.randrange(8)])

        yield Template(name, "x87", emit)
    for first in (0xDA, 0xDB):
        for second in (0xC0, 0xC8, 0xD0, 0xD8):
            yield Template(f"fcmov_{first:x}_{second:x}", "x87", _register(first, second), ALL_FLAGS)


def _moves() -> Iterator[Template]:
    for name, first, op, size in [
        ("fld_m32", 0xD9, 0, 4),
        ("fst_m32", 0xD9, 2, 4),
        ("fstp_m32", 0xD9, 3, 4),
        ("fld_m64", 0xDD, 0, 8),
        ("fst_m64", 0xDD, 2, 8),
        ("fstp_m64", 0xDD, 3, 8),
        ("fld_m80", 0xDB, 5, 10),
        ("fstp_m80", 0xDB, 7, 10),
        ("fild_m16", 0xDF, 0, 2),
        ("fild_m32", 0xDB, 0, 4),
        ("fild_m64", 0xDF, 5, 8),
        ("fist_m16", 0xDF, 2, 2),
        ("fist_m32", 0xDB, 2, 4),
        ("fistp_m16", 0xDF, 3, 2),
        ("fistp_m32", 0xDB, 3, 4),
        ("fistp_m64", 0xDF, 7, 8),
        ("fisttp_m16", 0xDF, 1, 2),
        ("fisttp_m32", 0xDB, 1, 4),
        ("fisttp_m64", 0xDD, 1, 8),
        ("fbstp", 0xDF, 6, 10),
        ("fnstcw", 0xD9, 7, 2),
        ("fldcw", 0xD9, 5, 2),
        ("fnstsw", 0xDD, 7, 2),
    ]:
        yield Template(name, "x87", _memory(first, op, size))
    yield Template("fld_st", "x87", _register(0xD9, 0xC0))
    yield Template("fxch", "x87", _register(0xD9, 0xC8))
    yield Template("fst_st", "x87", _register(0xDD, 0xD0))
    yield Template("fstp_st", "x87", _register(0xDD, 0xD8))
    yield Template("ffree", "x87", _register(0xDD, 0xC0))
    yield Template("fnstsw_ax", "x87", lambda ctx: b"\xdf\xe0")
    yield Template("fwait", "x87", lambda ctx: b"\x9b")
    yield Template("fninit", "x87", lambda ctx: b"\xdb\xe3")
    yield Template("fnclex", "x87", lambda ctx: b"\xdb\xe2")
    for name, second in [
        ("fchs", 0xE0),
        ("fabs", 0xE1),
        ("ftst", 0xE4),
        ("fxam", 0xE5),
        ("fld1", 0xE8),
        ("fldl2t", 0xE9),
        ("fldl2e", 0xEA),
        ("fldpi", 0xEB),
        ("fldlg2", 0xEC),
        ("fldln2", 0xED),
        ("fldz", 0xEE),
        ("fnop", 0xD0),
        ("fdecstp", 0xF6),
        ("fincstp", 0xF7),
    ]:
        yield Template(name, "x87", _plain(second))


def _exact() -> Iterator[Template]:
    for name, second in [
        ("fsqrt", 0xFA),
        ("frndint", 0xFC),
        ("fscale", 0xFD),
        ("fxtract", 0xF4),
        ("fprem", 0xF8),
        ("fprem1", 0xF5),
    ]:
        yield Template(name, "x87", _plain(second))


def _environment() -> Iterator[Template]:
    for name, first, op, size in [
        ("fnstenv", 0xD9, 6, 28),
        ("fldenv", 0xD9, 4, 28),
        ("fnsave", 0xDD, 6, 108),
        ("frstor", 0xDD, 4, 108),
    ]:
        yield Template(name, "x87", _memory(first, op, size))


def _approximate() -> Iterator[Template]:
    """Only for operands in the range where the function is defined: others are undefined, and differ."""
    for name, second in [("fsin", 0xFE), ("fcos", 0xFF), ("fpatan", 0xF3), ("fyl2x", 0xF1)]:

        def emit(ctx: Context, second: int = second) -> bytes:
            # Constants that are well inside every domain, and far from multiples of pi.
            ctx.loose = True
            load = bytes([0xD9, ctx.rng.choice([0xE8, 0xEA, 0xED])])
            return b"\xdb\xe3" + load + bytes([0xD9, ctx.rng.choice([0xE8, 0xEA]), 0xD9, second])

        yield Template(name, "x87", emit)


TRANSCENDENTAL = list(_approximate())
X87 = [*_arith(), *_flags(), *_moves(), *_exact(), *_environment()]
