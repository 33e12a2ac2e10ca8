"""TDCALLs as instructions: a TD whose page tables, operands and hypercalls go through the interpreter and KVM."""

import random
from collections.abc import Iterator

from softtdx.abi.fields import table
from softtdx.abi.leaves import TdcallLeaf, rax_for
from softtdx.abi.status import status_of
from softtdx.attack.fuzz.core import EDGES
from softtdx.attack.oracle import BrokenInvariantError
from softtdx.kvm import Host
from softtdx.vmm import GuestError, MachineError
from softtdx.vmm.boot import boot_host
from softtdx.vmm.python_guest import GuestException, PythonGuest, Td

__all__ = ["guest", "settled"]

_PAGE = 4096
_MEMORY = range(0x1_0000, 0x1_4000, _PAGE)
_OPERANDS = ("rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13")
_HYPERCALLS = (10, 12, 28, 30, 32)


def guest(rng: random.Random, steps: int) -> Iterator[int]:
    """TDCALLs by a TD; when it ended itself (a fatal error, a halt) another goes on. A step is a call."""
    host = boot_host()
    fields = [row.field_id for scope in ("td", "vp", "sys") for row in table(scope).by_name.values()]
    others = [leaf for leaf in TdcallLeaf if leaf is not TdcallLeaf.VP_VMCALL]
    done = 0
    while done < steps:
        before = done

        def program(td: Td) -> None:
            nonlocal done
            for gpa in _MEMORY:
                td.accept(gpa)
            while done < steps:
                done += 1
                values = (*EDGES, *_MEMORY, rng.choice(fields), rng.getrandbits(64))
                regs = {name: rng.choice(values) for name in _OPERANDS}
                leaf: TdcallLeaf = rng.choice(others)
                if rng.randrange(8) == 0:
                    leaf, regs["r10"], regs["r11"] = TdcallLeaf.VP_VMCALL, 0, rng.choice((*EDGES, *_HYPERCALLS))
                    regs["rcx"] = rng.choice((0xFC00, 0xFC00, rng.getrandbits(16) & 0xFFEC))
                try:
                    rax = td.tdcall(rax=rax_for(leaf, rng.choice((0, 0, 1))), **regs).rax
                except GuestException:
                    continue
                if rax and status_of(rax).name.startswith("UNKNOWN"):
                    raise BrokenInvariantError(f"no status has the number {status_of(rax):#x}")

        try:
            with PythonGuest(host, program) as running:
                running.run()
        except GuestError:
            pass  # the TD may end itself
        except MachineError as error:
            if error.__cause__ is not None:
                raise error.__cause__ from error
        settled(host)
        yield done - before


def settled(host: Host) -> None:
    """No VM is left: nor is a page that TDX owns."""
    if host.platform.seam.module is None:
        raise BrokenInvariantError("the TDX module is gone")
    left = {use: n for use, n in host.memory.tdx_pages().items() if use != "PAMT"}
    if left:
        raise BrokenInvariantError(f"pages are left when the TD is gone: {left}")
