"""Machine code given to the interpreter: a VM in 64-bit, 32-bit and 16-bit mode, random and nearly valid code.

Exceptions are not the end: every gate of the IDT leads somewhere into the code. Where a guest cannot go on it starts
anew with other registers. What counts are instructions that retired.
"""

import contextlib
import random
import struct
from collections.abc import Callable, Iterator
from typing import Final

from softtdx._silicon import PAYLOADS
from softtdx.abi.kvm import KVM_X86_DEFAULT_VM
from softtdx.abi.vmcs import AR_CODE32, AR_CODE64, AR_DATA32
from softtdx.attack.fuzz.core import EDGES
from softtdx.attack.oracle import BrokenInvariantError
from softtdx.hw import preset
from softtdx.kvm import Host, Kvm, KvmError
from softtdx.kvm.uapi import Regs, Segment, Sregs
from softtdx.kvm.vmx import VmxVcpu
from softtdx.vmm.boot import boot_host

__all__ = ["INSTRUCTIONS_A_STEP", "code"]

INSTRUCTIONS_A_STEP: Final = 1000
_MEMORY: Final = 1 << 20
_CODE_SIZE: Final = 64 << 10
_TABLES: Final = 0x2_0000  # IDT, GDT, three levels of page tables: a page each
_STACKS: Final = 0x4_0000
_PAGE: Final = 4096
_RSP: Final = 4
_SLICE = 4_000  # TSC ticks between two looks at a guest
_ENTRIES = 256  # VM entries that one piece of code gets
_FRUITLESS = 64  # pieces of code in a row of which no instruction retires
_AR_CODE16, _AR_DATA16 = 0x009B, 0x0093
_CR0_PE, _CR0_NE, _CR0_PG, _CR0_MP = 1, 1 << 5, 1 << 31, 2
_CR4: Final = 1 << 5 | 1 << 9 | 1 << 10 | 1 << 18  # PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
_EFER_LONG: Final = 1 << 8 | 1 << 10 | 1  # LME, LMA, SCE
_GDT: Final = (0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00AF_9B00_0000_FFFF)
_CS32, _DS, _CS64 = 8, 16, 24
_ENABLE_AVX: Final = bytes.fromhex("0f01d1 41ffe7")  # xsetbv; jmp r15
_MAPS: Final = (b"", b"", b"\x0f", b"\x0f", b"\x0f\x38", b"\x0f\x3a")
_PREFIXES: Final = (b"", b"", b"", b"\x66", b"\xf2", b"\xf3", b"\xf0", b"\x67", b"\x2e", b"\x64")


# --- code
def _random_bytes(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randint(8, 64))


def _structured(rng: random.Random) -> bytes:
    """Encodings put together from prefixes, an opcode of some map, ModRM and immediate bytes."""
    form = rng.randrange(8)
    op, tail = bytes([rng.randrange(256)]), _modrm(rng) + rng.randbytes(rng.choice((0, 1, 4)))
    if form == 0:  # VEX, two bytes
        return bytes([0xC5, rng.randrange(256)]) + op + tail
    if form == 1:  # VEX, three bytes
        return bytes([0xC4, rng.randrange(8) << 5 | rng.randint(1, 3), rng.randrange(256)]) + op + tail
    if form == 2:  # EVEX
        return (
            bytes([0x62, rng.randrange(16) << 4 | rng.randint(1, 6), rng.randrange(256) | 4, rng.randrange(256)])
            + op
            + tail
        )
    rex = bytes([0x40 | rng.randrange(16)]) if rng.randrange(2) else b""
    return rng.choice(_PREFIXES) + rex + rng.choice(_MAPS) + op + tail


def _modrm(rng: random.Random) -> bytes:
    if rng.randrange(2):
        return bytes([0xC0 | rng.randrange(64)])
    return bytes([0x40 | rng.randrange(64)]) + rng.randbytes(2)  # a base, maybe a SIB byte, and a displacement


def _changed(rng: random.Random) -> bytes:
    """A piece of a real program with some of its bits turned over."""
    program = PAYLOADS[rng.choice(("demo", "launcher", "pyguest"))]
    start = rng.randrange(max(len(program) - 64, 1))
    piece = bytearray(program[start : start + 64])
    for _ in range(rng.randrange(4)):
        piece[rng.randrange(len(piece))] ^= 1 << rng.randrange(8)
    return bytes(piece)


_SOURCES: Final[tuple[Callable[[random.Random], bytes], ...]] = (_random_bytes, _structured, _structured, _changed)


def _program(rng: random.Random) -> bytes:
    """64 KiB of one kind of code, or of all kinds."""
    if rng.randrange(3) == 0:
        return rng.randbytes(_CODE_SIZE)
    sources = _SOURCES if rng.randrange(3) else (rng.choice(_SOURCES),)
    block = b""
    while len(block) < _PAGE:
        block += rng.choice(sources)(rng)
    pages = [bytearray(block[:_PAGE]) for _ in range(_CODE_SIZE // _PAGE)]
    for page in pages:  # every page differs from the first a bit
        for _ in range(64):
            page[rng.randrange(_PAGE)] = rng.randrange(256)
    return b"".join(pages)


# --- the machine
def _tables(rng: random.Random, bits: int) -> bytes:
    """IDT or IVT whose entries lead anywhere into the code, a flat GDT, and page tables that map 1 GiB as it is."""
    gates = b""
    for _ in range(256):
        at = rng.randrange(_CODE_SIZE)
        if bits == 16:
            gates += struct.pack("<HH", at, 0)
        else:
            selector = _CS64 if bits == 64 else _CS32
            low = at & 0xFFFF | selector << 16 | 0x8E00 << 32 | at >> 16 << 48
            gates += low.to_bytes(8, "little") + (bytes(8) if bits == 64 else b"")
    gdt = struct.pack(f"<{len(_GDT)}Q", *_GDT)
    upper = [(_TABLES + n * _PAGE | 7).to_bytes(8, "little").ljust(_PAGE, b"\0") for n in (3, 4)]
    directory = struct.pack("<512Q", *(n << 21 | 0x87 for n in range(512)))
    return gates.ljust(_PAGE, b"\0") + gdt.ljust(_PAGE, b"\0") + b"".join(upper) + directory


def _sregs(bits: int) -> Sregs:
    if bits == 16:
        flat, wide = Segment(0, 0, 0xFFFF, _AR_DATA16), Segment(0, 0, 0xFFFF, _AR_CODE16)
        sregs = Sregs(cs=wide, ds=flat, es=flat, fs=flat, gs=flat, ss=flat, cr0=_CR0_NE)
        sregs.idt_base = _TABLES
        return sregs
    flat = Segment(_DS, 0, 0xFFFF_FFFF, AR_DATA32)
    wide = Segment(_CS64, 0, 0xFFFF_FFFF, AR_CODE64) if bits == 64 else Segment(_CS32, 0, 0xFFFF_FFFF, AR_CODE32)
    sregs = Sregs(cs=wide, ds=flat, es=flat, fs=flat, gs=flat, ss=flat, cr0=_CR0_PE | _CR0_NE | _CR0_MP, cr4=_CR4)
    sregs.idt_base, sregs.gdt_base = _TABLES, _TABLES + _PAGE
    if bits == 64:
        sregs.cr0, sregs.cr3, sregs.efer = sregs.cr0 | _CR0_PG, _TABLES + 2 * _PAGE, _EFER_LONG
    return sregs


class _Guest:
    """A VM with 64 KiB of code, in one mode."""

    def __init__(self, rng: random.Random, host: Host) -> None:
        self.rng = rng
        self.host = host
        self.bits = rng.choice((64, 64, 32, 16))
        self.kvm = Kvm(host)
        self.vm = self.kvm.create_vm(KVM_X86_DEFAULT_VM)
        self.hva = self.kvm.mm.mmap(_MEMORY)
        self.vm.set_user_memory_region2(0, 0, _MEMORY, self.hva)
        self.kvm.mm.write(self.hva, _program(rng))
        self.tables = _tables(rng, self.bits)
        self.sregs = _sregs(self.bits)

    def close(self) -> None:
        self.vm.close()
        self.kvm.mm.close()

    def run(self, index: int, wanted: int) -> int:
        """Let a vCPU run the code for a while, but for no more than about `wanted` instructions; how many retired."""
        ops = self.vm.create_vcpu(index).ops
        assert isinstance(ops, VmxVcpu)
        with self.host.cpus.run() as lp:
            start = lp.core.retired
            ops.load(lp)
            self._start(ops)
            try:
                for _ in range(_ENTRIES):
                    lp.core.set_host_timer(lp.core.rdtsc() + _SLICE)
                    goes_on = False
                    with contextlib.suppress(KvmError):  # KVM says that it cannot go on: an answer
                        ops.run(lp)
                        goes_on = ops.handle_exit(lp)
                    if lp.core.retired - start >= wanted:
                        break
                    if not goes_on:
                        self._start(ops)
            finally:
                lp.core.set_host_timer(None)
                ops.flush()
            return lp.core.retired - start

    def _start(self, ops: VmxVcpu) -> None:
        """Whatever happened to tables and registers: begin somewhere."""
        rng = self.rng
        self.kvm.mm.write(self.hva + _TABLES, self.tables)
        gprs = [rng.choice((rng.randrange(_MEMORY), rng.getrandbits(64), *EDGES[:4])) for _ in range(16)]
        gprs[_RSP] = rng.randrange(_STACKS, _MEMORY) & -16 if self.bits != 16 else rng.randrange(0x8000, 0xFFF0)
        rip = rng.randrange(_CODE_SIZE)
        if self.bits == 64 and rng.randrange(2):
            self.kvm.mm.write(self.hva + _CODE_SIZE, _ENABLE_AVX)
            gprs[0], gprs[1], gprs[2], gprs[15], rip = rng.choice((3, 7, 0xE7)), 0, 0, rip, _CODE_SIZE
        ops.set_sregs(self.sregs)
        ops.set_regs(Regs(tuple(gprs), rip, rng.getrandbits(12) & 0xCD5 | 2))


def code(rng: random.Random, steps: int) -> Iterator[int]:
    """Code in all modes. A step is a thousand instructions that retired."""
    host = boot_host(preset("spr"), tdx=False)
    wanted = steps * INSTRUCTIONS_A_STEP
    done = told = fruitless = 0
    while done < wanted:
        guest = _Guest(rng, host)
        before = done
        for index in range(4):
            if done < wanted:
                done += guest.run(index, wanted - done)
        guest.close()
        fruitless = fruitless + 1 if done == before else 0
        if fruitless == _FRUITLESS:
            raise BrokenInvariantError("no instruction of any code retires")
        now = min(done // INSTRUCTIONS_A_STEP, steps)
        yield now - told
        told = now
