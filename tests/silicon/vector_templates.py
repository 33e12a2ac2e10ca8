"""Templates of MMX, SSE to SSE4.2, AES, PCLMULQDQ and SHA instructions."""

from collections.abc import Callable, Iterator

from isa_context import Context, Template
from isa_encoding import RDI, modrm
from isa_records import WINDOW

P66, PF3, PF2, NONE = b"\x66", b"\xf3", b"\xf2", b""


def _xmm(family: str, table: str, *, imm: bool = False, defines: bool = False) -> Iterator[Template]:
    """Rows "name prefix opcode [bytes of memory]": xmm, xmm/m."""
    for row in table.split("\n"):
        if not row.strip():
            continue
        name, prefix, opcode, *rest = row.split()
        size = int(rest[0]) if rest else 16
        loose = "~" in name

        def emit(
            ctx: Context,
            prefix: bytes = bytes.fromhex(prefix.replace("-", "")),
            opcode: bytes = bytes.fromhex(opcode),
            size: int = size,
            loose: bool = loose,
        ) -> bytes:
            if defines:
                ctx.define_all()
            ctx.loose |= loose
            tail = bytes([ctx.imm8()]) if imm else b""
            return modrm(opcode, ctx.xmm(), ctx.xmm_rm(size), prefix=prefix, imm=tail)

        yield Template(name.strip("~"), family, emit)


_BOTH = """
60 punpcklbw|61 punpcklwd|62 punpckldq|63 packsswb|64 pcmpgtb|65 pcmpgtw|66 pcmpgtd|67 packuswb|68 punpckhbw
69 punpckhwd|6a punpckhdq|6b packssdw|74 pcmpeqb|75 pcmpeqw|76 pcmpeqd|d1 psrlw|d2 psrld|d3 psrlq|d4 paddq|d5 pmullw
d8 psubusb|d9 psubusw|da pminub|db pand|dc paddusb|dd paddusw|de pmaxub|df pandn|e0 pavgb|e1 psraw|e2 psrad|e3 pavgw
e4 pmulhuw|e5 pmulhw|e8 psubsb|e9 psubsw|ea pminsw|eb por|ec paddsb|ed paddsw|ee pmaxsw|ef pxor|f1 psllw|f2 pslld
f3 psllq|f4 pmuludq|f5 pmaddwd|f6 psadbw|f8 psubb|f9 psubw|fa psubd|fb psubq|fc paddb|fd paddw|fe paddd
3800 pshufb|3801 phaddw|3802 phaddd|3803 phaddsw|3804 pmaddubsw|3805 phsubw|3806 phsubd|3807 phsubsw|3808 psignb
3809 psignw|380a psignd|380b pmulhrsw|381c pabsb|381d pabsw|381e pabsd
"""


def _both() -> Iterator[Template]:
    for item in _BOTH.replace("\n", "|").strip("|").split("|"):
        opcode, name = item.split()
        code = b"\x0f" + bytes.fromhex(opcode)

        def xmm(ctx: Context, code: bytes = code) -> bytes:
            return modrm(code, ctx.xmm(), ctx.xmm_rm(), prefix=P66)

        def mmx(ctx: Context, code: bytes = code, narrow: bool = name.startswith("punpckl")) -> bytes:
            return modrm(code, ctx.mm(), ctx.mm_rm(4 if narrow else 8))

        yield Template(name, "sse_int", xmm)
        yield Template(f"{name}_mmx", "mmx", mmx)


_SSE2_INT = """
punpcklqdq 66 0f6c
punpckhqdq 66 0f6d
movdqa 66 0f6f
packusdw 66 0f382b
pcmpeqq 66 0f3829
pcmpgtq 66 0f3837
pminsb 66 0f3838
pminsd 66 0f3839
pminuw 66 0f383a
pminud 66 0f383b
pmaxsb 66 0f383c
pmaxsd 66 0f383d
pmaxuw 66 0f383e
pmaxud 66 0f383f
pmulld 66 0f3840
pmuldq 66 0f3828
phminposuw 66 0f3841
pblendvb 66 0f3810
blendvps 66 0f3814
blendvpd 66 0f3815
pmovsxbw 66 0f3820 8
pmovsxbd 66 0f3821 4
pmovsxbq 66 0f3822 2
pmovsxwd 66 0f3823 8
pmovsxwq 66 0f3824 4
pmovsxdq 66 0f3825 8
pmovzxbw 66 0f3830 8
pmovzxbd 66 0f3831 4
pmovzxbq 66 0f3832 2
pmovzxwd 66 0f3833 8
pmovzxwq 66 0f3834 4
pmovzxdq 66 0f3835 8
unpcklps - 0f14
unpcklpd 66 0f14
unpckhps - 0f15
unpckhpd 66 0f15
movaps - 0f28
movups - 0f10
movdqu f3 0f6f
lddqu f2 0ff0
movshdup f3 0f16
movsldup f3 0f12
movddup f2 0f12 8
movq f3 0f7e 8
andps - 0f54
andnps - 0f55
orps - 0f56
xorpd 66 0f57
"""
_IMM_INT = """
pshufd 66 0f70
pshufhw f3 0f70
pshuflw f2 0f70
shufps - 0fc6
shufpd 66 0fc6
palignr 66 0f3a0f
pblendw 66 0f3a0e
blendps 66 0f3a0c
blendpd 66 0f3a0d
insertps 66 0f3a21 4
mpsadbw 66 0f3a42
"""
_FLOAT = """
addps - 0f58
addpd 66 0f58
addss f3 0f58 4
addsd f2 0f58 8
mulps - 0f59
mulpd 66 0f59
mulss f3 0f59 4
mulsd f2 0f59 8
subps - 0f5c
subpd 66 0f5c
subss f3 0f5c 4
subsd f2 0f5c 8
minps - 0f5d
minpd 66 0f5d
minss f3 0f5d 4
minsd f2 0f5d 8
divps - 0f5e
divpd 66 0f5e
divss f3 0f5e 4
divsd f2 0f5e 8
maxps - 0f5f
maxpd 66 0f5f
maxss f3 0f5f 4
maxsd f2 0f5f 8
sqrtps - 0f51
sqrtpd 66 0f51
sqrtss f3 0f51 4
sqrtsd f2 0f51 8
addsubps f2 0fd0
addsubpd 66 0fd0
haddps f2 0f7c
haddpd 66 0f7c
hsubps f2 0f7d
hsubpd 66 0f7d
cvtps2pd - 0f5a 8
cvtpd2ps 66 0f5a
cvtss2sd f3 0f5a 4
cvtsd2ss f2 0f5a 8
cvtdq2ps - 0f5b
cvtps2dq 66 0f5b
cvttps2dq f3 0f5b
cvtdq2pd f3 0fe6 8
cvtpd2dq f2 0fe6
cvttpd2dq 66 0fe6
"""
_APPROXIMATE = """
~rcpps - 0f53
~rcpss f3 0f53 4
~rsqrtps - 0f52
~rsqrtss f3 0f52 4
"""
_FLOAT_FLAGS = """
ucomiss - 0f2e 4
ucomisd 66 0f2e 8
comiss - 0f2f 4
comisd 66 0f2f 8
"""
_FLOAT_IMM = """
roundps 66 0f3a08
roundpd 66 0f3a09
roundss 66 0f3a0a 4
roundsd 66 0f3a0b 8
dpps 66 0f3a40
dppd 66 0f3a41
"""
_CRYPTO = """
aesenc 66 0f38dc
aesenclast 66 0f38dd
aesdec 66 0f38de
aesdeclast 66 0f38df
aesimc 66 0f38db
gf2p8mulb 66 0f38cf
sha1nexte - 0f38c8
sha1msg1 - 0f38c9
sha1msg2 - 0f38ca
sha256rnds2 - 0f38cb
sha256msg1 - 0f38cc
sha256msg2 - 0f38cd
"""
_CRYPTO_IMM = """
aeskeygenassist 66 0f3adf
pclmulqdq 66 0f3a44
gf2p8affineqb 66 0f3ace
gf2p8affineinvqb 66 0f3acf
sha1rnds4 - 0f3acc
"""
_TEXT = """
pcmpestrm 66 0f3a60
pcmpestri 66 0f3a61
pcmpistrm 66 0f3a62
pcmpistri 66 0f3a63
"""


def _compares() -> Iterator[Template]:
    for name, prefix, size in [("ps", NONE, 16), ("pd", P66, 16), ("ss", PF3, 4), ("sd", PF2, 8)]:

        def emit(ctx: Context, prefix: bytes = prefix, size: int = size) -> bytes:
            predicate = bytes([ctx.rng.randrange(8)])
            return modrm(b"\x0f\xc2", ctx.xmm(), ctx.xmm_rm(size), prefix=prefix, imm=predicate)

        yield Template(f"cmp{name}", "sse_float", emit)


def _shift_imm() -> Iterator[Template]:
    for opcode in (0x71, 0x72, 0x73):
        for op in (2, 4, 6) if opcode < 0x73 else (2, 3, 6, 7):

            def xmm(ctx: Context, opcode: int = opcode, op: int = op) -> bytes:
                count = ctx.rng.choice([ctx.rng.randrange(20), ctx.imm8()])
                return modrm(bytes([0x0F, opcode]), op, ctx.xmm(), prefix=P66, imm=bytes([count]))

            def mmx(ctx: Context, opcode: int = opcode, op: int = op) -> bytes:
                count = ctx.rng.choice([ctx.rng.randrange(20), ctx.imm8()])
                return modrm(bytes([0x0F, opcode]), op, ctx.mm(), imm=bytes([count]))

            if not (opcode == 0x73 and op == 4):
                yield Template(f"shift_{opcode:x}_{op}", "sse_int", xmm)
            if op not in {3, 7} and not (opcode == 0x73 and op == 4):
                yield Template(f"shift_{opcode:x}_{op}_mmx", "mmx", mmx)


def _transfers() -> Iterator[Template]:
    def general(prefix: bytes, opcodes: tuple[int, int], *, into_gpr: bool) -> Callable[[Context], bytes]:
        def emit(ctx: Context) -> bytes:
            wide = ctx.rng.random() < 0.5
            size = 8 if wide else 4
            opcode = bytes([0x0F, opcodes[into_gpr]])
            rm = ctx.rm(size, write=into_gpr)
            return modrm(opcode, ctx.xmm(), rm, prefix=prefix, wide=wide)

        return emit

    yield Template("movd_to_xmm", "sse_int", general(P66, (0x6E, 0x7E), into_gpr=False))
    yield Template("movd_from_xmm", "sse_int", general(P66, (0x6E, 0x7E), into_gpr=True))

    def convert_in(ctx: Context) -> bytes:
        wide = ctx.rng.random() < 0.5
        prefix = ctx.rng.choice([PF3, PF2])
        return modrm(b"\x0f\x2a", ctx.xmm(), ctx.rm(8 if wide else 4), prefix=prefix, wide=wide)

    def convert_out(ctx: Context) -> bytes:
        wide = ctx.rng.random() < 0.5
        prefix = ctx.rng.choice([PF3, PF2])
        opcode = bytes([0x0F, ctx.rng.choice([0x2C, 0x2D])])
        rm = ctx.xmm_rm(4 if prefix == PF3 else 8)
        return modrm(opcode, ctx.dst(), rm, prefix=prefix, wide=wide)

    yield Template("cvtsi2s", "sse_float", convert_in)
    yield Template("cvts2si", "sse_float", convert_out)

    def signs(ctx: Context) -> bytes:
        prefix, opcode = ctx.rng.choice([(P66, 0xD7), (NONE, 0x50), (P66, 0x50)])
        return modrm(bytes([0x0F, opcode]), ctx.dst(), ctx.xmm(), prefix=prefix)

    yield Template("movmsk", "sse_int", signs)

    def extract(ctx: Context) -> bytes:
        opcode, size, wide = ctx.rng.choice([(0x14, 1, 0), (0x15, 2, 0), (0x16, 4, 0), (0x16, 8, 1), (0x17, 4, 0)])
        code = bytes([0x0F, 0x3A, opcode])
        rm = ctx.rm(size, write=True)
        return modrm(code, ctx.xmm(), rm, prefix=P66, wide=bool(wide), imm=ctx.imm(1))

    def extract_word(ctx: Context) -> bytes:
        return modrm(b"\x0f\xc5", ctx.dst(), ctx.xmm(), prefix=P66, imm=ctx.imm(1))

    def insert(ctx: Context) -> bytes:
        code, size, wide = ctx.rng.choice(
            [(b"\x0f\x3a\x20", 1, 0), (b"\x0f\xc4", 2, 0), (b"\x0f\x3a\x22", 4, 0), (b"\x0f\x3a\x22", 8, 1)]
        )
        return modrm(code, ctx.xmm(), ctx.rm(size), prefix=P66, wide=bool(wide), imm=ctx.imm(1))

    yield Template("pextr", "sse_int", extract)
    yield Template("pextrw", "sse_int", extract_word)
    yield Template("pinsr", "sse_int", insert)

    def halves(ctx: Context) -> bytes:
        opcode = bytes([0x0F, ctx.rng.choice([0x12, 0x16])])
        prefix = ctx.rng.choice([NONE, P66]) if ctx.memory else NONE
        rm = ctx.mem(8) if ctx.memory else ctx.xmm()
        return modrm(opcode, ctx.xmm(), rm, prefix=prefix)

    def store(ctx: Context) -> bytes:
        prefix, opcode, size, aligned = ctx.rng.choice(
            [
                (NONE, 0x11, 16, False), (P66, 0x11, 16, False), (PF3, 0x11, 4, False), (PF2, 0x11, 8, False),
                (NONE, 0x29, 16, True), (P66, 0x29, 16, True), (P66, 0x7F, 16, True), (PF3, 0x7F, 16, False),
                (NONE, 0x13, 8, False), (P66, 0x17, 8, False), (P66, 0xD6, 8, False), (P66, 0xE7, 16, True),
                (NONE, 0x2B, 16, True),
            ]
        )  # fmt: skip
        memory_only = opcode in {0x13, 0x17, 0xE7, 0x2B}
        rm = ctx.mem(size, aligned=aligned) if ctx.memory else ctx.xmm()
        if memory_only and not ctx.memory:
            return b"\x90"
        return modrm(bytes([0x0F, opcode]), ctx.xmm(), rm, prefix=prefix)

    def scalar_load(ctx: Context) -> bytes:
        prefix, size = ctx.rng.choice([(PF3, 4), (PF2, 8)])
        return modrm(b"\x0f\x10", ctx.xmm(), ctx.xmm_rm(size), prefix=prefix)

    yield Template("mov_halves", "sse_int", halves)
    yield Template("mov_store", "sse_int", store)
    yield Template("movss_movsd", "sse_int", scalar_load)

    def masked(ctx: Context) -> bytes:
        ctx.gpr[RDI] = WINDOW + ctx.rng.randrange(240)
        return modrm(b"\x0f\xf7", ctx.xmm(), ctx.xmm(), prefix=P66)

    yield Template("maskmovdqu", "sse_int", masked)


def _mmx() -> Iterator[Template]:
    def to_mmx(ctx: Context) -> bytes:
        wide = ctx.rng.random() < 0.5
        return modrm(b"\x0f\x6e", ctx.mm(), ctx.rm(8 if wide else 4), wide=wide)

    def from_mmx(ctx: Context) -> bytes:
        wide = ctx.rng.random() < 0.5
        return modrm(b"\x0f\x7e", ctx.mm(), ctx.rm(8 if wide else 4, write=True), wide=wide)

    def plain(ctx: Context) -> bytes:
        return modrm(bytes([0x0F, ctx.rng.choice([0x6F, 0x7F])]), ctx.mm(), ctx.mm_rm())

    def shuffle(ctx: Context) -> bytes:
        code = ctx.rng.choice([b"\x0f\x70", b"\x0f\x3a\x0f"])
        return modrm(code, ctx.mm(), ctx.mm_rm(), imm=ctx.imm(1))

    def word(ctx: Context) -> bytes:
        if ctx.rng.random() < 0.5:
            return modrm(b"\x0f\xc4", ctx.mm(), ctx.rm(2), imm=ctx.imm(1))
        return modrm(b"\x0f\xc5", ctx.dst(), ctx.mm(), imm=ctx.imm(1))

    def signs(ctx: Context) -> bytes:
        return modrm(b"\x0f\xd7", ctx.dst(), ctx.mm())

    def across(ctx: Context) -> bytes:
        if ctx.rng.random() < 0.5:
            return modrm(b"\x0f\xd6", ctx.mm(), ctx.xmm(), prefix=PF2)
        return modrm(b"\x0f\xd6", ctx.xmm(), ctx.mm(), prefix=PF3)

    def convert_in(ctx: Context) -> bytes:
        prefix = ctx.rng.choice([NONE, P66])
        return modrm(b"\x0f\x2a", ctx.xmm(), ctx.mm_rm(), prefix=prefix)

    def convert_out(ctx: Context) -> bytes:
        prefix = ctx.rng.choice([NONE, P66])
        opcode = bytes([0x0F, ctx.rng.choice([0x2C, 0x2D])])
        return modrm(opcode, ctx.mm(), ctx.xmm_rm(8 if prefix == NONE else 16), prefix=prefix)

    def masked(ctx: Context) -> bytes:
        ctx.gpr[RDI] = WINDOW + ctx.rng.randrange(240)
        return modrm(b"\x0f\xf7", ctx.mm(), ctx.mm())

    def stream(ctx: Context) -> bytes:
        return modrm(b"\x0f\xe7", ctx.mm(), ctx.mem(8)) if ctx.memory else b"\x90"

    for name, emit in [
        ("movd_to_mmx", to_mmx), ("movd_from_mmx", from_mmx), ("movq_mmx", plain), ("pshufw_palignr", shuffle),
        ("pinsrw_pextrw_mmx", word), ("pmovmskb_mmx", signs), ("movdq2q_movq2dq", across), ("cvtpi2p", convert_in),
        ("cvtp2pi", convert_out), ("maskmovq", masked), ("movntq", stream),
    ]:  # fmt: skip
        yield Template(name, "mmx", emit)
    yield Template("emms", "mmx", lambda ctx: b"\x0f\x77")


def _text() -> Iterator[Template]:
    for template in _xmm("sse_text", _TEXT, imm=True, defines=True):

        def emit(ctx: Context, template: Template = template) -> bytes:
            for register in (0, 2):
                ctx.gpr[register] = ctx.rng.choice([ctx.rng.randrange(20), -ctx.rng.randrange(20) % (1 << 64)])
            return template.emit(ctx)

        yield Template(template.name, template.family, emit)


def _control() -> Iterator[Template]:
    def mxcsr(ctx: Context) -> bytes:
        return modrm(b"\x0f\xae", ctx.rng.choice([2, 3, 3]), ctx.mem(4)) if ctx.memory else b"\x90"

    yield Template("ldmxcsr_stmxcsr", "sse_float", mxcsr)


VECTOR_INT = [
    *(t for t in _both() if t.family == "sse_int"),
    *_xmm("sse_int", _SSE2_INT),
    *_xmm("sse_int", _IMM_INT, imm=True),
    *_xmm("sse_int", "ptest 66 0f3817", defines=True),
    *(t for t in _shift_imm() if t.family == "sse_int"),
    *(t for t in _transfers() if t.family == "sse_int"),
    *_xmm("crypto", _CRYPTO),
    *_xmm("crypto", _CRYPTO_IMM, imm=True),
    *_text(),
]
VECTOR_FLOAT = [
    *_xmm("sse_float", _FLOAT),
    *_xmm("sse_float", _FLOAT_FLAGS, defines=True),
    *_xmm("sse_float", _FLOAT_IMM, imm=True),
    *_compares(),
    *(t for t in _transfers() if t.family == "sse_float"),
    *_control(),
]
APPROXIMATE = list(_xmm("sse_approximate", _APPROXIMATE))
MMX = [
    *(t for t in _both() if t.family == "mmx"),
    *(t for t in _shift_imm() if t.family == "mmx"),
    *_mmx(),
]
