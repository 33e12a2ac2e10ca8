"""The host dispatcher: SEAMCALL enters here, and here alone RAX of the answer is built.

Order of checks (TDX Module ABI, "SEAMCALL"): reserved bits of RAX, version, module shut down, module not ready,
leaf known. A table for each state of the module holds the leaves that may run in it, by their whole RAX, so that a
good call costs one look-up.
"""

from typing import Final

from softtdx.abi.leaves import RAX_RESERVED, SeamcallLeaf, split_rax
from softtdx.abi.status import Operand, Status
from softtdx.hw.faults import BusFault
from softtdx.hw.isa import SeamCpu
from softtdx.hw.registers import Registers

from .context import Call
from .errors import LeafError
from .fatal import ModuleFatal
from .registry import HOST_LEAVES, HostHandler
from .state import GlobalState, SysState

__all__ = ["TdxModule"]

# Leaves that exist in more than one version; version 1 of any other is refused before anything else of it is looked at.
VERSIONED: Final = frozenset(
    {
        SeamcallLeaf.MEM_PAGE_PROMOTE,
        SeamcallLeaf.MEM_SEPT_ADD,
        SeamcallLeaf.MEM_SEPT_REMOVE,
        SeamcallLeaf.MNG_RD,
        SeamcallLeaf.VP_RD,
        SeamcallLeaf.VP_INIT,
        SeamcallLeaf.SYS_INIT,
        SeamcallLeaf.SYS_UPDATE,
    }
)


# What following a structure can end in that the host managed to change (a platform without memory integrity).
_IMPOSSIBLE: Final = (BusFault, LookupError, ArithmeticError, ValueError)


class TdxModule:
    """One loaded TDX module: what the SEAM loader puts into SEAMRR and SEAMCALL enters."""

    def __init__(self, cpu: SeamCpu, sysinfo: bytes) -> None:
        """`sysinfo`: the SYS_INFO_TABLE that the loader wrote (4 KiB). `cpu`: the processor that finished the load."""
        self.g = GlobalState(sysinfo)
        self._calls: dict[int, Call] = {}
        self._tables = {state: _table_for(state) for state in SysState}
        self._table = self._tables[SysState.INIT_PENDING]
        del cpu

    def seam_entry(self, cpu: SeamCpu, regs: Registers) -> None:
        """SEAMCALL: `regs` holds the operands and afterwards the results. MachineCheck passes through."""
        call = self._calls.get(cpu.index)
        if call is None:
            call = self._calls.setdefault(cpu.index, Call(self, self.g, cpu))
        call.regs = regs
        call.busy = True  # before the state is looked at: TDH.SYS.SHUTDOWN sets the state, then looks who is busy
        rax = regs.rax
        handler = self._table.get(rax)
        try:
            if handler is None:
                regs.rax = self._refuse(rax)
            else:
                call.version = rax >> 16
                regs.rax = handler(call) or 0
        except LeafError as stop:
            regs.rax = stop.rax
        except _IMPOSSIBLE as found:
            raise ModuleFatal(
                f"leaf {rax & 0xFFFF:#x} met a structure that the module cannot have written: {found!r}"
            ) from found
        finally:
            call.held.release_to()
            call.busy = False

    def call_of(self, lp_index: int) -> Call | None:
        """The per-LP data of a logical processor that has called at least once."""
        return self._calls.get(lp_index)

    @property
    def calls(self) -> dict[int, Call]:
        """Per-LP data by the processor's index."""
        return self._calls

    def enter_state(self, state: SysState) -> None:
        """Move the module to another state; from then on the leaves of that state are admitted."""
        self.g.sys_state = state
        self._table = self._tables[state]

    def _refuse(self, rax: int) -> int:
        leaf, version, _ = split_rax(rax)
        invalid = int(Status.OPERAND_INVALID) | Operand.RAX
        if rax & RAX_RESERVED or (version and leaf not in VERSIONED):
            return invalid
        state = self.g.sys_state
        known = HOST_LEAVES.get(leaf)
        if state is SysState.SHUTDOWN and leaf != SeamcallLeaf.SYS_LP_SHUTDOWN:
            return int(Status.SYS_SHUTDOWN)
        if state is not SysState.READY and (known is None or not known.before_ready):
            return int(Status.SYS_NOT_READY)
        return invalid


def _table_for(state: SysState) -> dict[int, HostHandler]:
    """RAX -> handler, of the leaves that may run in `state`."""
    table: dict[int, HostHandler] = {}
    for number, entry in HOST_LEAVES.items():
        if state is SysState.SHUTDOWN:
            if number != SeamcallLeaf.SYS_LP_SHUTDOWN:
                continue
        elif state is not SysState.READY and not entry.before_ready:
            continue
        for version in entry.versions:
            table[number | version << 16] = entry.function
    return table
