"""The machine that calls are thrown at: the TDX module in each state of its own life, with TDs in each of theirs."""

import random
import struct
from dataclasses import replace
from enum import IntEnum
from functools import cache
from typing import Final

from softtdx.abi.fields import table
from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.leaves import SeamldrLeaf, rax_for
from softtdx.abi.structs import Attributes, SeamldrParams, TdmrInfo, TdParams
from softtdx.attack.fuzz.core import EDGES
from softtdx.attack.oracle import BrokenInvariantError, Oracle
from softtdx.hw import LogicalProcessor, Platform, PlatformDescription, Registers, preset
from softtdx.hw.faults import BusFault, MachineCheck
from softtdx.kvm.tdx_host import ModuleRelease
from softtdx.seamldr import development_release, launch_np_seamldr

__all__ = ["BUFFERS", "PAGE", "Stage", "World", "install", "secret_word", "write_release"]

PAGE: Final = 4096
MIB2: Final = 1 << 21
GIB: Final = 1 << 30
GLOBAL_HKID: Final = 32
# The map. No single flipped bit leads from a buffer, or from a round number, to memory that TDX owns.
SMALL: Final = (0x120_0000, 0x140_0000)  # 2 MiB ranges from which single pages come
LARGE: Final = tuple(0x1200_0000 + n * MIB2 for n in range(4))
PAMT: Final = 0x44A0_0000
PAMT_PAGES: Final = 0x1600_0000  # for dynamic PAMT
BUFFERS: Final = tuple(0x5A5A_5000 + n * PAGE for n in range(8))
RELEASE: Final = 0x4C00_0000  # parameters, SIGSTRUCT and image of the module
SMALL_PAGES: Final = 320  # that are ever given to the module
FREE_PAGES: Final = 96  # of these that calls like to name
DATA_GPAS: Final = (0, PAGE, 5 * PAGE, MIB2, 2 * MIB2)
PRODUCTION, DEBUG, PARTITIONED, TDMRS = range(4)  # what buffers hold at first
PAGE_MASK: Final = 0x000F_FFFF_FFFF_F000
_MADE: Final[dict[int, tuple[str, str]]] = {
    Leaf.MNG_CREATE: ("tdr", "rcx"), Leaf.VP_CREATE: ("tdvpr", "rcx"), Leaf.MNG_ADDCX: ("used", "rcx"),
    Leaf.VP_ADDCX: ("used", "rcx"), Leaf.MEM_SEPT_ADD: ("used", "r8"), Leaf.MEM_PAGE_ADD: ("used", "r8"),
    Leaf.MEM_PAGE_AUG: ("used", "r8"), Leaf.MEM_PAGE_RELOCATE: ("used", "r8"),
}  # fmt: skip
"""Leaf -> the kind of number that it makes, and the register that named it."""
_LEVELS = 4
_READ_EVERY = 8  # checks
_RESERVED_LOW = 1 << 20


class Stage(IntEnum):
    """How far the module is brought up before the calls begin."""

    LOADED = 0
    INITIALIZED = 1
    CONFIGURED = 2
    HALF_READY = 3  # in the middle of TDH.SYS.TDMR.INIT
    READY = 4
    POPULATED = 5  # with a TD in each state


@cache
def _description() -> PlatformDescription:
    return replace(preset("spr"), cmrs=((_RESERVED_LOW, 0x6000_0000 - _RESERVED_LOW),))


_SECRET: Final = b"\xe7\xc2^\xe7\xc2^"  # what all secret words share


def secret_word(number: int) -> int:
    """The word with which production TD `number` fills its memory and registers."""
    return int.from_bytes(_SECRET, "little") << 16 | number


class World:
    """A platform, the numbers that mean something on it, and the oracle that watches it."""

    def __init__(self, rng: random.Random, stage: Stage, *, dynamic_pamt: bool | None = None) -> None:
        """Bring a machine up to `stage`; one in six has dynamic PAMT."""
        self.stage = stage
        self.dynamic_pamt = rng.randrange(6) == 0 if dynamic_pamt is None else dynamic_pamt
        self.platform = Platform(_description())
        self.lps: list[LogicalProcessor] = self.platform.lps
        self.oracle = Oracle(self.platform)
        self.ranges = [*SMALL, *LARGE]  # and where chance gave a page from elsewhere
        small = [base + n * PAGE for base in SMALL for n in range(SMALL_PAGES // len(SMALL))]
        self._small = small
        self._checks = 0
        self._spare = iter(small[:-FREE_PAGES])
        self._hkids = iter(range(GLOBAL_HKID + 1, 64))
        self.secrets: list[int] = []  # words of production TDs
        self.vcpus: list[int] = []  # TDVPRs of vCPUs that can run
        infos = [gpa + n * PAGE for gpa in DATA_GPAS for n in (0, 1)]
        infos += [base & -(1 << 12 + 9 * level) | level for base in DATA_GPAS for level in (1, 2, 3)]
        self.numbers: dict[str, list[int]] = {
            "page": small[-FREE_PAGES:],
            "large": list(LARGE),
            "region": [base | 1 for base in (*SMALL, *LARGE)],
            "tdr": small[-1:],
            "tdvpr": small[-2:-1],
            "used": small[-3:-2],
            "info": infos,
            "gpa": [0, 0x40, 0x100, 0x400, PAGE, PAGE + 0x800, 5 * PAGE, MIB2, 1 << 47],
            **{f"field {scope}": _field_ids(scope) for scope in ("td", "vp", "sys")},
            "hkid": [0, 1, GLOBAL_HKID, *range(GLOBAL_HKID + 1, GLOBAL_HKID + 12), 63],
            "buffer": list(BUFFERS),
            "tdmr": [0, 0, 0, GIB, PAMT],
            "edge": [*EDGES, *[0] * 8, *[1] * 4],
        }
        self._fill_buffers()
        install(self.platform, development_release())
        if stage >= Stage.INITIALIZED:
            self._bring_up(stage)
        if stage is Stage.POPULATED:
            self._populate(rng)

    # --- calls that must succeed
    def ok(self, leaf: Leaf, **operands: int) -> Registers:
        """One SEAMCALL of the set-up."""
        regs = self.lps[0].seamcall(Registers(rax=leaf, **operands))
        if regs.rax:
            raise BrokenInvariantError(f"a good {leaf.mnemonic} was answered {regs.rax:#x}")
        return regs

    def page(self) -> int:
        """A page that was never used."""
        return next(self._spare)

    # --- bring-up
    def _bring_up(self, stage: Stage) -> None:
        self.ok(Leaf.SYS_INIT)
        for lp in self.lps if stage > Stage.INITIALIZED else self.lps[:1]:
            lp.seamcall(Registers(rax=Leaf.SYS_LP_INIT))
        if stage >= Stage.CONFIGURED:
            self.ok(Leaf.SYS_CONFIG, rcx=BUFFERS[TDMRS], rdx=1, r8=GLOBAL_HKID | self.dynamic_pamt << 16)
        if stage >= Stage.HALF_READY:
            self.ok(Leaf.SYS_KEY_CONFIG)
            end = GIB // 2 if stage is Stage.HALF_READY else GIB
            while self.ok(Leaf.SYS_TDMR_INIT, rcx=0).rdx < end:
                pass
        if stage >= Stage.READY and self.dynamic_pamt:
            for n, base in enumerate(SMALL):
                self.ok(
                    Leaf.PHYMEM_PAMT_ADD,
                    rcx=base | 1,
                    rdx=PAMT_PAGES + 2 * n * PAGE,
                    r8=PAMT_PAGES + (2 * n + 1) * PAGE,
                )

    def _fill_buffers(self) -> None:
        for number, attributes, vms in (
            (PRODUCTION, Attributes.SEPT_VE_DISABLE, 0),
            (DEBUG, Attributes.DEBUG, 0),
            (PARTITIONED, Attributes.SEPT_VE_DISABLE, 1),
        ):
            self.write(BUFFERS[number], _td_params(attributes, vms))
        self.write(BUFFERS[TDMRS], (BUFFERS[TDMRS] + 512).to_bytes(8, "little"))
        self.write(BUFFERS[TDMRS] + 512, _tdmr_info(0x8000 if self.dynamic_pamt else 0x40_0000))
        lists = struct.pack("<16Q", *(BUFFERS * 2))
        for at in BUFFERS[TDMRS + 1 :]:
            self.write(at, lists)

    def write(self, pa: int, data: bytes) -> None:
        """The host's own store."""
        self.lps[0].write(pa, data)

    def is_tdx_page(self, pa: int) -> bool:
        """Whether the page was last written with a private KeyID: its lines have the TD-owner bit."""
        _, _, owner, _ = self.platform.memory.raw_line(pa & PAGE_MASK)
        return owner

    def spoil(self, rng: random.Random, buffer: int) -> None:
        """A few bytes of a buffer become others; or all of them become what they were."""
        if rng.randrange(3) == 0:
            self._fill_buffers()
            return
        base = buffer & -PAGE
        if base in BUFFERS:
            for _ in range(rng.randint(1, 4)):
                self.write(base + rng.randrange(1024), bytes([rng.choice((0, 1, 0x80, 0xFF, rng.randrange(256)))]))

    # --- TDs
    def _populate(self, rng: random.Random) -> None:
        """One TD in each state of its life; production and debug ones that run, and of those two in random order."""
        self._td(until="created")
        self._td(until="keyed")
        self._td(until="pages")
        self._td(until="building")
        kinds = [(PRODUCTION, "runnable"), (DEBUG, "runnable"), (PRODUCTION, "runnable"), (PARTITIONED, "runnable")]
        rng.shuffle(kinds)
        for params, until in kinds:
            self._td(params, until=until)
        self._td(until="blocked")
        self._td(until="teardown")

    def _td(self, params: int = PRODUCTION, *, until: str) -> None:
        tdr, hkid = self.page(), next(self._hkids)
        self.numbers["tdr"].append(tdr)
        self.ok(Leaf.MNG_CREATE, rcx=tdr, rdx=hkid)
        if until == "created":
            return
        self.ok(Leaf.MNG_KEY_CONFIG, rcx=tdr)
        if until == "keyed":
            return
        vms = int(params == PARTITIONED)
        for _ in range(6 + vms):
            self.numbers["used"].append(self.page())
            self.ok(Leaf.MNG_ADDCX, rcx=self.numbers["used"][-1], rdx=tdr)
        if until == "pages":
            return
        self.ok(Leaf.MNG_INIT, rcx=tdr, rdx=BUFFERS[params])
        self._memory(tdr, secret=params != DEBUG)
        if until == "building":
            self.numbers["tdvpr"].append(self.page())
            self.ok(Leaf.VP_CREATE, rcx=self.numbers["tdvpr"][-1], rdx=tdr)
            return
        for _ in range(2):
            self._vcpu(tdr, pages=5 + 3 * vms)
        self.ok(Leaf.MR_FINALIZE, rcx=tdr)
        self._more_memory(tdr)
        if until == "runnable":
            self.vcpus += self.numbers["tdvpr"][-2:]
        if until in ("blocked", "teardown"):
            for tdvpr in self.numbers["tdvpr"][-2:]:
                self.ok(Leaf.VP_FLUSH, rcx=tdvpr)
            self.ok(Leaf.MNG_VPFLUSHDONE, rcx=tdr)
        if until == "teardown":
            self.ok(Leaf.PHYMEM_CACHE_WB, rcx=0)
            self.ok(Leaf.MNG_KEY_FREEID, rcx=tdr)

    def _memory(self, tdr: int, *, secret: bool) -> None:
        """Tables for the first GiB and two pages with the TD's words."""
        for level in (3, 2, 1):
            self.numbers["used"].append(self.page())
            self.ok(Leaf.MEM_SEPT_ADD, rcx=level, rdx=tdr, r8=self.numbers["used"][-1])
        word = secret_word(len(self.secrets)) if secret else 0xDEB6
        if secret:
            self.secrets.append(word)
        source = RELEASE
        self.write(source, word.to_bytes(8, "little") * (PAGE // 8))
        for gpa in (0, PAGE):
            page = self.page()
            self.numbers["used"].append(page)
            self.ok(Leaf.MEM_PAGE_ADD, rcx=gpa, rdx=tdr, r8=page, r9=source)
        self.write(source, bytes(PAGE))

    def _more_memory(self, tdr: int) -> None:
        """A pending page, and one that is blocked."""
        for gpa in (5 * PAGE, 6 * PAGE):
            self.numbers["used"].append(self.page())
            self.ok(Leaf.MEM_PAGE_AUG, rcx=gpa, rdx=tdr, r8=self.numbers["used"][-1])
        self.ok(Leaf.MEM_RANGE_BLOCK, rcx=6 * PAGE, rdx=tdr)

    def _vcpu(self, tdr: int, pages: int) -> None:
        tdvpr = self.page()
        self.numbers["tdvpr"].append(tdvpr)
        self.ok(Leaf.VP_CREATE, rcx=tdvpr, rdx=tdr)
        for _ in range(pages):
            self.numbers["used"].append(self.page())
            self.ok(Leaf.VP_ADDCX, rcx=self.numbers["used"][-1], rdx=tdvpr)
        self.ok(Leaf.VP_INIT, rcx=tdvpr, rdx=0)

    def note(self, leaf: int, given: dict[str, int]) -> None:
        """A call succeeded: what it made can be an operand of others."""
        for value in given.values():
            base = value & PAGE_MASK & -MIB2
            if base not in self.ranges and base < GIB:
                self.ranges.append(base)
        kind, register = _MADE.get(leaf, ("", ""))
        if register in given:
            known = self.numbers[kind]
            known.append(given[register] & PAGE_MASK)
            if len(known) > SMALL_PAGES:
                del known[0]

    # --- what must hold
    def check(self, *, running: bool = False) -> None:
        """The structures agree with each other, and the host reads none of the TDs' words."""
        self.oracle.check(self.ranges, running=running)
        self._checks += 1
        if self._checks % _READ_EVERY == 0:
            self._no_plaintext()

    def _no_plaintext(self) -> None:
        if not self.secrets:
            return
        memory = self.platform.memory
        for page in self._small:
            try:
                content = memory.read(page, PAGE)
            except (MachineCheck, BusFault):
                continue  # an answer too
            if _SECRET in content:
                raise BrokenInvariantError(f"the host reads a TD's words at {page:#x}")

    def check_registers(self, regs: Registers) -> None:
        """What SEAMRET leaves: no word of a production TD's."""
        found = set(regs.values()).intersection(self.secrets)
        if found:
            raise BrokenInvariantError(f"SEAMRET left a TD's word in a register: {found}")


@cache
def _field_ids(scope: str) -> list[int]:
    return [row.field_id for row in table(scope).by_name.values()]


def _td_params(attributes: int, vms: int) -> bytes:
    params = TdParams()
    params.attributes, params.xfam, params.max_vcpus, params.num_l2_vms = attributes, 3, 4, vms
    params.eptp_controls, params.tsc_frequency = 6 | (_LEVELS - 1) << 3, 100
    return bytes(params)


def _tdmr_info(pamt_4k_size: int) -> bytes:
    info = TdmrInfo()
    info.base, info.size = 0, GIB
    info.pamt_1g_base, info.pamt_1g_size = PAMT, 0x1000
    info.pamt_2m_base, info.pamt_2m_size = PAMT + 0x1000, 0x2000
    info.pamt_4k_base, info.pamt_4k_size = PAMT + 0x1_0000, pamt_4k_size
    info.reserved_areas[0].offset, info.reserved_areas[0].size = 0, _RESERVED_LOW
    return bytes(info)


# --- the SEAM loader
def write_release(platform: Platform, release: ModuleRelease) -> SeamldrParams:
    """Put image and SIGSTRUCT into memory; the SEAMLDR_PARAMS that name them."""
    pages = -(-len(release.image) // PAGE)
    platform.memory.write(RELEASE + PAGE, release.sigstruct)
    platform.memory.write(RELEASE + 2 * PAGE, release.image)
    params = SeamldrParams()
    params.sigstruct_pa, params.num_module_pages = RELEASE + PAGE, pages
    given = [RELEASE + (2 + n) * PAGE if n < pages else 0 for n in range(SeamldrParams.module_pages.count)]
    params.module_pages = given
    return params


def install(platform: Platform, release: ModuleRelease) -> None:
    """Launch the SEAM loader and let every processor install the module."""
    launch_np_seamldr(platform)
    platform.memory.write(RELEASE, bytes(write_release(platform, release).view))
    for lp in platform.lps:
        regs = lp.seamcall(Registers(rax=rax_for(SeamldrLeaf.INSTALL), rcx=RELEASE))
        if regs.rax:
            raise BrokenInvariantError(f"SEAMLDR.INSTALL of a good module was answered {regs.rax:#x}")
