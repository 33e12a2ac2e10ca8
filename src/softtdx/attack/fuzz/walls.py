"""Wall 1 from both sides: SEAMCALLs of a hostile host, TDCALLs and exits of a hostile TD, interleaved.

Two logical processors. TDH.VP.ENTER leads into a vCPU whose VM exits are made by hand: TDCALLs with any registers,
CPUID, MSRs, violations; while it is inside, the host goes on calling on the other processor. One thread does all of it
in an order that the seed decides.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Final

from softtdx._silicon import Core
from softtdx.abi import vmcs
from softtdx.abi.exits import ExitReason
from softtdx.abi.ghci import VmcallLeaf
from softtdx.abi.leaves import SeamcallLeaf, TdcallLeaf, rax_for
from softtdx.abi.status import status_of
from softtdx.abi.structs import PageType
from softtdx.attack.fuzz.calls import Call, Operands, Recipe, change, fresh, kinds_of, resolve, sequence
from softtdx.attack.fuzz.core import EDGES
from softtdx.attack.fuzz.feedback import Corpus
from softtdx.attack.fuzz.world import GLOBAL_HKID, PAGE_MASK, TDMRS, Stage, World
from softtdx.attack.oracle import BrokenInvariantError
from softtdx.hw import LogicalProcessor, Registers
from softtdx.hw.faults import MachineCheck, VmFail
from softtdx.hw.registers import GPR_NAMES
from softtdx.module.registry import HOST_LEAVES
from softtdx.module.state import SysState

__all__ = ["Walls", "seamcalls", "tdcalls"]

_STAGES: Final = (*Stage, *[Stage.POPULATED] * 9)
_EARLY_CALLS, _POPULATED_CALLS = 150, 1500  # a world lasts
_CALLS_AFTER_SHUTDOWN = 30
_CHECK_EVERY = 24
_COMPARE_EVERY = 48
_VISIT = 24  # VM exits of a vCPU until an interrupt ends its visit
_BRING_UP: Final = (
    SeamcallLeaf.SYS_INIT, SeamcallLeaf.SYS_LP_INIT, SeamcallLeaf.SYS_CONFIG, SeamcallLeaf.SYS_KEY_CONFIG,
    SeamcallLeaf.SYS_TDMR_INIT, SeamcallLeaf.SYS_TDMR_INIT, SeamcallLeaf.SYS_UPDATE,
)  # fmt: skip
_VP_ENTER: Final = int(SeamcallLeaf.VP_ENTER)
_MAY_CHANGE: Final = frozenset({_VP_ENTER})  # though refused: the vCPU was associated, or ran
_STORES: Final = frozenset({int(SeamcallLeaf.SYS_INFO), int(SeamcallLeaf.SYS_RDALL)})  # wherever told to
_STATUS_SHIFT = 32
_ERROR: Final = 1 << 63
_LEAF = 0xFFFF
_INTERRUPT_INFO = 0x8000_0020
_LONG_MODE_CODE, _EFER_LONG_MODE = 0xA09B, 0x500
_INSTRUCTION = {ExitReason.TDCALL: 4, ExitReason.CPUID: 2, ExitReason.RDMSR: 2, ExitReason.WRMSR: 2, ExitReason.HLT: 1}
_MSRS = (
    0x10,
    0x1B,
    0x3A,
    0x10A,
    0x174,
    0x1A0,
    0x277,
    0x6E0,
    0x800,
    0x830,
    0xDA0,
    0x560,
    0x38F,
    0xC000_0080,
    0x4000_0000,
)
_CPUID_LEAVES = (0, 1, 2, 4, 7, 0xA, 0xB, 0xD, 0x14, 0x1D, 0x21, 0x24, 0x4000_0000, 0x8000_0000, 0x8000_0008)
_MASKS = (0xFC00, 0xFC00, 0xFC00, 0xFFEC, 0, 4, 1 << 32)

_L = SeamcallLeaf


def _n(kind: str, index: int) -> Recipe:
    return Recipe(kind, index)


_BUILD, _FIRST_STAGE_LEFT, _SECOND_STAGE_LEFT, _FINISH = range(4)  # of the scripts


def _scripts() -> list[tuple[Call, ...]]:
    """Sequences that hosts do, which chance would take long to find. Indices count from the last one known."""
    last = Recipe("tdr", -1)
    page = [_n("page", n) for n in range(100, 140)]
    number = [Recipe("number", n) for n in range(8)]
    build = [
        (_L.MNG_CREATE, {"rcx": page[0], "rdx": _n("hkid", 13)}),
        (_L.MNG_KEY_CONFIG, {"rcx": last}),
        *[(_L.MNG_ADDCX, {"rcx": page[n], "rdx": last}) for n in range(1, 7)],
        (_L.MNG_INIT, {"rcx": last, "rdx": _n("buffer", 0)}),
        *[(_L.MEM_SEPT_ADD, {"rcx": number[4 - n], "rdx": last, "r8": page[6 + n]}) for n in range(1, 4)],
        (_L.MEM_PAGE_ADD, {"rcx": number[0], "rdx": last, "r8": page[10], "r9": _n("buffer", 4)}),
        (_L.MR_EXTEND, {"rcx": number[0], "rdx": last}),
        (_L.VP_CREATE, {"rcx": page[11], "rdx": last}),
        *[(_L.VP_ADDCX, {"rcx": page[n], "rdx": Recipe("tdvpr", -1)}) for n in range(12, 17)],
        (_L.VP_INIT, {"rcx": Recipe("tdvpr", -1), "rdx": number[1]}),
        (_L.MR_FINALIZE, {"rcx": last}),
    ]
    bring_up = [
        (_L.SYS_INIT, {"rcx": number[0]}),
        (_L.SYS_LP_INIT, {}),
        (_L.SYS_CONFIG, {"rcx": _n("buffer", TDMRS), "rdx": number[1], "r8": Recipe("number", GLOBAL_HKID)}),
        (_L.SYS_KEY_CONFIG, {}),
        *[(_L.SYS_TDMR_INIT, {"rcx": number[0]})] * 8,
    ]
    built = _n("tdr", 4)  # the one that is being built
    table = Recipe("number", 2 << 21 | 1)
    finish = [
        (_L.MEM_PAGE_ADD, {"rcx": _n("info", 5), "rdx": built, "r8": page[18], "r9": _n("buffer", 4)}),
        (_L.MR_EXTEND, {"rcx": _n("info", 5), "rdx": built}),
        (_L.MEM_SEPT_ADD, {"rcx": table, "rdx": built, "r8": page[19]}),
        (_L.MEM_RANGE_BLOCK, {"rcx": table, "rdx": built}),
        (_L.MEM_SEPT_REMOVE, {"rcx": table, "rdx": built}),
        (_L.MR_FINALIZE, {"rcx": built}),
    ]
    on_other = replace(sequence(bring_up[1])[0], lp=1)
    scripts = [
        sequence(*build),
        (*sequence(bring_up[0]), on_other, *sequence(*bring_up[1:])),
        (on_other, *sequence(*bring_up[2:])),
        sequence(*finish),
    ]
    for index in range(4):
        tdr, info = _n("tdr", 5 + index), _n("info", index)
        block = (_L.MEM_RANGE_BLOCK, {"rcx": info, "rdx": tdr})
        track = (_L.MEM_TRACK, {"rcx": tdr})
        aug = (_L.MEM_PAGE_AUG, {"rcx": info, "rdx": tdr, "r8": page[20 + index]})
        scripts += [
            sequence(aug, block, track, (_L.MEM_PAGE_REMOVE, {"rcx": info, "rdx": tdr})),
            sequence(block, track, (_L.MEM_PAGE_RELOCATE, {"rcx": info, "rdx": tdr, "r8": page[30 + index]})),
            sequence(block, track, (_L.MEM_RANGE_UNBLOCK, {"rcx": info, "rdx": tdr})),
            sequence(
                (_L.MEM_PAGE_AUG, {"rcx": table, "rdx": tdr, "r8": _n("large", index)}),
                (_L.MEM_RANGE_BLOCK, {"rcx": table, "rdx": tdr}),
                track,
                (_L.MEM_PAGE_DEMOTE, {"rcx": table, "rdx": tdr, "r8": page[35 + index]}),
                (_L.MEM_RANGE_BLOCK, {"rcx": table, "rdx": tdr}),
                track,
                (_L.MEM_PAGE_PROMOTE, {"rcx": table, "rdx": tdr}),
            ),
        ]
        flush = [(_L.VP_FLUSH, {"rcx": _n("tdvpr", 2 + 2 * index + n)}) for n in range(2)]
        end = [(_L.MNG_VPFLUSHDONE, {"rcx": tdr}), (_L.PHYMEM_CACHE_WB, {}), (_L.MNG_KEY_FREEID, {"rcx": tdr})]
        reclaim = [(_L.PHYMEM_PAGE_RECLAIM, {"rcx": _n("used", n)}) for n in range(8 * index, 8 * index + 8)]
        scripts.append(sequence(*flush, *end, *reclaim) if index == 0 else sequence(*reclaim))
    return scripts


class Walls:
    """One world after another, what was learned in all of them, and how many calls each side made."""

    def __init__(self, rng: random.Random, *, enters: float, host_inside: float, stages: tuple[Stage, ...]) -> None:
        """`enters`: the share of host steps that run a vCPU; `host_inside`: of VM exits, those with host calls."""
        self.rng = rng
        self.stages = stages
        self.enters, self.host_inside = enters, host_inside
        self.host_calls = self.guest_calls = 0
        self._host_leaves = [SeamcallLeaf(n) for n in sorted(HOST_LEAVES)]
        self._guest_leaves = [leaf for leaf in TdcallLeaf if leaf is not TdcallLeaf.VP_VMCALL]
        self._operands = Operands(rng)
        self._scripts = _scripts()
        self.host = Corpus(rng, self._fresh_host, self._change_host, self._scripts)
        self.guest = Corpus(rng, self._fresh_guest, self._change_guest)
        self.world: World
        self._inside: set[int] = set()
        self._visit: dict[int, int] = {}
        self._asked: dict[int, tuple[Call, int]] = {}
        self._debug: dict[int, bool] = {}  # by processor: the TD that it runs shows itself to the host
        self._entered: dict[int, int] = {}  # processor -> TDVPR of the last TDH.VP.ENTER
        self._bound: dict[int, int] = {}  # TDVPR -> processor on which it ran
        self._left = 0
        self.begin()

    def begin(self) -> None:
        """Another world."""
        self.world = World(self.rng, self.rng.choice(self.stages))
        self._left = _POPULATED_CALLS if self.world.stage is Stage.POPULATED else _EARLY_CALLS
        self._inside.clear()
        self._bound.clear()
        self.host.forget_past()
        self.guest.forget_past()
        self.host.plan(self._first_steps())
        for lp in self.world.lps:
            lp.guest_engine = partial(self._exit, lp)

    def _first_steps(self) -> tuple[Call, ...]:
        """Half of the worlds begin as their host would go on."""
        rng, stage = self.rng, self.world.stage
        if rng.randrange(2):
            return ()
        if stage is Stage.LOADED:
            return self._scripts[_FIRST_STAGE_LEFT]
        if stage < Stage.READY:
            return self._scripts[_SECOND_STAGE_LEFT]
        return self._scripts[rng.choice((_BUILD, _FINISH))]

    def step(self) -> None:
        """One call of the host, which may be the visit of a vCPU with many calls."""
        if self._left <= 0:
            self.world.check()
            self.begin()
        rng, world = self.rng, self.world
        if rng.random() < self.enters and world.stage is Stage.POPULATED:
            tdvpr = rng.choice(world.numbers["tdvpr"] if rng.randrange(8) == 0 else world.vcpus)
            lp = rng.randrange(2) if rng.randrange(8) == 0 else self._bound.get(tdvpr, rng.randrange(2))
            self._host(Call(_VP_ENTER, 0, (("rcx", Recipe("number", tdvpr)),), lp))
        else:
            self._host(self.host.next())

    # --- the host
    def _fresh_host(self) -> Call:
        rng = self.rng
        leaf = rng.choice(self._host_leaves)
        if self.world.stage < Stage.READY and rng.randrange(2):
            leaf = rng.choice(_BRING_UP)
        rare = leaf in (_L.MNG_VPFLUSHDONE, _L.MNG_KEY_FREEID, _L.SYS_SHUTDOWN, _L.SYS_LP_SHUTDOWN)
        if rare and self.world.stage is Stage.POPULATED and rng.randrange(24):
            leaf = rng.choice((_L.MEM_RANGE_BLOCK, _L.MEM_TRACK, _L.MEM_PAGE_AUG, _L.MEM_SEPT_ADD, _L.MEM_PAGE_REMOVE))
        return self._operands.mixed_in(fresh(rng, leaf), kinds_of(leaf))

    def _change_host(self, call: Call) -> Call:
        return change(self.rng, call, kinds_of(SeamcallLeaf(call.leaf)))

    def _host(self, call: Call, lp: LogicalProcessor | None = None) -> None:
        lp = lp or self.world.lps[call.lp % 2]
        given: dict[str, int] = {}
        try:
            self._call(call, lp, given)
        except BrokenInvariantError as error:
            shown = ", ".join(f"{name}={value:#x}" for name, value in given.items())
            raise BrokenInvariantError(f"{error} | version {call.version}, {shown}") from error

    def _call(self, call: Call, lp: LogicalProcessor, given: dict[str, int]) -> None:
        rng, world = self.rng, self.world
        self.host_calls += 1
        self._left -= 1
        regs = Registers()
        for name, recipe in call.operands:
            value = resolve(recipe, world.numbers)
            if call.leaf in _STORES and world.is_tdx_page(value):
                value = world.numbers["buffer"][0]  # else it were a host's store to what the module keeps there
            given[name] = value
            if recipe.kind == "buffer" and rng.randrange(8) == 0:
                world.spoil(rng, value)
            setattr(regs, name, value)
        regs.rax = rax = call.rax if call.rax is not None else rax_for(call.leaf, call.version)
        if rax & _LEAF == _VP_ENTER:
            for name in GPR_NAMES[8:]:
                setattr(regs, name, rng.choice(EDGES))  # the answer to a hypercall
            self._visit[lp.index] = rng.randrange(1, _VISIT)
            self._asked.pop(lp.index, None)  # its answer went with the TD exit
            self._entered[lp.index] = tdvpr = given.get("rcx", 0) & PAGE_MASK
            self._debug[lp.index] = world.oracle.is_debug(tdvpr)
        running = bool(self._inside)
        compare = not running and rng.randrange(_COMPARE_EVERY) == 0
        before = world.oracle.fingerprint(world.ranges) if compare else None
        state = self._state(given)
        try:
            lp.seamcall(regs)
        except (VmFail, MachineCheck) as error:
            raise BrokenInvariantError(f"the TDX module shut down in {_mnemonic(rax)}: {error}") from error
        self._answered(call, regs, given, state)
        if before is not None and regs.rax & _ERROR and rax & _LEAF not in _MAY_CHANGE:
            self._unchanged(before, rax)
        if world.oracle.state.sys_state == SysState.SHUTDOWN:
            self._left = min(self._left, _CALLS_AFTER_SHUTDOWN)
        if not running:
            if rng.randrange(_CHECK_EVERY) == 0:
                world.check()
            else:
                world.oracle.check_locks()

    def _unchanged(self, before: list[bytes], rax: int) -> None:
        after = self.world.oracle.fingerprint(self.world.ranges)
        if after != before:
            at = [_difference(*pair) for pair in zip(before, after, strict=False) if pair[0] != pair[1]]
            raise BrokenInvariantError(f"{_mnemonic(rax)} was refused and changed something | {at}")

    def _state(self, given: dict[str, int]) -> tuple[object, ...]:
        """The state of what the operands name: part of the measure of coverage."""
        oracle, g = self.world.oracle, self.world.oracle.state
        kinds = []
        for name in ("rcx", "rdx", "r8"):
            page = given.get(name, 1)
            known = g.blocks.get(page >> 30) if not page & g.not_a_page & ~0xFFF else None
            level, kind, _ = oracle.pamt(page & PAGE_MASK) if known is not None else (0, -1, 0)
            kinds.append((level, kind))
            if kind == PageType.TDR:
                kinds.append(oracle.life_of(page & PAGE_MASK))
        return (g.sys_state, len(self._inside), *kinds)

    def _answered(self, call: Call, regs: Registers, given: dict[str, int], state: tuple[object, ...]) -> None:
        world, rax = self.world, regs.rax
        if rax:
            _known(rax)
        elif call.leaf in HOST_LEAVES:
            world.note(call.leaf, given)
        world.check_registers(regs)
        detail = rax & 0xFFFF if rax & _ERROR else 0
        signal = (call.leaf, call.version, rax >> _STATUS_SHIFT, detail, state)
        if call.leaf != _VP_ENTER and call.rax is None and self.host.learn(call, signal, good=not rax):
            self._operands.add(call, kinds_of(SeamcallLeaf(call.leaf)))

    # --- a vCPU
    def _exit(self, lp: LogicalProcessor, core: Core, launch: bool) -> int:
        """The processor in non-root mode: what came back from the last exit, and the next one."""
        del launch
        core.vmwrite(vmcs.ENTRY_INTERRUPTION_INFO, core.vmread(vmcs.ENTRY_INTERRUPTION_INFO) & ~(1 << 31))  # delivered
        self._bound[self._entered[lp.index]] = lp.index
        rng = self.rng
        asked = self._asked.pop(lp.index, None)
        if asked is not None:
            self._came_back(core, *asked)
        other = self.world.lps[1 - lp.index]
        if rng.random() < self.host_inside and other.index not in self._inside and self._left > 0:
            self._inside.add(lp.index)
            try:
                self._host(self.host.next(), other)
            finally:
                self._inside.discard(lp.index)
        self._visit[lp.index] = left = self._visit.get(lp.index, 0) - 1
        core.vmwrite(vmcs.GUEST_IA32_EFER, core.vmread(vmcs.GUEST_IA32_EFER) | _EFER_LONG_MODE)
        core.vmwrite(vmcs.GUEST_CS_ACCESS_RIGHTS, _LONG_MODE_CODE)
        reason, qualification = self._reason(lp, core, left)
        core.vmwrite(vmcs.EXIT_REASON, reason)
        core.vmwrite(vmcs.EXIT_QUALIFICATION, qualification)
        core.vmwrite(vmcs.EXIT_INSTRUCTION_LENGTH, _INSTRUCTION.get(reason, 0))
        interrupt = reason is ExitReason.EXTERNAL_INTERRUPT
        core.vmwrite(vmcs.EXIT_INTERRUPTION_INFO, _INTERRUPT_INFO if interrupt else 0)
        core.vmwrite(vmcs.IDT_VECTORING_INFO, 0)
        return reason

    def _reason(self, lp: LogicalProcessor, core: Core, left: int) -> tuple[ExitReason, int]:
        """Choose an exit and set up what belongs to it."""
        rng = self.rng
        roll = rng.randrange(32)
        if left <= 0:
            words = [0] if self._debug.get(lp.index) else self.world.secrets or [0]
            core.set_gprs(tuple(rng.choice(words) for _ in range(16)))  # nothing of these may reach the host
            return ExitReason.EXTERNAL_INTERRUPT, 0
        if roll < 26:
            self._tdcall(lp, core)
            return ExitReason.TDCALL, 0
        gprs = [0] * 16
        if roll < 28:
            gprs[0], gprs[1] = rng.choice(_CPUID_LEAVES), rng.choice((0, 1, 2, 0x40))
            core.set_gprs(tuple(gprs))
            return ExitReason.CPUID, 0
        if roll < 30:
            gprs[1], gprs[0], gprs[2] = rng.choice(_MSRS), rng.choice(EDGES) & 0xFFFF_FFFF, rng.choice((0, 1))
            core.set_gprs(tuple(gprs))
            if not self._msr_exits(core, gprs[1], write=roll == 29):
                return ExitReason.HLT, 0
            return (ExitReason.RDMSR, 0) if roll == 28 else (ExitReason.WRMSR, 0)
        if roll == 30:
            gpa = rng.choice(self.world.numbers["info"]) & -4096
            core.vmwrite(vmcs.GUEST_PHYSICAL_ADDRESS, gpa | rng.choice((0, 0, 1 << 47)))
            return ExitReason.EPT_VIOLATION, rng.choice((1, 2, 4)) | 0x180
        return ExitReason.HLT, 0

    def _msr_exits(self, core: Core, msr: int, *, write: bool) -> bool:
        """Whether the TD's MSR bitmaps let hardware exit (SDM 25.6.9)."""
        low = msr & 0x1FFF
        if msr not in (low, low | 0xC000_0000):
            return True
        at = core.vmread(vmcs.MSR_BITMAPS) + (low >> 3) + (0x400 if msr >> 31 else 0) + (0x800 if write else 0)
        return bool(self.world.platform.memory.read(at, 1, seam=True)[0] >> (low & 7) & 1)

    def _fresh_guest(self) -> Call:
        rng = self.rng
        if rng.randrange(12):
            return fresh(rng, rng.choice(self._guest_leaves))
        subfunction = rng.choice((*VmcallLeaf, *VmcallLeaf, rng.getrandbits(17)))
        operands = {"rcx": rng.choice(_MASKS), "r10": rng.choice((0, 0, 1)), "r11": int(subfunction)}
        operands |= {name: rng.choice(EDGES) for name in ("r12", "r13", "r14", "r15")}
        recipes = tuple((name, Recipe("number", value)) for name, value in operands.items())
        return Call(int(TdcallLeaf.VP_VMCALL), 0, recipes)

    def _change_guest(self, call: Call) -> Call:
        return change(self.rng, call, kinds_of(TdcallLeaf(call.leaf)))

    def _tdcall(self, lp: LogicalProcessor, core: Core) -> None:
        call = self.guest.next()
        self.guest_calls += 1
        regs = Registers()
        for name, recipe in call.operands:
            setattr(regs, name, resolve(recipe, self.world.numbers))
        regs.rax = call.rax if call.rax is not None else rax_for(call.leaf, call.version)
        core.set_gprs(regs.values())
        self._asked[lp.index] = call, regs.rax

    def _came_back(self, core: Core, call: Call, asked: int) -> None:
        """The answer to a TDCALL, if it was answered (it may have been an exception)."""
        rax = core.gpr(0)
        if rax != asked and asked & _LEAF:
            _known(rax)
            signal = (call.leaf, call.version, rax >> _STATUS_SHIFT, rax & 0xFFFF if rax & _ERROR else 0)
            self.guest.learn(call, signal, good=not rax)


def _difference(before: bytes, after: bytes) -> str:
    """The first bytes in which two structures differ."""
    at = next((n for n, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), 0) & -8
    return f"at {at:#x} {before[at : at + 16].hex()} became {after[at : at + 16].hex()}"


def _mnemonic(rax: int) -> str:
    """The leaf that a host's RAX names."""
    leaf = rax & _LEAF
    return SeamcallLeaf(leaf).mnemonic if leaf in HOST_LEAVES else f"leaf {leaf}"


def _known(rax: int) -> None:
    if rax and status_of(rax).name.startswith("UNKNOWN"):
        raise BrokenInvariantError(f"no status has the number {status_of(rax):#x}")


def seamcalls(rng: random.Random, steps: int) -> Iterator[int]:
    """Mostly the host calls: every leaf, in every state of the module and of TDs. A step is a SEAMCALL."""
    walls = Walls(rng, enters=0.04, host_inside=0.3, stages=_STAGES)
    while walls.host_calls < steps:
        before = walls.host_calls
        walls.step()
        yield min(walls.host_calls, steps) - before
    walls.world.check()


def tdcalls(rng: random.Random, steps: int) -> Iterator[int]:
    """Mostly TDs call, while the host blocks, removes and frees what they name. A step is a TDCALL."""
    walls = Walls(rng, enters=0.5, host_inside=0.1, stages=(Stage.POPULATED,))
    while walls.guest_calls < steps:
        before = walls.guest_calls
        walls.step()
        yield min(walls.guest_calls, steps) - before
    walls.world.check()
