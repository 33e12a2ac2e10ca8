"""The module's locks against a plain model, alone and from many threads."""

import random
import threading

import pytest

from softtdx.abi.status import Status
from softtdx.module.locks import BUSY, BUSY_HOST_PRIORITY, LockTable

KEY = 0x1000


class Model:
    """A sharex lock with host priority, as the specification describes it."""

    def __init__(self) -> None:
        self.readers = 0
        self.writer = False
        self.host_waits = False

    def acquire(self, exclusive: bool, guest: bool) -> int:
        busy = self.writer or (exclusive and self.readers > 0)
        if guest and self.host_waits:
            # The host's turn: readers are kept out too; a writer learns of it when nobody else holds the lock.
            if not exclusive or (not self.writer and not self.readers):
                return BUSY_HOST_PRIORITY
            return BUSY
        if busy:
            self.host_waits = self.host_waits or not guest
            return BUSY
        if not guest:
            self.host_waits = False
        if exclusive:
            self.writer = True
        else:
            self.readers += 1
        return 0

    def release(self, exclusive: bool) -> None:
        if exclusive:
            self.writer = False
        else:
            self.readers -= 1


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_of_calls_behaves_as_the_model(seed):
    rng = random.Random(seed)
    table, model = LockTable(), Model()
    held: list[bool] = []
    for _ in range(500):
        if held and rng.random() < 0.5:
            exclusive = held.pop(rng.randrange(len(held)))
            table.release(KEY, exclusive)
            model.release(exclusive)
            continue
        exclusive, guest = rng.random() < 0.4, rng.random() < 0.5
        got = table.acquire(KEY, exclusive, guest)
        assert got == model.acquire(exclusive, guest)
        if not got:
            held.append(exclusive)
        assert table.host_waits(KEY) == model.host_waits


def test_the_two_answers_are_statuses():
    assert (BUSY, BUSY_HOST_PRIORITY) == (Status.OPERAND_BUSY, Status.OPERAND_BUSY_HOST_PRIORITY)


def test_a_lock_that_nobody_holds_takes_no_room():
    table = LockTable()
    for exclusive in (False, True):
        table.acquire(KEY, exclusive)
        table.release(KEY, exclusive)
    assert not table.state


def test_the_only_reader_may_become_the_writer_and_go_back():
    table = LockTable()
    table.acquire(KEY, False)
    assert table.promote(KEY) == 0
    assert table.acquire(KEY, False) == BUSY
    table.demote(KEY)
    assert table.acquire(KEY, False) == 0
    assert table.promote(KEY) == BUSY
    assert table.host_waits(KEY)


@pytest.mark.parametrize("held", [False, True])
def test_a_release_in_the_wrong_mode_is_a_defect(held):
    table = LockTable()
    table.acquire(KEY, held)
    with pytest.raises(ValueError, match="not held"):
        table.release(KEY, not held)


def test_a_release_of_a_free_lock_is_a_defect():
    with pytest.raises(ValueError, match="not held"):
        LockTable().release(KEY, True)


def test_writers_on_many_threads_exclude_each_other():
    table = LockTable()
    inside: list[int] = []
    overlaps: list[int] = []
    got = [0] * 4

    def work(me: int) -> None:
        for _ in range(3000):
            if table.acquire(KEY, True):
                continue
            inside.append(me)
            if inside != [me]:
                overlaps.append(me)
            inside.remove(me)
            got[me] += 1
            table.release(KEY, True)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not overlaps
    assert sum(got) > 3000
    assert not {key: value for key, value in table.state.items() if value & ~2}
