"""A machine with the TDX module up, and short ways to build TDs by raw SEAMCALLs: what the module's tests stand on."""

from dataclasses import dataclass, field, replace

from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.status import Status
from softtdx.abi.structs import SysInfoTable, TdmrInfo, TdParams
from softtdx.hw import Platform, Registers, preset
from softtdx.hw.seamops import SeamIdentity
from softtdx.module import TdxModule

PAGE = 4096
GIB = 1 << 30
MIB2 = 1 << 21
PAMT = 0x4000_0000  # above the TDMR, within the CMR
HOST = 0x4200_0000  # memory of the host that no TDMR covers
BUFFER = HOST
SOURCE = HOST + 0x1000
TDMR = 0  # the TDMR's base; its first MiB is reserved
SPARE_TDMR = 2 * GIB
NULL_PA = (1 << 64) - 1
GLOBAL_HKID = 32
ATTRIBUTES_DEBUG = 1
ATTRIBUTES_SEPT_VE_DISABLE = 1 << 28


def status(rax: int) -> tuple[Status, int]:
    """(status, detail) of a RAX value."""
    return Status(rax & ~0xFFFF_FFFF), rax & 0xFFFF_FFFF


class Machine:
    """A platform whose module is ready, with pages to give away."""

    def __init__(self, *, lps: int = 2, dynamic_pamt: bool = False, spare_gib: bool = False) -> None:
        """`spare_gib`: more memory, and a second TDMR over it of which nothing is used (SPARE_TDMR)."""
        description = preset("spr")
        if spare_gib:
            end = SPARE_TDMR + GIB
            description = replace(description, ram=((0, end),), cmrs=(*description.cmrs, (SPARE_TDMR, GIB)))
        self.tdmrs = [TDMR, SPARE_TDMR] if spare_gib else [TDMR]
        self.platform = platform = Platform(description)
        self.lps = platform.lps[:lps]
        self.next_page = 0x100_0000
        self.next_large = 0x1000_0000
        self.next_hkid = GLOBAL_HKID + 1
        self.returned: list[int] = []
        self.dynamic_pamt = dynamic_pamt
        self._load()
        self._bring_up()

    # --- SEAMCALL
    def call(self, leaf: Leaf, lp: int = 0, version: int = 0, **operands: int) -> Registers:
        """One SEAMCALL, whatever its status."""
        return self.lps[lp].seamcall(Registers(rax=int(leaf) | version << 16, **operands))

    def ok(self, leaf: Leaf, lp: int = 0, version: int = 0, **operands: int) -> Registers:
        """One SEAMCALL that must succeed."""
        regs = self.call(leaf, lp, version, **operands)
        assert regs.rax == 0, f"{leaf.name}({operands}): {status(regs.rax)}"
        return regs

    def fails(self, leaf: Leaf, want: Status, operand: int = 0, lp: int = 0, version: int = 0, **operands: int):
        """One SEAMCALL that must fail with this status and detail; returns its registers."""
        regs = self.call(leaf, lp, version, **operands)
        assert status(regs.rax) == (want, operand), f"{leaf.name}({operands})"
        return regs

    # --- memory
    def page(self) -> int:
        """A free page of the TDMR."""
        if self.returned:
            return self.returned.pop()
        self.next_page += PAGE
        return self.next_page - PAGE

    def large(self) -> int:
        """A free 2 MiB range of the TDMR."""
        self.next_large += MIB2
        return self.next_large - MIB2

    def host_write(self, pa: int, data: bytes) -> None:
        self.lps[0].write(pa, data)

    # --- bring-up
    def _load(self) -> None:
        """Install the module as the loader would; the loader itself has tests of its own."""
        platform = self.platform
        table = SysInfoTable.parse(platform.memory.read(platform.seam.base, PAGE, seam=True))
        table.module_hv = table.min_update_hv = table.no_downgrade = 1
        table.num_handoff_pages = 15
        platform.memory.write(platform.seam.base, bytes(table), seam=True)
        platform.seamops.seamextend(SeamIdentity(bytes(16), b"\x11" * 48, bytes(48), 0))
        platform.seamops.database_insert()
        self.module = TdxModule(platform.lps[0]._seam_cpu, bytes(table))
        platform.seam.module = self.module

    def _bring_up(self) -> None:
        self.ok(Leaf.SYS_INIT)
        for index in range(len(self.platform.lps)):
            assert self.platform.lps[index].seamcall(Registers(rax=Leaf.SYS_LP_INIT)).rax == 0
        pointers = b""
        for number, base in enumerate(self.tdmrs):
            info = TdmrInfo()
            info.base, info.size = base, GIB
            pamt = PAMT + number * 0x80_0000
            info.pamt_1g_base, info.pamt_1g_size = pamt, 0x1000
            info.pamt_2m_base, info.pamt_2m_size = pamt + 0x1000, 0x2000
            info.pamt_4k_base, info.pamt_4k_size = pamt + 0x1_0000, 0x8000 if self.dynamic_pamt else 0x40_0000
            if base == TDMR:
                info.reserved_areas[0].offset, info.reserved_areas[0].size = 0, 0x10_0000
            at = BUFFER + 0x200 * (number + 1)
            self.host_write(at, bytes(info))
            pointers += at.to_bytes(8, "little")
        self.host_write(BUFFER, pointers)
        options = GLOBAL_HKID | (1 << 16 if self.dynamic_pamt else 0)
        self.ok(Leaf.SYS_CONFIG, rcx=BUFFER, rdx=len(self.tdmrs), r8=options)
        self.ok(Leaf.SYS_KEY_CONFIG)
        for base in self.tdmrs:
            while self.ok(Leaf.SYS_TDMR_INIT, rcx=base).rdx < base + GIB:
                pass


def td_params(
    *, attributes: int = ATTRIBUTES_SEPT_VE_DISABLE, gpaw: int = 0, levels: int = 4, l2_vms: int = 0
) -> bytes:
    """TD_PARAMS of a small TD."""
    params = TdParams()
    params.attributes = attributes
    params.xfam = 3
    params.max_vcpus = 4
    params.num_l2_vms = l2_vms
    params.eptp_controls = 6 | (levels - 1) << 3
    params.config_flags = gpaw
    params.tsc_frequency = 100
    return bytes(params)


@dataclass
class Td:
    """A TD being built or running; `tables` are the S-EPT pages added, by (GPA, level)."""

    machine: Machine
    tdr: int
    hkid: int
    tdcx: list[int] = field(default_factory=list)
    tables: dict[tuple[int, int], int] = field(default_factory=dict)
    vcpu_pages: list[int] = field(default_factory=list)
    l2_vms: int = 0

    @classmethod
    def create(cls, machine: Machine, *, params: bytes | None = None, initialize: bool = True) -> "Td":
        """Key configured, TDCS added and (unless told otherwise) initialised."""
        td = cls(machine, machine.page(), machine.next_hkid)
        machine.next_hkid += 1
        machine.ok(Leaf.MNG_CREATE, rcx=td.tdr, rdx=td.hkid)
        machine.ok(Leaf.MNG_KEY_CONFIG, rcx=td.tdr)
        td.l2_vms = TdParams.parse(params).num_l2_vms if params else 0
        for _ in range(6 + td.l2_vms):
            td.tdcx.append(machine.page())
            machine.ok(Leaf.MNG_ADDCX, rcx=td.tdcx[-1], rdx=td.tdr)
        if initialize:
            machine.host_write(BUFFER, params or td_params())
            machine.ok(Leaf.MNG_INIT, rcx=td.tdr, rdx=BUFFER)
        return td

    def add_table(self, gpa: int, level: int) -> int:
        """An S-EPT page below the entry of `gpa` at `level`."""
        page = self.machine.page()
        self.machine.ok(Leaf.MEM_SEPT_ADD, rcx=gpa | level, rdx=self.tdr, r8=page)
        self.tables[gpa, level] = page
        return page

    def add_path(self, gpa: int, down_to: int = 1, top: int = 3) -> None:
        """The S-EPT pages that a page at `gpa` needs, as far as they are missing."""
        for level in range(top, down_to - 1, -1):
            base = gpa & -(1 << (12 + 9 * level))
            if (base, level) not in self.tables:
                self.add_table(base, level)

    def add_page(self, gpa: int, content: bytes = b"") -> int:
        """A measured-by-address page with content."""
        self.machine.host_write(SOURCE, content.ljust(PAGE, b"\0"))
        page = self.machine.page()
        self.machine.ok(Leaf.MEM_PAGE_ADD, rcx=gpa, rdx=self.tdr, r8=page, r9=SOURCE)
        return page

    def aug(self, gpa: int, level: int = 0) -> int:
        """A pending page."""
        page = self.machine.large() if level else self.machine.page()
        self.machine.ok(Leaf.MEM_PAGE_AUG, rcx=gpa | level, rdx=self.tdr, r8=page)
        return page

    def add_vcpu(self) -> int:
        """A vCPU, initialised (version 0); returns its TDVPR."""
        m = self.machine
        tdvpr = m.page()
        self.vcpu_pages.append(tdvpr)
        m.ok(Leaf.VP_CREATE, rcx=tdvpr, rdx=self.tdr)
        for _ in range(5 + 3 * self.l2_vms):
            self.vcpu_pages.append(m.page())
            m.ok(Leaf.VP_ADDCX, rcx=self.vcpu_pages[-1], rdx=tdvpr)
        m.ok(Leaf.VP_INIT, rcx=tdvpr, rdx=0)
        return tdvpr

    def finalize(self) -> int:
        """One vCPU, then MR.FINALIZE: from here the TD can run. Returns the TDVPR."""
        tdvpr = self.add_vcpu()
        self.machine.ok(Leaf.MR_FINALIZE, rcx=self.tdr)
        return tdvpr

    def block(self, gpa: int, level: int = 0) -> None:
        self.machine.ok(Leaf.MEM_RANGE_BLOCK, rcx=gpa | level, rdx=self.tdr)

    def track(self) -> None:
        self.machine.ok(Leaf.MEM_TRACK, rcx=self.tdr)

    def entry(self, gpa: int, level: int = 0) -> tuple[int, int, int]:
        """SEPT.RD: (the entry, its public state, the level at which it was found)."""
        regs = self.machine.ok(Leaf.MEM_SEPT_RD, rcx=gpa | level, rdx=self.tdr)
        return regs.rcx, regs.rdx >> 8 & 0xFF, regs.rdx & 7

    def reclaim_control_pages(self) -> None:
        """In teardown, with no other page left: TDVPS, TDCS and at last the TDR come back to the machine."""
        for page in [*self.vcpu_pages, *self.tdcx, self.tdr]:
            self.machine.ok(Leaf.PHYMEM_PAGE_RECLAIM, rcx=page)
            self.machine.returned.append(page)
