"""What each leaf costs that a host or a TD calls for every page: raw SEAMCALLs and TDCALLs, timed one by one."""

from collections import defaultdict
from statistics import median
from time import perf_counter_ns
from typing import Any, Final

from softtdx.abi.kvm import TdxCommand
from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.leaves import TdcallLeaf, rax_for
from softtdx.hw import LogicalProcessor, Registers
from softtdx.hw.registers import GPR_NAMES
from softtdx.kvm import seamcalls as sc
from softtdx.kvm.bench import small_td
from softtdx.kvm.host import Host
from softtdx.kvm.memory import PAGE
from softtdx.kvm.tdx import TdxVm
from softtdx.kvm.tdx_vcpu import TdxVcpu

__all__ = ["bench_leaves"]

_BASE: Final = 1 << 39  # far from what the VM's memory slots cover: the pages here are this module's affair
_MIB2: Final = 1 << 21
_CHUNK: Final = 256
_LARGE: Final = 16

# The VM exits that the measured guest makes (Intel SDM, "Basic Exit Reasons" and the VMCS encodings).
_EXTERNAL_INTERRUPT, _TDCALL = 1, 77
_EXIT_REASON, _QUALIFICATION, _INTERRUPTION, _LENGTH, _ENTRY_EVENT = 0x4402, 0x6400, 0x4404, 0x440C, 0x4016
_GUEST_EFER, _GUEST_CS_RIGHTS = 0x2806, 0x4816
_LONG_MODE, _CODE_64 = 0x500, 0xA09B
_INTERRUPT_32 = 0x8000_0020
_VALID = 1 << 31


class _Stopwatch:
    """Makes calls and keeps how long each took, by name."""

    def __init__(self, lp: LogicalProcessor) -> None:
        self._lp = lp
        self.nanoseconds: dict[str, list[int]] = defaultdict(list)

    def call(self, leaf: Leaf, what: str = "", **operands: int) -> None:
        """A timed SEAMCALL that has to succeed; `what` goes behind the leaf's name."""
        regs = Registers(rax=int(leaf), **operands)
        start = perf_counter_ns()
        self._lp.seamcall(regs)
        took = perf_counter_ns() - start
        sc.expect(regs, leaf)
        self.nanoseconds[f"TDH.{leaf.name.replace('_', '.')}{what}"].append(took)


def bench_leaves(host: Host, pages: int = 512) -> dict[str, float]:
    """The median of each leaf in microseconds, over `pages` pages of 4 KiB (at most 512)."""
    kvm, vm = small_td(host, PAGE)
    memory = [host.memory.alloc() for _ in range(pages)]
    large = [host.memory.alloc(512, align=_MIB2) for _ in range(_LARGE)]
    tables = [host.memory.alloc() for _ in range(3)]
    try:
        vcpu = vm.create_vcpu(0)
        vcpu.memory_encrypt_op(TdxCommand.INIT_VCPU, 0)
        td, vcpu_ops = vm.ops, vcpu.ops
        assert isinstance(td, TdxVm)
        assert isinstance(vcpu_ops, TdxVcpu)
        assert vcpu_ops.tdvpr is not None
        with host.cpus.run() as lp:
            watch = _Stopwatch(lp)
            run = _Run(watch, td.require_tdr(), memory)
            run.add_tables(tables)
            run.before_finalize(source=memory[0])
            vm.memory_encrypt_op(TdxCommand.FINALIZE_VM)
            run.small_pages(lp, vcpu_ops.tdvpr)
            run.large_pages(large)
            run.remove_tables()
    finally:
        vm.close()
        kvm.mm.close()
    for page in (*memory, *tables):
        host.memory.free(page)
    for page in large:
        host.memory.free(page, 512)
    return {name: median(samples) / 1000 for name, samples in watch.nanoseconds.items()}


class _Run:
    """The measured calls, in an order that leaves the TD as it was."""

    def __init__(self, watch: _Stopwatch, tdr: int, memory: list[int]) -> None:
        self._call = watch.call
        self._watch = watch
        self._tdr = tdr
        self._memory = memory
        self._gpas = [_BASE + i * PAGE for i in range(len(memory))]

    def add_tables(self, tables: list[int]) -> None:
        for level, table in zip((3, 2, 1), tables, strict=True):
            self._call(Leaf.MEM_SEPT_ADD, rcx=_BASE | level, rdx=self._tdr, r8=table)

    def before_finalize(self, source: int) -> None:
        """Initial memory; `source` is the one page that is not added."""
        tdr = self._tdr
        for gpa, page in zip(self._gpas[1:], self._memory[1:], strict=True):
            self._call(Leaf.MEM_PAGE_ADD, rcx=gpa, rdx=tdr, r8=page, r9=source)
            self._call(Leaf.MR_EXTEND, rcx=gpa + _CHUNK, rdx=tdr)
            self._call(Leaf.MEM_SEPT_RD, rcx=gpa, rdx=tdr)
        for gpa in self._gpas[1:]:
            self._call(Leaf.MEM_PAGE_REMOVE, " of initial memory", rcx=gpa, rdx=tdr)

    def small_pages(self, lp: LogicalProcessor, tdvpr: int) -> None:
        tdr = self._tdr
        for gpa, page in zip(self._gpas, self._memory, strict=True):
            self._call(Leaf.MEM_PAGE_AUG, rcx=gpa, rdx=tdr, r8=page)
        self._watch.nanoseconds["TDG.MEM.PAGE.ACCEPT"] = _accept(lp, tdvpr, self._gpas)
        sc.call(lp, Leaf.VP_FLUSH, rcx=tdvpr)
        for gpa in self._gpas:
            self._call(Leaf.MEM_RANGE_BLOCK, rcx=gpa, rdx=tdr)
        self._call(Leaf.MEM_TRACK, rcx=tdr)
        for gpa in self._gpas:
            self._call(Leaf.MEM_RANGE_UNBLOCK, rcx=gpa, rdx=tdr)
            self._call(Leaf.MEM_RANGE_BLOCK, rcx=gpa, rdx=tdr)
            self._call(Leaf.MEM_TRACK, rcx=tdr)
            self._call(Leaf.MEM_PAGE_REMOVE, rcx=gpa, rdx=tdr)

    def large_pages(self, large: list[int]) -> None:
        gpas = [_BASE + (i + 1) * _MIB2 for i in range(len(large))]
        for gpa, page in zip(gpas, large, strict=True):
            self._call(Leaf.MEM_PAGE_AUG, " of 2 MiB", rcx=gpa | 1, rdx=self._tdr, r8=page)
        for gpa in gpas:
            self._call(Leaf.MEM_RANGE_BLOCK, " of 2 MiB", rcx=gpa | 1, rdx=self._tdr)
            self._call(Leaf.MEM_TRACK, rcx=self._tdr)
            self._call(Leaf.MEM_PAGE_REMOVE, " of 2 MiB", rcx=gpa | 1, rdx=self._tdr)

    def remove_tables(self) -> None:
        for level in (1, 2, 3):
            self._call(Leaf.MEM_RANGE_BLOCK, " of a table", rcx=_BASE | level, rdx=self._tdr)
            self._call(Leaf.MEM_TRACK, rcx=self._tdr)
            self._call(Leaf.MEM_SEPT_REMOVE, rcx=_BASE | level, rdx=self._tdr)


def _accept(lp: LogicalProcessor, tdvpr: int, gpas: list[int]) -> list[int]:
    """Enter the TD, whose program is to accept these pages: nanoseconds from each VM exit to the VM entry behind it."""
    took: list[int] = []
    waiting = iter(gpas)
    started = 0

    def program(core: Any, launch: bool) -> int:
        nonlocal started
        now = perf_counter_ns()
        del launch
        core.vmwrite(_ENTRY_EVENT, core.vmread(_ENTRY_EVENT) & ~_VALID)
        registers = dict(zip(GPR_NAMES, core.gprs(), strict=True))
        if started:
            took.append(now - started)
            if registers["rax"]:
                raise RuntimeError(f"TDG.MEM.PAGE.ACCEPT ended with {registers['rax']:#x}")
        gpa = next(waiting, None)
        reason = _EXTERNAL_INTERRUPT if gpa is None else _TDCALL
        registers |= {"rax": rax_for(TdcallLeaf.MEM_PAGE_ACCEPT), "rcx": gpa or 0}
        core.set_gprs(tuple(registers[name] for name in GPR_NAMES))
        core.vmwrite(_GUEST_EFER, core.vmread(_GUEST_EFER) | _LONG_MODE)
        core.vmwrite(_GUEST_CS_RIGHTS, _CODE_64)
        core.vmwrite(_EXIT_REASON, reason)
        core.vmwrite(_QUALIFICATION, 0)
        core.vmwrite(_LENGTH, 0 if gpa is None else 4)
        core.vmwrite(_INTERRUPTION, _INTERRUPT_32 if gpa is None else 0)
        started = perf_counter_ns()
        return reason

    lp.guest_engine = program
    try:
        sc.seamcall(lp, Leaf.VP_ENTER, rcx=tdvpr)
    finally:
        lp.guest_engine = None
    return took
