"""A vCPU's control structure within reach: its TDVPS pages, its association with a logical processor, its TD VMCS.

A vCPU is associated with one logical processor at a time, the only one whose caches may hold its VMCS and its
translations; TDH.VP.FLUSH takes it off (TDX Module Base Spec, "TD VCPU Association").
"""

import struct
from collections.abc import Sequence
from typing import Final

from softtdx.abi.opstate import VcpuState
from softtdx.abi.status import Operand, Status

from .. import tdcs, tdvps
from ..atomics import add16, add32
from ..context import Call
from ..control_pages import PAGE, ControlPages
from ..errors import LeafError
from ..ids import TD_EPOCH
from ..locks import HELD, HOST_PRIORITY
from ..pamt import PageType, PamtPage, lock_page
from ..td import LockId, Td

__all__ = ["Vcpu", "flush_td_translations", "lock_tdvpr"]

READY: Final = int(VcpuState.READY)
DISABLED: Final = int(VcpuState.DISABLED)
INVEPT_SINGLE_CONTEXT: Final = 1
EPOCH_LOCK: Final = int(LockId.EPOCH)


def lock_tdvpr(call: Call, pa: int, exclusive: bool, operand: int = Operand.RCX) -> PamtPage:
    """Check and lock a TDVPR operand: the errors of `pamt.lock_page`."""
    return lock_page(call, pa, PageType.TDVPR, exclusive, operand)


def flush_td_translations(td: Td) -> None:
    """INVEPT of each secure EPT of the TD on this processor."""
    cpu = td.call.cpu
    eptp = td.rd64(tdcs.EPTP)
    roots = 1 + td.rd16(tdcs.NUM_L2_VMS)
    for vm in range(roots):
        base = td.pages[(tdcs.SEPT_ROOT >> 12) if vm == 0 else (tdcs.L2_SEPT_ROOT_1 >> 12) + vm - 1]
        root = base & td.call.g.pa_mask & ~PAGE
        cpu.invept(INVEPT_SINGLE_CONTEXT, eptp & PAGE | root)


class Vcpu(ControlPages):
    """A vCPU whose TDVPR is locked: accessors of its TDVPS by the offsets of `module.tdvps`.

    `pages` are the bus addresses of its TDVPS pages, TD KeyID included; `p0` is the first, the TDVPR.
    """

    __slots__ = ("p0", "pa", "pages", "td", "vmcs")

    pages: Sequence[int]

    def __init__(self, call: Call, td: Td, pa: int) -> None:
        """The vCPU whose TDVPR is at `pa`. LeafError TDCX_NUM_INCORRECT when pages are missing."""
        cpu = call.cpu
        self._cpu = cpu
        self.call = call
        self.td = td
        self.pa = pa
        self.p0 = p0 = pa | td.key_bits
        count = cpu.rd8(p0 + tdvps.NUM_TDVPS_PAGES)
        needed = tdvps.PAGES_BASE + tdvps.PAGES_PER_L2_VM * cpu.rd16(td.p0 + tdcs.NUM_L2_VMS)
        if count < needed:
            raise LeafError(Status.TDCX_NUM_INCORRECT)
        self.pages = struct.unpack(f"<{needed}Q", cpu.read(p0 + tdvps.TDVPS_PAGE_PA, 8 * needed))
        self.vmcs = self.pages[1]

    # --- association
    def associate(self, *, allow_disabled: bool = False) -> bool:
        """Require an initialised vCPU and bind it to this processor; True when it was bound to none before.

        LeafError VCPU_STATE_INCORRECT (the state in bits 31:0), VCPU_ASSOCIATED.
        """
        state = self._cpu.rd8(self.p0 + tdvps.VCPU_STATE)
        if state != READY and not (allow_disabled and state == DISABLED):
            raise LeafError(Status.VCPU_STATE_INCORRECT, state)
        return self._bind()

    def _bind(self) -> bool:
        call = self.call
        lpid = call.cpu.apic_id
        at = self.p0 + tdvps.ASSOC_LPID
        with call.g.mutex:  # LOCK CMPXCHG of a doubleword
            found = self._cpu.rd32(at)
            if found == lpid:
                self._note_module()
                return False
            if found != tdvps.NO_LP:
                raise LeafError(Status.VCPU_ASSOCIATED)
            self._cpu.wr32(at, lpid)
        self._note_module()
        self.wr32(tdvps.LP_DEPENDENT_HPA_UPDATED, 0)
        add32(self._cpu, self.td.p0 + tdcs.NUM_ASSOC_VCPUS, 1)
        return True

    def bind_new(self) -> None:
        """TDH.VP.INIT: a new vCPU belongs to the processor that initialised it."""
        self.wr32(tdvps.ASSOC_LPID, self.call.cpu.apic_id)
        self._note_module()
        add32(self._cpu, self.td.p0 + tdcs.NUM_ASSOC_VCPUS, 1)

    def unbind(self) -> None:
        """TDH.VP.FLUSH: back to no processor."""
        self.wr32(tdvps.ASSOC_LPID, tdvps.NO_LP)
        add32(self._cpu, self.td.p0 + tdcs.NUM_ASSOC_VCPUS, -1)

    def _note_module(self) -> None:
        """Remember which module ran the vCPU last: an updated one has to renew the host state in its VMCSs."""
        index = self.call.g.seamdb_index
        at = self.p0 + tdvps.LAST_SEAMDB_INDEX
        if int.from_bytes(self._cpu.read(at, 8), "little") != index:
            self._cpu.write(at, index.to_bytes(8, "little"))
            self.wr32(tdvps.MODULE_DEPENDENT_FIELDS_UPDATED, 0)
            self.wr32(tdvps.LP_DEPENDENT_HPA_UPDATED, 0)

    # --- TLB tracking
    def enter_epoch(self, last: int, *, newly_bound: bool) -> int:
        """Join the current TD epoch, and forget translations of the `last` one; returns it.

        LeafError OPERAND_BUSY (TD_EPOCH). The epoch lock is not taken: whether TDH.MEM.TRACK came in
        between is looked at afterwards, so that no host finds the lock held by a vCPU that enters.
        """
        td = self.td
        locks = td.call.locks
        key = td.pa | EPOCH_LOCK
        while True:
            held = locks.words.load(key)
            if held & HELD:
                if locks.words.cas(key, held, held | HOST_PRIORITY) != held:
                    continue
                raise LeafError(Status.OPERAND_BUSY, TD_EPOCH)
            epoch = td.rd64(tdcs.TD_EPOCH)
            add16(self._cpu, td.p0 + tdcs.REFCOUNT + 2 * (epoch & 1), 1)
            if not locks.words.load(key) & HELD and td.rd64(tdcs.TD_EPOCH) == epoch:
                break
            self.leave_epoch(epoch)  # TDH.MEM.TRACK came in between, and may not have seen this vCPU
        if epoch != last:
            if not newly_bound:
                flush_td_translations(td)
            self.wr64(tdvps.VCPU_EPOCH, epoch)
        return epoch

    def leave_epoch(self, epoch: int) -> None:
        """The vCPU does not run any more: TDH.MEM.TRACK need not wait for it."""
        add16(self._cpu, self.td.p0 + tdcs.REFCOUNT + 2 * (epoch & 1), -1)
