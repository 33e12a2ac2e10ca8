"""The TDX module.

Reading order: `dispatch` (SEAMCALL enters there), `registry` and `errors` (how a leaf is written), `context` (what a
leaf gets), `state` and `locks` (global data), `pamt` (who owns a page), `tdr`/`tdcs`/`tdvps` (where each field of the
control structures lies), `td` (the checks that most leaves start with), `measure`, then the leaves:

    leaves/       host-side leaf functions (TDH.*), a file for each family
    sept          secure-EPT walks and entry operations, used by leaves/mem*
    metadata/     field ids: TDH.MNG/VP/SYS.RD and WR, TDG.VM/VP/SYS.RD and WR
    transitions/  TD entry and TD exit, injection of events
    exits/        what each VM exit of a TD leads to
    tdcalls/      guest-side leaf functions (TDG.*)

How a leaf is written:

    @seamcall(SeamcallLeaf.MNG_CREATE)
    def mng_create(call: Call) -> int | None:
        '''TDH.MNG.CREATE: ... operands, states, statuses in the order checked, specification.'''
        regs = call.regs                        # operands in; results are written here
        page = lock_page(call, regs.rcx, PageType.NDA, EXCLUSIVE, Operand.RCX)
        ...
        raise LeafError(Status.HKID_NOT_FREE, Operand.RDX)
        ...                                     # None: TDX_SUCCESS

- Locks taken by `call.lock`, `lock_page`, `open_td` are released by the dispatcher when the leaf is over.
- RAX is built by the dispatcher; a register that the leaf does not assign stays as it came.
- Every page is named with its KeyID: `td.keyed(pa)` for a TD's own pages, `pa | call.g.global_key_bits` for TDR and
  PAMT. No value of a control structure is kept in a Python object from one call to the next.
- Imports inside this package are relative: the loader executes the package from its signed image, under another name.
- Add a new leaf module to `leaves/__init__.py`, or it is not registered.
"""

from . import leaves, tdcalls  # noqa: F401  importing registers every leaf
from .dispatch import TdxModule

__all__ = ["TdxModule"]
