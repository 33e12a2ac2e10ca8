"""A module that says no: busy, interrupted, refused. By counting, so that it happens in every run of a test."""

import itertools
from collections import Counter
from contextlib import contextmanager

from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.status import Operand, Status

RESIZING = frozenset({SeamcallLeaf.MEM_PAGE_PROMOTE, SeamcallLeaf.MEM_PAGE_DEMOTE})
_BUSY_EVERY, _RESTART_EVERY, _INTERRUPT_EVERY = 25, 5, 2


@contextmanager
def asked_before(host, answer):
    """`answer(lp, leaf, n)` is asked before the n-th SEAMCALL of a leaf: a status to return instead, or None.

    Yields how often each leaf was called.
    """
    counts = {int(leaf): itertools.count(1) for leaf in SeamcallLeaf}
    called = Counter()

    def wrap(lp, real):
        def seamcall(regs):
            leaf = regs.rax & 0xFFFF
            status = None
            if not regs.rax >> 63 and leaf in counts:  # the loader's are not the module's
                called[leaf] = n = next(counts[leaf])
                status = answer(lp, leaf, n)
            if status is None:
                return real(regs)
            regs.rax = status
            return regs

        return seamcall

    for lp in host.platform.lps:
        lp.seamcall = wrap(lp, lp.seamcall)
    try:
        yield called
    finally:
        for lp in host.platform.lps:
            del lp.seamcall


@contextmanager
def unwilling_module(host, *, failing=frozenset(), fail_every=0):
    """Of each leaf's SEAMCALLs some are refused without being executed; yields what was answered, by kind.

    Every 25th is OPERAND_BUSY; every 5th that splits or merges pages is INTERRUPTED_RESTARTABLE; every 2nd cache
    write-back meets an interrupt; every `fail_every`th of the leaves in `failing` fails for good.
    """
    failures = itertools.count(1)
    answers = Counter()

    def answer(lp, leaf, n):
        if leaf in RESIZING:
            answers[SeamcallLeaf(leaf).name] += 1
        if leaf in failing and fail_every and next(failures) % fail_every == 0:
            answers["refused"] += 1
            return Status.OPERAND_INVALID | Operand.RCX
        if n % _BUSY_EVERY == 0:
            answers["busy"] += 1
            return Status.OPERAND_BUSY | Operand.RCX
        if leaf in RESIZING and n % _RESTART_EVERY == 0:
            answers["restarted"] += 1
            return int(Status.INTERRUPTED_RESTARTABLE)
        if leaf == SeamcallLeaf.PHYMEM_CACHE_WB and n % _INTERRUPT_EVERY == 0:
            answers["interrupted"] += 1
            lp.interrupt()  # the module itself must stop, or it would not know where to go on
        return None

    with asked_before(host, answer):
        yield answers
