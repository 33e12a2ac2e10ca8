"""The lock of the host's free pages: one at a time, re-entrant, released by whatever ends the block."""

import threading

import pytest

from softtdx.kvm.spinlock import SpinLock


def test_one_thread_at_a_time():
    lock, inside, seen = SpinLock(), [], set()

    def work():
        for _ in range(2000):
            with lock:
                inside.append(1)
                seen.add(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {1}


def test_a_thread_takes_it_twice():
    lock = SpinLock()
    with lock, lock:
        pass


def test_an_exception_gives_it_back():
    lock = SpinLock()
    with pytest.raises(KeyError), lock:
        raise KeyError
    taken = []

    def take():
        with lock:
            taken.append(True)

    thread = threading.Thread(target=take)
    thread.start()
    thread.join(60)
    assert taken == [True]


def test_who_waits_long_gets_it_in_the_end():
    lock, waiting, done = SpinLock(), threading.Event(), threading.Event()

    def wait():
        waiting.set()
        with lock:
            done.set()

    with lock:
        thread = threading.Thread(target=wait)
        thread.start()
        assert waiting.wait(60)
        assert not done.wait(0.1)
    thread.join(60)
    assert done.is_set()
