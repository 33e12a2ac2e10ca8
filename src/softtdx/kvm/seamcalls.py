"""SEAMCALLs as the host kernel wraps them: one function a leaf, operands by name.

Facts: arch/x86/virt/vmx/tdx (seamcall wrappers, sc_retry) and the TDX Module ABI. A function returns the registers as
SEAMRET left them; RAX is the status. `expect` is for calls that KVM has no answer to failing.
"""

import errno

from softtdx.abi.leaves import VERSION_SHIFT
from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.status import Status, status_of
from softtdx.hw import LogicalProcessor, Registers
from softtdx.hw.faults import ModeFault, VmFail
from softtdx.kvm.errors import KvmError, SeamcallError

__all__ = ["BUSY", "INTERRUPTED", "TRANSIENT", "enter", "expect", "seamcall"]

_ENTROPY_RETRIES = 10
_BUSY_RETRIES = 10_000
_EXTEND_CHUNK = 256
# The leaves that are called for every page, found once: CPython 3.11 needs 0.2 us to find a member of an Enum.
MEM_PAGE_ADD = Leaf.MEM_PAGE_ADD
MEM_PAGE_AUG = Leaf.MEM_PAGE_AUG
MEM_RANGE_BLOCK = Leaf.MEM_RANGE_BLOCK
MEM_RANGE_UNBLOCK = Leaf.MEM_RANGE_UNBLOCK
MEM_PAGE_REMOVE = Leaf.MEM_PAGE_REMOVE
MEM_PAGE_RELOCATE = Leaf.MEM_PAGE_RELOCATE
MEM_SEPT_RD = Leaf.MEM_SEPT_RD
PHYMEM_PAGE_RECLAIM = Leaf.PHYMEM_PAGE_RECLAIM
MR_EXTEND = Leaf.MR_EXTEND
_SUCCESS = Status.SUCCESS
BUSY = frozenset({Status.OPERAND_BUSY, Status.OPERAND_BUSY_HOST_PRIORITY})
INTERRUPTED = frozenset({Status.INTERRUPTED_RESTARTABLE, Status.INTERRUPTED_RESUMABLE, Status.INTERRUPTED_BUSY})
TRANSIENT = BUSY | INTERRUPTED  # nothing was done, or the module remembers how far it came: call again


def seamcall(
    lp: LogicalProcessor,
    leaf: int,
    version: int = 0,
    *,
    rcx: int = 0,
    rdx: int = 0,
    r8: int = 0,
    r9: int = 0,
    r10: int = 0,
    r11: int = 0,
) -> Registers:
    """One SEAMCALL; a lack of entropy is tried again, as the kernel does."""
    for _ in range(_ENTROPY_RETRIES):
        regs = Registers()
        regs.rax = leaf | version << VERSION_SHIFT
        regs.rcx, regs.rdx, regs.r8, regs.r9, regs.r10, regs.r11 = rcx, rdx, r8, r9, r10, r11
        enter(lp, regs)
        if regs.rax == 0 or status_of(regs.rax) is not Status.RND_NO_ENTROPY:
            break
    return regs


def enter(lp: LogicalProcessor, regs: Registers) -> None:
    """The SEAMCALL instruction. KvmError(ENODEV) when there is no module to enter, or none any more."""
    try:
        lp.seamcall(regs)
    except (VmFail, ModeFault) as fault:
        raise KvmError(errno.ENODEV, f"the TDX module cannot be called: {fault}") from fault


def expect(regs: Registers, leaf: Leaf, *also: Status) -> Status:
    """The status, if it is SUCCESS or one of `also`; otherwise SeamcallError(EIO)."""
    if regs.rax == 0:
        return _SUCCESS
    status = status_of(regs.rax)
    if status is Status.SUCCESS or status in also:
        return status
    raise SeamcallError(errno.EIO, leaf, regs.rax, {"RCX": regs.rcx, "RDX": regs.rdx, "R8": regs.r8})


def call(lp: LogicalProcessor, leaf: Leaf, version: int = 0, **operands: int) -> Registers:
    """A SEAMCALL that must succeed. While it is interrupted or another processor holds an operand it is tried again."""
    regs = _until_free(lp, leaf, version, **operands)
    expect(regs, leaf)
    return regs


# --- the module as a whole
def sys_init(lp: LogicalProcessor) -> None:
    """TDH.SYS.INIT, once, on any processor."""
    call(lp, Leaf.SYS_INIT)


def sys_lp_init(lp: LogicalProcessor) -> None:
    """TDH.SYS.LP.INIT on this processor; one that was done before is no error."""
    expect(seamcall(lp, Leaf.SYS_LP_INIT), Leaf.SYS_LP_INIT, Status.SYS_LP_INIT_DONE)


def sys_rd(lp: LogicalProcessor, field_id: int) -> int:
    """TDH.SYS.RD: the value of a global metadata field."""
    return call(lp, Leaf.SYS_RD, rdx=field_id).r8


def sys_config(lp: LogicalProcessor, tdmr_array: int, count: int, hkid: int) -> None:
    """TDH.SYS.CONFIG: `count` addresses of TDMR_INFO at `tdmr_array`, and the global private HKID."""
    call(lp, Leaf.SYS_CONFIG, rcx=tdmr_array, rdx=count, r8=hkid)


def sys_key_config(lp: LogicalProcessor) -> None:
    """TDH.SYS.KEY.CONFIG: program the global private key on this processor's package."""
    call(lp, Leaf.SYS_KEY_CONFIG)


def sys_tdmr_init(lp: LogicalProcessor, base: int) -> int:
    """TDH.SYS.TDMR.INIT: initialise the next part of a TDMR's PAMT; returns the address it will go on at."""
    return call(lp, Leaf.SYS_TDMR_INIT, rcx=base).rdx


def sys_shutdown(lp: LogicalProcessor, handoff_version: int = 0) -> None:
    """TDH.SYS.SHUTDOWN: prepare for a module update."""
    call(lp, Leaf.SYS_SHUTDOWN, rcx=handoff_version)


# --- a TD
def mng_create(lp: LogicalProcessor, tdr: int, hkid: int) -> None:
    """TDH.MNG.CREATE."""
    call(lp, Leaf.MNG_CREATE, rcx=tdr, rdx=hkid)


def mng_key_config(lp: LogicalProcessor, tdr: int) -> None:
    """TDH.MNG.KEY.CONFIG on this processor's package."""
    expect(_until_free(lp, Leaf.MNG_KEY_CONFIG, rcx=tdr), Leaf.MNG_KEY_CONFIG, Status.KEY_CONFIGURED)


def mng_addcx(lp: LogicalProcessor, tdr: int, page: int) -> None:
    """TDH.MNG.ADDCX: one page of the TDCS."""
    call(lp, Leaf.MNG_ADDCX, rcx=page, rdx=tdr)


def mng_init(lp: LogicalProcessor, tdr: int, td_params: int) -> Registers:
    """TDH.MNG.INIT; the caller reads the status, since user space chose the parameters."""
    return _until_free(lp, Leaf.MNG_INIT, rcx=tdr, rdx=td_params)


def mng_rd(lp: LogicalProcessor, tdr: int, field_id: int) -> int:
    """TDH.MNG.RD: a TD-scope metadata field."""
    return call(lp, Leaf.MNG_RD, rcx=tdr, rdx=field_id).r8


def mng_vpflushdone(lp: LogicalProcessor, tdr: int) -> None:
    """TDH.MNG.VPFLUSHDONE: no vCPU is associated with a processor any more."""
    call(lp, Leaf.MNG_VPFLUSHDONE, rcx=tdr)


def mng_key_freeid(lp: LogicalProcessor, tdr: int) -> None:
    """TDH.MNG.KEY.FREEID: the HKID may be used again."""
    call(lp, Leaf.MNG_KEY_FREEID, rcx=tdr)


def mr_extend(lp: LogicalProcessor, tdr: int, gpa: int, size: int = _EXTEND_CHUNK) -> None:
    """TDH.MR.EXTEND: measure memory, 256 bytes a call."""
    regs, leaf = Registers(), int(MR_EXTEND)
    for chunk in range(gpa, gpa + size, _EXTEND_CHUNK):
        regs.rax, regs.rcx, regs.rdx = leaf, chunk, tdr
        enter(lp, regs)
        if regs.rax:
            call(lp, MR_EXTEND, rcx=chunk, rdx=tdr)


def mr_finalize(lp: LogicalProcessor, tdr: int) -> None:
    """TDH.MR.FINALIZE: the measurement is complete, the TD may run."""
    call(lp, Leaf.MR_FINALIZE, rcx=tdr)


# --- its memory
def mem_sept_add(lp: LogicalProcessor, tdr: int, gpa: int, level: int, page: int) -> Registers:
    """TDH.MEM.SEPT.ADD: `page` becomes the table that the entry of `gpa` at `level` points to."""
    return seamcall(lp, Leaf.MEM_SEPT_ADD, rcx=gpa | level, rdx=tdr, r8=page)


def mem_page_add(lp: LogicalProcessor, tdr: int, gpa: int, page: int, source: int) -> Registers:
    """TDH.MEM.PAGE.ADD: `page`, with the contents of `source`, at `gpa`."""
    return seamcall(lp, MEM_PAGE_ADD, rcx=gpa, rdx=tdr, r8=page, r9=source)


def mem_page_aug(lp: LogicalProcessor, tdr: int, gpa: int, level: int, page: int) -> Registers:
    """TDH.MEM.PAGE.AUG: `page` at `gpa`, pending until the TD accepts it."""
    return seamcall(lp, MEM_PAGE_AUG, rcx=gpa | level, rdx=tdr, r8=page)


def mem_range_block(lp: LogicalProcessor, tdr: int, gpa: int, level: int) -> Registers:
    """TDH.MEM.RANGE.BLOCK: no new translations through the entry."""
    return seamcall(lp, MEM_RANGE_BLOCK, rcx=gpa | level, rdx=tdr)


def mem_range_unblock(lp: LogicalProcessor, tdr: int, gpa: int, level: int) -> Registers:
    """TDH.MEM.RANGE.UNBLOCK."""
    return seamcall(lp, MEM_RANGE_UNBLOCK, rcx=gpa | level, rdx=tdr)


def mem_track(lp: LogicalProcessor, tdr: int) -> Registers:
    """TDH.MEM.TRACK: a new TLB epoch."""
    return seamcall(lp, Leaf.MEM_TRACK, rcx=tdr)


def mem_page_remove(lp: LogicalProcessor, tdr: int, gpa: int, level: int) -> Registers:
    """TDH.MEM.PAGE.REMOVE: take a blocked and tracked page back."""
    return seamcall(lp, MEM_PAGE_REMOVE, rcx=gpa | level, rdx=tdr)


def mem_page_demote(lp: LogicalProcessor, tdr: int, gpa: int, level: int, sept_page: int) -> Registers:
    """TDH.MEM.PAGE.DEMOTE: split a blocked and tracked large mapping; `sept_page` becomes the table of the parts."""
    absent = (1 << 64) - 1
    return seamcall(lp, Leaf.MEM_PAGE_DEMOTE, rcx=gpa | level, rdx=tdr, r8=sept_page, r9=absent, r10=absent, r11=absent)


def mem_page_promote(lp: LogicalProcessor, tdr: int, gpa: int, level: int) -> Registers:
    """TDH.MEM.PAGE.PROMOTE: merge the 512 mappings under a blocked and tracked entry; RCX is the table it frees."""
    return seamcall(lp, Leaf.MEM_PAGE_PROMOTE, rcx=gpa | level, rdx=tdr)


def mem_page_relocate(lp: LogicalProcessor, tdr: int, gpa: int, page: int) -> Registers:
    """TDH.MEM.PAGE.RELOCATE: move a blocked and tracked 4 KiB page to `page`, and unblock it."""
    return seamcall(lp, MEM_PAGE_RELOCATE, rcx=gpa, rdx=tdr, r8=page)


def mem_sept_remove(lp: LogicalProcessor, tdr: int, gpa: int, level: int) -> Registers:
    """TDH.MEM.SEPT.REMOVE: the empty, blocked and tracked table behind the entry of `gpa` at `level`."""
    return seamcall(lp, Leaf.MEM_SEPT_REMOVE, rcx=gpa | level, rdx=tdr)


def mem_sept_rd(lp: LogicalProcessor, tdr: int, gpa: int, level: int) -> Registers:
    """TDH.MEM.SEPT.RD: RCX = the entry, RDX = level and state. KVM needs it for what the mirror cannot know."""
    return seamcall(lp, MEM_SEPT_RD, rcx=gpa | level, rdx=tdr)


def phymem_page_reclaim(lp: LogicalProcessor, page: int) -> Registers:
    """TDH.PHYMEM.PAGE.RECLAIM: take a page back from a TD that is being torn down."""
    return _until_free(lp, PHYMEM_PAGE_RECLAIM, rcx=page)


def phymem_page_wbinvd(lp: LogicalProcessor, keyed_page: int) -> None:
    """TDH.PHYMEM.PAGE.WBINVD: flush the cache lines of a page; the address names its HKID."""
    call(lp, Leaf.PHYMEM_PAGE_WBINVD, rcx=keyed_page)


def phymem_cache_wb(lp: LogicalProcessor) -> None:
    """TDH.PHYMEM.CACHE.WB on this processor's package, resumed until it is complete."""
    resume = 0
    for _ in range(_BUSY_RETRIES):
        regs = seamcall(lp, Leaf.PHYMEM_CACHE_WB, rcx=resume)
        status = Status.SUCCESS if regs.rax == 0 else status_of(regs.rax)
        if status is Status.INTERRUPTED_RESUMABLE:
            lp.acknowledge_interrupt()
            resume = 1
        elif status is Status.WBCACHE_RESUME_ERROR:
            resume = 0  # there was nothing to resume
        elif status not in TRANSIENT:
            break
    expect(regs, Leaf.PHYMEM_CACHE_WB, Status.NO_HKID_READY_TO_WBCACHE)


# --- its vCPUs
def vp_create(lp: LogicalProcessor, tdr: int, tdvpr: int) -> None:
    """TDH.VP.CREATE."""
    call(lp, Leaf.VP_CREATE, rcx=tdvpr, rdx=tdr)


def vp_addcx(lp: LogicalProcessor, tdvpr: int, page: int) -> None:
    """TDH.VP.ADDCX: one page of the TDVPS."""
    call(lp, Leaf.VP_ADDCX, rcx=page, rdx=tdvpr)


def vp_init(lp: LogicalProcessor, tdvpr: int, initial_rcx: int, x2apic_id: int) -> None:
    """TDH.VP.INIT version 1."""
    call(lp, Leaf.VP_INIT, 1, rcx=tdvpr, rdx=initial_rcx, r8=x2apic_id)


def vp_flush(lp: LogicalProcessor, tdvpr: int) -> None:
    """TDH.VP.FLUSH on the processor that the vCPU is associated with."""
    expect(_until_free(lp, Leaf.VP_FLUSH, rcx=tdvpr), Leaf.VP_FLUSH, Status.VCPU_NOT_ASSOCIATED)


def vp_rd(lp: LogicalProcessor, tdvpr: int, field_id: int) -> int:
    """TDH.VP.RD: a vCPU-scope metadata field."""
    return call(lp, Leaf.VP_RD, rcx=tdvpr, rdx=field_id).r8


def vp_wr(lp: LogicalProcessor, tdvpr: int, field_id: int, value: int, mask: int = (1 << 64) - 1) -> None:
    """TDH.VP.WR: the bits of `mask` of a vCPU-scope metadata field."""
    call(lp, Leaf.VP_WR, rcx=tdvpr, rdx=field_id, r8=value, r9=mask)


def _until_free(lp: LogicalProcessor, leaf: Leaf, version: int = 0, **operands: int) -> Registers:
    for _ in range(_BUSY_RETRIES):
        regs = seamcall(lp, leaf, version, **operands)
        if regs.rax == 0 or (status := status_of(regs.rax)) not in TRANSIENT:
            break
        if status in INTERRUPTED:
            lp.acknowledge_interrupt()
    return regs
