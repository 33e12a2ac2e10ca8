"""Private memory that moves, and small pages that become large ones: NUMA balancing, compaction, khugepaged.

The host may move a TD's page without the TD's help: BLOCK, TRACK, RELOCATE, which carries the content over under the
TD's key. Large pages are split for it, since RELOCATE takes 4 KiB pages only, and merged again where they arrive
together. The caller holds the VM's MMU lock and runs on a processor.
"""

from softtdx.abi import sept
from softtdx.hw import LogicalProcessor
from softtdx.kvm.errors import KvmError
from softtdx.kvm.memory import PAGE, PAGE_1G, PAGE_2M
from softtdx.kvm.memslots import Memslot
from softtdx.kvm.mirror import SecureEpt
from softtdx.kvm.vm import Vm

__all__ = ["collapse", "migrate", "note_promotable", "promote_ready"]

_HUGE = PAGE_2M // PAGE
_LEVEL_1G = 2
_ATTEMPTS = 3  # of merging a range; each costs a TLB epoch


def migrate(
    vm: Vm, lp: LogicalProcessor, secure: SecureEpt, start: int, end: int, within: tuple[int, int] | None
) -> int:
    """Move the private pages that are mapped in [start, end) to other pages, of the node `within` if one is given.

    Returns how many 4 KiB pages moved. KvmError(ENOMEM) when there is no room: what has moved by then stays moved.
    """
    count = 0
    for base in range(start & ~(PAGE_1G - 1), end, PAGE_1G):
        leaf = secure.lookup(base)
        if leaf is not None and leaf.level == _LEVEL_1G:
            secure.demote(lp, base, _LEVEL_1G)
            vm.stats["demotions"] += 1
    for base in range(start & ~(PAGE_2M - 1), end, PAGE_2M):
        mapping = secure.lookup(base)
        whole = start <= base and base + PAGE_2M <= end
        was_huge = mapping is not None and mapping.level == 1
        if was_huge:
            secure.demote(lp, base)
        gpas = [gpa for gpa in range(max(base, start), min(base + PAGE_2M, end), PAGE) if secure.lookup(gpa)]
        if gpas:
            count += _move(vm, lp, secure, gpas, _targets(vm, len(gpas), within))
        if was_huge and whole and secure.promote(lp, base, pending=True):  # as it was before
            vm.stats["promotions"] += 1
    vm.stats["pages relocated"] += count
    return count


def collapse(vm: Vm, lp: LogicalProcessor, secure: SecureEpt, base: int) -> bool:
    """Make 512 small pages from `base` on one large page, moving them together first if need be (khugepaged).

    False when there is nothing to merge, no room to merge it in, or the TD has not accepted it all.
    """
    gpas = [base + i * PAGE for i in range(_HUGE)]
    leaves = [secure.lookup(gpa) for gpa in gpas]
    slot = vm.memslots.find(base)
    if slot is None or base + PAGE_2M > slot.end or slot.file_offset(base) % PAGE_2M:
        return False
    if any(leaf is None or leaf.level for leaf in leaves):
        return False
    if not secure.may_promote(base):
        try:
            block = vm.host.memory.alloc(_HUGE, align=PAGE_2M)
        except KvmError:
            return False
        vm.stats["pages relocated"] += _move(vm, lp, secure, gpas, [block + i * PAGE for i in range(_HUGE)])
    merged = secure.promote(lp, base)
    vm.stats["promotions"] += merged
    if merged:
        note_promotable(secure, base, _LEVEL_1G)
    return merged


def note_promotable(secure: SecureEpt, gpa: int, level: int = 1) -> None:
    """A page was mapped: once the TD has accepted it, the page of the next size that it completes can be merged.

    PAGE.AUG gives 4 KiB and 2 MiB only: a page of 1 GiB (level 2) is always a merger of 512 of 2 MiB.
    """
    base = gpa & ~(sept.level_size(level) - 1)
    if secure.may_promote(base, level):
        secure.promotable[base, level] = 0


def promote_ready(vm: Vm, lp: LogicalProcessor, secure: SecureEpt) -> None:
    """Merge what `note_promotable` noted. A range that the TD is slow to accept is given up.

    So is one that the module refuses to merge: the TD does as well with small pages, unless they stay blocked.
    """
    for (base, level), attempts in list(secure.promotable.items()):
        try:
            merged = secure.promote(lp, base, level)
        except KvmError:
            secure.promotable.pop((base, level), None)
            vm.stats["promotions refused"] += 1
            if vm.dead:
                raise
            continue
        if merged:
            vm.stats["promotions"] += 1
        elif attempts + 1 < _ATTEMPTS:
            secure.promotable[base, level] = attempts + 1
            continue
        secure.promotable.pop((base, level), None)
        if merged and level < _LEVEL_1G:
            note_promotable(secure, base, level + 1)


def _targets(vm: Vm, count: int, within: tuple[int, int] | None) -> list[int]:
    """`count` free pages; one aligned block if it is a whole 2 MiB and there is such a block."""
    memory = vm.host.memory
    if count == _HUGE:
        try:
            block = memory.alloc(_HUGE, align=PAGE_2M, within=within)
        except KvmError:
            pass
        else:
            return [block + i * PAGE for i in range(_HUGE)]
    pages: list[int] = []
    try:
        for _ in range(count):
            pages.append(memory.alloc(within=within))  # noqa: PERF401  the pages so far must be given back
    except KvmError:
        for page in pages:
            memory.free(page)
        raise
    return pages


def _move(vm: Vm, lp: LogicalProcessor, secure: SecureEpt, gpas: list[int], pages: list[int]) -> int:
    """Relocate each GPA to its page; the file behind it follows. Pages that were not used after all are freed."""
    memory = vm.host.memory
    unused = set(pages)
    target = dict(zip(gpas, pages, strict=True))

    def moved(gpa: int, old: int) -> None:
        slot = _slot(vm, gpa)
        assert slot.guest_memfd is not None
        unused.discard(target[gpa])
        if slot.guest_memfd.replace(slot.file_offset(gpa) // PAGE, target[gpa]) is not None:
            memory.free(old)

    try:
        secure.relocate(lp, list(target.items()), moved)
    finally:
        for page in unused:
            memory.free(page)
    return len(gpas)


def _slot(vm: Vm, gpa: int) -> Memslot:
    slot = vm.memslots.find(gpa)
    assert slot is not None, f"GPA {gpa:#x} is mapped and in no memory slot"
    return slot
