"""Fuzzing of both walls and of what files come in: one seed, one run, the same findings each time.

A target is a function of a random generator and a number of steps. It raises nothing: what must not happen (a Python
exception that is no answer, a module that shut down, a lock left held, plaintext that the host can read) is a finding,
with a signature by which equal ones are recognised.
"""

import contextlib
import random
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from softtdx._silicon import PAYLOADS
from softtdx.abi.fields import table
from softtdx.abi.kvm import KVM_X86_DEFAULT_VM, KVM_X86_TDX_VM, MEMORY_ATTRIBUTE_PRIVATE, MemorySlotFlag, TdxCommand
from softtdx.abi.leaves import SeamcallLeaf, TdcallLeaf, rax_for
from softtdx.abi.status import status_of
from softtdx.abi.vmcs import AR_CODE32, AR_DATA32
from softtdx.attest.eventlog import EventLog, EventType, parse_ccel
from softtdx.attest.quote import Quote
from softtdx.attest.tdreport import parse_tdreport
from softtdx.errors import SoftTdxError
from softtdx.hw import Registers, preset
from softtdx.hw.faults import MachineCheck, VmFail
from softtdx.kvm import Host, Kvm, KvmError, Vcpu
from softtdx.kvm.memory import PAGE
from softtdx.kvm.tdx import TdxVm
from softtdx.kvm.tdx_vcpu import TdxVcpu
from softtdx.kvm.uapi import Regs, Segment, Sregs, TdxInitMemRegion, TdxInitVm
from softtdx.kvm.vm import Vm
from softtdx.kvm.vmx import VmxVcpu
from softtdx.module.locks import HOST_PRIORITY
from softtdx.vmm import GuestError, Machine, MachineConfig, MachineError, parse_payload
from softtdx.vmm.boot import boot_host
from softtdx.vmm.launcher import FIRMWARE_BASE, FIRMWARE_SIZE
from softtdx.vmm.linux.bzimage import parse_bzimage
from softtdx.vmm.python_guest import GuestException, PythonGuest, Td

__all__ = ["TARGETS", "Finding", "Fuzzed", "fuzz"]

_U64 = (1 << 64) - 1
_MARK = b"what only the TD may read, ever!"
_LOOP = b"\xeb\xfe"
_CODE_SIZE = 64 << 10
_TABLES = 0x2_0000  # in the guest of the target "code"
_RSP = 4
_VM_MEMORY = 1 << 20
_SLICE = 4_000  # TSC ticks between two looks at a guest
_ENTRIES = 512  # VM entries that one piece of random code gets
_CODE_INSTRUCTIONS = 1000  # a step of the target "code"
_CHECK_EVERY = 64
_VERSIONS = (*[0] * 12, 1, 1, 2)
_WORLD_LASTS = 1000  # calls
_LEAF = 0xFFFF  # of RAX
_WRITES_FOR_THE_HOST = (SeamcallLeaf.SYS_INFO, SeamcallLeaf.SYS_RDALL)
_OPERANDS = ("rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13")
_EDGES = (0, 1, 2, 3, 7, 8, 63, 64, 0xFFF, 0x1000, 0x1FFFFF, 1 << 30, 1 << 47, 1 << 51, 1 << 52, 1 << 63, _U64)


@dataclass(frozen=True)
class Finding:
    """Something that must not happen. `signature` is equal for equal causes; `seed` reproduces it."""

    target: str
    seed: int
    step: int
    signature: str
    detail: str


@dataclass(frozen=True)
class Fuzzed:
    """A run: how many steps were done (calls, files, or thousands of instructions) and what was found."""

    steps: int
    findings: tuple[Finding, ...]


class _BrokenError(Exception):
    """An invariant does not hold."""


def fuzz(target: str, seed: int, steps: int) -> Fuzzed:
    """Run one seed of a target. SoftTdxError for a target that does not exist."""
    if target not in TARGETS:
        raise SoftTdxError(f"there is no fuzzing target {target!r}; there are {', '.join(TARGETS)}")
    done, found = 0, []
    stream = TARGETS[target](random.Random(f"{target} {seed}"), steps)
    while done < steps:
        try:
            for count in stream:
                done += count
            break
        except Exception as error:  # whatever it is, it is what is looked for
            found.append(_finding(target, seed, done, error))
            stream = TARGETS[target](random.Random(f"{target} {seed} {done}"), steps - done)
            done += 1
    return Fuzzed(done, tuple(found))


def _finding(target: str, seed: int, step: int, error: Exception) -> Finding:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "softtdx" in f.filename]
    where = " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.name}" for f in frames[:-4:-1])
    text = "".join("0" if c in "0123456789abcdef" else c for c in str(error))  # addresses differ, the cause does not
    signature = f"{target}: {type(error).__name__} {text[:80]} at {where}"
    return Finding(target, seed, step, signature, f"{type(error).__name__}: {error}")


# --- wall 1: SEAMCALL
class _TdWorld:
    """A host with a TD on it, and the numbers that a hostile host would try as operands."""

    def __init__(self) -> None:
        self.host = boot_host()
        self.machine = Machine(self.host, MachineConfig(memory=_VM_MEMORY))
        code = bytearray(_LOOP * (FIRMWARE_SIZE // 2))
        code[-16:] = (_LOOP * 8)[:16]
        code[: len(_MARK)] = _MARK
        self.machine.load_contents([(FIRMWARE_BASE, bytes(code))])
        td, vcpu = self.machine.vm.ops, self.machine.vcpus[0].ops
        assert isinstance(td, TdxVm)
        assert isinstance(vcpu, TdxVcpu)
        mapping = td.secure.lookup(FIRMWARE_BASE)
        assert mapping is not None
        self.secret = mapping.hpa
        table_page = td.secure.table_page(FIRMWARE_BASE, 1)
        own = [td.require_tdr(), vcpu.tdvpr, *td.tdcs, *vcpu.tdcx, self.secret, table_page]
        self.free = [self.host.memory.alloc(zero=True) for _ in range(32)]
        self.tdr, self.tdvpr = td.require_tdr(), vcpu.tdvpr or 0
        self.buffers = [self.host.memory.alloc(256) + 0x5_5000 for _ in range(2)]  # for answers; no TD gets them
        self.pages = [page for page in own if page is not None] + self.free
        self.fields = [row.field_id for scope in ("td", "vp", "sys") for row in table(scope).by_name.values()]
        d = self.host.platform.description
        self.keyids = [0, 1, *d.private_keyids[:4], d.private_keyids[-1]]

    def operand(self, rng: random.Random) -> int:
        """A number that means something, seldom a bit off, sometimes none at all."""
        kind = rng.randrange(8)
        if kind < 4:
            value = rng.choice(self.pages)
        elif kind == 4:
            value = rng.choice((FIRMWARE_BASE, 0, 1 << 21, 1 << 30, 1 << 47, rng.randrange(1 << 20))) | rng.randrange(4)
        elif kind == 5:
            value = rng.choice(self.fields)
        elif kind == 6:
            value = rng.choice((*_EDGES, *self.keyids))
        else:
            value = rng.getrandbits(64)
        if rng.randrange(8) == 0:
            value ^= 1 << rng.randrange(64)
        return value

    def gpa(self, rng: random.Random) -> int:
        """A GPA with a level: mostly of a page that is mapped, or beside one."""
        base = rng.choice((FIRMWARE_BASE, FIRMWARE_BASE, FIRMWARE_BASE & -(1 << 21), 0, 1 << 30))
        return base + PAGE * rng.randrange(8) | rng.choice((0, 0, 0, 1, 2))

    def operands(self, rng: random.Random, leaf: SeamcallLeaf) -> dict[str, int]:
        """Registers of the kinds that the leaf takes; each seldom of another kind."""
        regs = {name: self.operand(rng) for name in _OPERANDS}
        name, field = leaf.name, rng.choice(self.fields)
        if (name.startswith("MEM_") and name != "MEM_TRACK") or name == "MR_EXTEND":
            likely = {"rcx": self.gpa(rng), "rdx": self.tdr, "r8": rng.choice(self.free), "r9": rng.choice(self.free)}
        elif name.endswith(("_CREATE", "_ADDCX")):
            parent = rng.choice(self.keyids) if name == "MNG_CREATE" else self.tdvpr if name == "VP_ADDCX" else self.tdr
            likely = {"rcx": rng.choice(self.free), "rdx": parent}
        elif name.startswith("VP_"):
            likely = {"rcx": self.tdvpr, "rdx": field}
        elif name.startswith(("MNG_", "MR_")) or name == "MEM_TRACK":
            likely = {"rcx": self.tdr, "rdx": field}
        else:
            likely = {"rcx": rng.choice(self.pages), "rdx": field}
        return regs | {key: value for key, value in likely.items() if rng.randrange(16)}

    def check(self, *, thorough: bool) -> None:
        """The invariants: the module lives, nothing is locked between calls, and the host reads no plaintext."""
        platform = self.host.platform
        if platform.seam.module is None:
            raise _BrokenError("the TDX module is gone")
        held = {k: v for k, v in platform.seam.module.g.locks.state.items() if v & ~HOST_PRIORITY}  # type: ignore[attr-defined]
        if held:
            raise _BrokenError(f"{len(held)} locks are held between calls")
        if thorough and _MARK in self._by_load():
            raise _BrokenError("the host reads plaintext of a TD")

    def _by_load(self) -> bytes:
        try:
            return self.host.platform.memory.read(self.secret, PAGE)
        except MachineCheck:
            return b""


def _seamcalls(rng: random.Random, steps: int) -> Iterator[int]:
    """SEAMCALLs with registers that mean something, on all processors in turn."""
    leaves = [leaf for leaf in SeamcallLeaf if leaf is not SeamcallLeaf.SYS_SHUTDOWN]
    for step in range(steps):
        if step % _WORLD_LASTS == 0:  # its TD does not live long
            world = _TdWorld()
        leaf = rng.choice(leaves)
        if leaf is SeamcallLeaf.MNG_VPFLUSHDONE and rng.randrange(16):
            leaf = SeamcallLeaf.MEM_RANGE_BLOCK  # the end of the TD comes later
        regs = Registers(rax=rax_for(leaf, rng.choice(_VERSIONS)))
        if rng.randrange(64) == 0:
            regs.rax = rng.getrandbits(63)
        # What these write with KeyID 0 where the host says spoils a TDX page as the host's own store does: no finding.
        harmless = regs.rax & _LEAF in _WRITES_FOR_THE_HOST
        for name, value in world.operands(rng, leaf).items():
            setattr(regs, name, rng.choice((*world.buffers, *_EDGES)) if harmless else value)
        lp = rng.choice(world.host.platform.lps)
        lp.core.kick()  # TDH.VP.ENTER comes back at once
        try:
            lp.seamcall(regs)
        except (VmFail, MachineCheck) as error:
            raise _BrokenError(f"the TDX module shut down: {error}") from error
        _known(regs.rax)
        world.check(thorough=step % _CHECK_EVERY == 0)
        yield 1


def _known(rax: int) -> None:
    if rax and status_of(rax).name.startswith("UNKNOWN"):
        raise _BrokenError(f"no status has the number {status_of(rax):#x}")


# --- wall 1 from the other side: TDCALL
def _tdcalls(rng: random.Random, steps: int) -> Iterator[int]:
    """TDCALLs by a TD; when it ended itself (a fatal error, a halt) another goes on."""
    host = boot_host()
    fields = [row.field_id for scope in ("td", "vp", "sys") for row in table(scope).by_name.values()]
    others = [leaf for leaf in TdcallLeaf if leaf is not TdcallLeaf.VP_VMCALL]
    done = 0
    while done < steps:
        before = done

        def program(td: Td) -> None:
            nonlocal done
            for gpa in range(0x1_0000, 0x1_4000, PAGE):
                td.accept(gpa)
            while done < steps:
                done += 1
                values = (*_EDGES, *range(0x1_0000, 0x1_4000, PAGE), rng.choice(fields), rng.getrandbits(64))
                regs = {name: rng.choice(values) for name in _OPERANDS}
                leaf: TdcallLeaf = rng.choice(others)
                if rng.randrange(8) == 0:
                    leaf, regs["r10"], regs["r11"] = TdcallLeaf.VP_VMCALL, 0, rng.choice((*_EDGES, 10, 12, 28, 30, 32))
                    regs["rcx"] = rng.choice((0xFC00, 0xFC00, rng.getrandbits(16) & 0xFFEC))
                try:
                    _known(td.tdcall(rax=rax_for(leaf, rng.choice((0, 0, 1))), **regs).rax)
                except GuestException:
                    continue

        try:
            with PythonGuest(host, program) as guest:
                guest.run()
        except GuestError:
            pass  # the TD may end itself
        except MachineError as error:
            if error.__cause__ is not None:
                raise error.__cause__ from error
        _settled(host)
        yield done - before


def _settled(host: Host) -> None:
    if host.platform.seam.module is None:
        raise _BrokenError("the TDX module is gone")
    left = {use: n for use, n in host.memory.tdx_pages().items() if use != "PAMT"}
    if left:
        raise _BrokenError(f"pages are left when the TD is gone: {left}")


# --- the interpreter
def _code(rng: random.Random, steps: int) -> Iterator[int]:
    """Random bytes as 32-bit machine code of an ordinary VM; a step is a thousand instructions."""
    host = boot_host(preset("spr"), tdx=False)
    done, before = 0, 0
    while done < steps * _CODE_INSTRUCTIONS:
        kvm = Kvm(host)
        vm = kvm.create_vm(KVM_X86_DEFAULT_VM)
        hva = kvm.mm.mmap(_VM_MEMORY)
        vm.set_user_memory_region2(0, 0, _VM_MEMORY, hva)
        kvm.mm.write(hva, rng.randbytes(_CODE_SIZE))
        kvm.mm.write(hva + _TABLES, _tables(rng))
        for index in range(4):
            vcpu = vm.create_vcpu(index)
            flat, wide = Segment(0x10, 0, 0xFFFF_FFFF, AR_DATA32), Segment(0x08, 0, 0xFFFF_FFFF, AR_CODE32)
            sregs = Sregs(cs=wide, ds=flat, es=flat, fs=flat, gs=flat, ss=flat, cr0=0x21)
            sregs.idt_base, sregs.gdt_base = _TABLES, _TABLES + 256 * 8
            ops = vcpu.ops
            assert isinstance(ops, VmxVcpu)
            done += max(_run(rng, host, ops, sregs), 1)
        vm.close()
        kvm.mm.close()
        count = done // _CODE_INSTRUCTIONS
        yield count - before
        before = count


def _tables(rng: random.Random) -> bytes:
    """An IDT whose gates lead anywhere into the code, so that an exception is not the end, and a flat GDT."""
    gates = b""
    for _ in range(256):
        offset = rng.randrange(_CODE_SIZE)
        gates += (offset & 0xFFFF | 0x08 << 16 | 0x8E00 << 32 | offset >> 16 << 48).to_bytes(8, "little")
    return gates + b"".join(entry.to_bytes(8, "little") for entry in (0, 0xCF9B_0000_00FFFF, 0xCF93_0000_00FFFF))


def _start(rng: random.Random, ops: VmxVcpu, sregs: Sregs) -> None:
    gprs = [rng.choice((rng.randrange(_VM_MEMORY), rng.getrandbits(64), *_EDGES[:4])) for _ in range(16)]
    gprs[_RSP] = rng.randrange(_TABLES + PAGE, _VM_MEMORY)
    ops.set_sregs(sregs)
    ops.set_regs(Regs(tuple(gprs), rng.randrange(_CODE_SIZE), rng.getrandbits(12) & 0xCD5 | 2))


def _run(rng: random.Random, host: Host, ops: VmxVcpu, sregs: Sregs) -> int:
    """Enter many times; where the guest cannot go on, with new registers at another place."""
    with host.cpus.run() as lp:
        start = lp.core.retired
        ops.load(lp)
        _start(rng, ops, sregs)
        try:
            for _ in range(_ENTRIES):
                lp.core.set_host_timer(lp.core.rdtsc() + _SLICE)
                goes_on = False
                with contextlib.suppress(KvmError):  # KVM says that it cannot go on: an answer
                    ops.run(lp)
                    goes_on = ops.handle_exit(lp)
                if not goes_on:
                    _start(rng, ops, sregs)
        finally:
            lp.core.set_host_timer(None)
            ops.flush()
        return lp.core.retired - start


# --- the kernel's ioctls
def _ioctls(rng: random.Random, steps: int) -> Iterator[int]:
    """What user space can ask of KVM, with good and bad arguments, in any order: an answer or an errno."""
    host = boot_host()
    done = 0
    while done < steps:
        kvm = Kvm(host)
        vm = kvm.create_vm(rng.choice((KVM_X86_DEFAULT_VM, KVM_X86_TDX_VM, KVM_X86_TDX_VM)))
        hva = kvm.mm.mmap(_VM_MEMORY)
        vcpus: list[Vcpu] = []
        try:
            for _ in range(min(rng.randrange(40, 120), steps - done)):
                done += 1
                with contextlib.suppress(KvmError):
                    _ioctl(rng, vm, vcpus, hva)
                yield 1
        finally:
            with contextlib.suppress(KvmError):
                vm.close()
            kvm.mm.close()
        _settled(host)


def _ioctl(rng: random.Random, vm: Vm, vcpus: list[Vcpu], hva: int) -> None:
    def number() -> int:
        return rng.choice((0, 1, 2, PAGE, 0x1_0000, _VM_MEMORY, 1 << 21, *_EDGES, rng.getrandbits(64)))

    def good(value: int) -> int:
        return value if rng.randrange(4) else number()

    kind = rng.randrange(10)
    if kind == 0:
        file = vm.create_guest_memfd(good(_VM_MEMORY), rng.choice((0, 0, 1))) if rng.randrange(2) else None
        flags = MemorySlotFlag.GUEST_MEMFD if file else MemorySlotFlag(0)
        vm.set_user_memory_region2(good(rng.randrange(3)), good(0), good(_VM_MEMORY), good(hva), flags, file)
    elif kind == 1:
        vm.set_memory_attributes(good(0), good(_VM_MEMORY), rng.choice((0, MEMORY_ATTRIBUTE_PRIVATE, number())))
    elif kind == 2:
        vcpus.append(vm.create_vcpu(good(len(vcpus))))
    elif kind == 3:
        vm.memory_encrypt_op(TdxCommand.INIT_VM, TdxInitVm(attributes=good(1 << 28), cpuid=()))
    elif kind == 4:
        vm.memory_encrypt_op(rng.choice((*TdxCommand, number())), rng.choice((None, number())))
    elif vcpus:
        vcpu = rng.choice(vcpus)
        if kind == 5:
            vcpu.memory_encrypt_op(TdxCommand.INIT_VCPU, good(0))
        elif kind == 6:
            region = TdxInitMemRegion(good(hva), good(0x1_0000), good(rng.randrange(1, 4)))
            vcpu.memory_encrypt_op(TdxCommand.INIT_MEM_REGION, region)
        elif kind == 7:
            vcpu.pre_fault_memory(good(0), good(PAGE))
        elif kind == 8:
            vcpu.set_regs(Regs(tuple(number() for _ in range(16)), number(), number()))
        else:
            vcpu.kick()  # KVM_RUN comes back at once
            vcpu.run()


# --- files
def _files(rng: random.Random, steps: int) -> Iterator[int]:
    """Files that are nearly good: each parser answers, or refuses with SoftTdxError."""
    log = EventLog.empty().measured(2, EventType.IPL, b"a kernel").to_bytes()
    header = bytearray(PAGE)
    header[0x1FE:0x206] = b"\x55\xaaHdrS\x0f\x02"[:8]
    bases: list[tuple[Callable[[bytes], object], bytes]] = [
        (parse_payload, PAYLOADS["demo"]),
        (parse_bzimage, bytes(header)),
        (EventLog.parse, log),
        (parse_ccel, bytes(56)),
        (Quote.parse, (4).to_bytes(2, "little") + bytes(2000)),
        (parse_tdreport, bytes(1024)),
    ]
    for _ in range(steps):
        parser, base = rng.choice(bases)
        data = bytearray(base)
        for _ in range(rng.randrange(8)):
            at = rng.randrange(min(len(data), rng.choice((64, 512, len(data)))))
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        cut = rng.choice((len(data), len(data), rng.randrange(len(data))))
        with contextlib.suppress(SoftTdxError):
            parser(bytes(data[:cut]))
        yield 1


TARGETS: dict[str, Callable[[random.Random, int], Iterator[int]]] = {
    "seamcall": _seamcalls,
    "tdcall": _tdcalls,
    "code": _code,
    "ioctl": _ioctls,
    "files": _files,
}
"""Target -> what it does for a number of steps."""
