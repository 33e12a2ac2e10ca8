"""A module that says no: busy, interrupted, refused. By counting, so that it happens in every run of a test."""

import itertools
from collections import Counter
from contextlib import contextmanager

from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.status import Operand, Status

RESIZING = frozenset({SeamcallLeaf.MEM_PAGE_PROMOTE, SeamcallLeaf.MEM_PAGE_DEMOTE})
_BUSY_EVERY, _RESTART_EVERY, _INTERRUPT_EVERY = 25, 5, 2


@contextmanager
def unwilling_module(host, *, failing=frozenset(), fail_every=0):
    """Of each leaf's SEAMCALLs some are refused without being executed; yields what was answered, by kind.

    Every 25th is OPERAND_BUSY; every 5th that splits or merges pages is INTERRUPTED_RESTARTABLE; every 2nd cache
    write-back meets an interrupt; every `fail_every`th of the leaves in `failing` fails for good.
    """
    calls = {int(leaf): itertools.count(1) for leaf in SeamcallLeaf}
    failures = itertools.count(1)
    answers = Counter()

    def refusal(number):
        if number in failing and fail_every and next(failures) % fail_every == 0:
            return "refused", Status.OPERAND_INVALID | Operand.RCX
        count = next(calls[number])
        if count % _BUSY_EVERY == 0:
            return "busy", Status.OPERAND_BUSY | Operand.RCX
        if number in RESIZING and count % _RESTART_EVERY == 0:
            return "restarted", int(Status.INTERRUPTED_RESTARTABLE)
        if number == SeamcallLeaf.PHYMEM_CACHE_WB and count % _INTERRUPT_EVERY == 0:
            return "interrupted", None
        return None

    def wrap(lp, real):
        def seamcall(regs):
            number = regs.rax & 0xFFFF
            found = refusal(number) if not regs.rax >> 63 and number in calls else None
            if found is None:
                return real(regs)
            kind, status = found
            answers[kind] += 1
            if status is None:
                lp.interrupt()  # the module itself must stop, or it would not know where to go on
                return real(regs)
            regs.rax = status
            return regs

        return seamcall

    for lp in host.platform.lps:
        lp.seamcall = wrap(lp, lp.seamcall)
    try:
        yield answers
    finally:
        for lp in host.platform.lps:
            del lp.seamcall
