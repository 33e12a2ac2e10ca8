"""What the core does by one call: lock words, walks, measuring; against the same done step by step."""

import hashlib
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtdx._silicon import (
    BusFault,
    Core,
    HeldLocks,
    LockWords,
    MachineCheck,
    Memory,
    PamtPath,
    sha384_final,
    sha384_init,
)

KEY = 33 << 46
PAGE = 4096
HELD, MARK, READER = 1, 2, 4


def core() -> tuple[Memory, Core]:
    memory = Memory([(0, 64 * PAGE)], keyid_bits=6, first_private_keyid=32)
    memory.set_key(33)
    lp = Core(memory, 0)
    lp.seam = True
    lp.zero_page(KEY, 64)
    return memory, lp


# --- lock words
def test_any_sequence_of_takes_and_releases_behaves_as_a_dictionary_of_words() -> None:
    rng = random.Random(1)
    words = LockWords()
    processors = [HeldLocks(words) for _ in range(3)]
    model: dict[int, int] = {}
    owned: list[list[tuple[int, bool]]] = [[] for _ in processors]
    for _ in range(5000):
        n = rng.randrange(3)
        held, mine = processors[n], owned[n]
        key, exclusive = rng.choice([-1, 0, 0x1000, (1 << 52) - 1]), rng.random() < 0.3
        word = model.get(key, 0)
        match rng.randrange(5):
            case 0 | 1:
                free = not word if exclusive else not word & (HELD | MARK)
                assert held.take(key, exclusive) == free
                if free:
                    model[key] = HELD if exclusive else word + READER
                    mine.append((key, exclusive))
            case 2 if mine:
                entry = rng.choice(mine)
                held.release(*entry)
                mine.reverse()
                mine.remove(entry)
                mine.reverse()
                model[entry[0]] -= HELD if entry[1] else READER
            case 3:
                assert words.cas(key, word ^ MARK, 0) == word
                assert words.cas(key, word, word ^ MARK) == word
                model[key] = word ^ MARK
            case 4:
                count = rng.randrange(len(mine) + 2)
                held.release_to(count)
                for done, mode in mine[count:]:
                    model[done] -= HELD if mode else READER
                del mine[count:]
        assert held.entries() == mine
        assert len(held) == len(mine)
        assert words.rows() == {key: word for key, word in model.items() if word}


def test_all_words_are_taken_or_none() -> None:
    words = LockWords()
    mine, other = HeldLocks(words), HeldLocks(words)
    assert other.take(2, True)
    assert not mine.take_all([(1, False), (3, True), (2, False)])
    assert words.rows() == {2: HELD}
    assert len(mine) == 0
    other.release_to()
    assert mine.take_all([(1, False), (1, False), (2, True)])
    assert words.rows() == {1: 2 * READER, 2: HELD}
    assert not other.take_all([(2, False)])
    mine.release_to()
    assert words.rows() == {}


def test_a_watched_word_is_taken_again_until_somebody_else_had_it() -> None:
    words = LockWords()
    mine, other = HeldLocks(words), HeldLocks(words)
    with pytest.raises(IndexError):
        mine.watch(5)
    assert not mine.take_watched(5)
    assert mine.take(5, True)
    mine.watch(5)
    assert not mine.take_watched(5)
    mine.release_to()
    for _ in range(2):
        assert mine.take_watched(5)
        assert mine.entries() == [(5, True)]
        mine.release_to()
    assert not other.take_watched(5)
    assert other.take(5, False)
    assert not mine.take_watched(5)
    other.release_to()
    assert not mine.take_watched(5)
    assert words.rows() == {}


def test_what_is_not_held_is_not_given_back() -> None:
    words = LockWords()
    held = HeldLocks(words)
    held.take(5, False)
    with pytest.raises(IndexError):
        held.release(5, True)
    with pytest.raises(IndexError):
        held.release(6, False)
    with pytest.raises(ValueError, match="not held"):
        words.release(5, True)
    held.note(7, True)
    with pytest.raises(ValueError, match="0x7"):
        held.release_to()


@pytest.mark.parametrize("key", [1 << 64, -(1 << 63) - 1, "1", None, 1.5])
def test_a_key_has_64_bits(key: object) -> None:
    with pytest.raises((OverflowError, TypeError)):
        LockWords().load(key)  # type: ignore[arg-type]


def test_writers_on_many_threads_exclude_each_other() -> None:
    words = LockWords()
    inside: list[int] = []
    overlaps: list[list[int]] = []

    def work(me: int) -> None:
        held = HeldLocks(words)
        for _ in range(2000):
            if held.take(9, True):
                inside.append(me)
                if inside != [me]:
                    overlaps.append(list(inside))
                inside.remove(me)
                held.release_to()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not overlaps
    assert words.rows() == {}


# --- PAMT
E1G, E2M, E4K = KEY, KEY + PAGE, KEY + 2 * PAGE
PA = 0x4000_0000 + 0x20_0000 + 0x3000


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_walk_to_a_4k_entry_holds_the_entries_above_shared(exclusive: bool) -> None:
    _, lp = core()
    words = LockWords()
    held = HeldLocks(words)
    at = E4K + (PA >> 12 & 0x3FFFF) * 16
    lp.wr64(at, 0x1234_0003_0000)
    assert held.take_page(lp, PA, PamtPath(E1G, E2M, E4K), exclusive) == (at, 0x1234_0003_0000)
    assert held.entries() == [(0x4000_0002, False), (0x4020_0001, False), (PA, exclusive)]
    assert words.rows() == {0x4000_0002: READER, 0x4020_0001: READER, PA: HELD if exclusive else READER}


def test_a_walk_that_ends_higher_or_meets_somebody_takes_nothing() -> None:
    memory, lp = core()
    words = LockWords()
    held, other = HeldLocks(words), HeldLocks(words)
    path = PamtPath(E1G, E2M, E4K)
    for entry in (E1G, E2M + 16):
        lp.wr64(entry, 3 << 16)
        assert held.take_page(lp, PA, path, False) is None
        lp.wr64(entry, 0)
    for key, mode, asked in (
        (PA, True, False),
        (PA, False, True),
        (0x4020_0001, True, False),
        (0x4000_0002, True, True),
    ):
        assert other.take(key, mode)
        assert held.take_page(lp, PA, path, asked) is None
        other.release_to()
    memory.raw_write(E4K & (1 << 46) - 1, b"tampered")
    assert held.take_page(lp, 0x4000_0000, path, False) is None
    assert held.take_page(lp, PA, PamtPath((1 << 64) - 8, E2M, E4K), False) is None
    assert held.take_page(lp, PA, PamtPath(E1G, E2M, 1 << 63), False) is None
    lp.seam = False
    assert held.take_page(lp, PA, path, False) is None
    assert len(held) == 0
    assert words.rows() == {}


@given(pa=st.integers(0, (1 << 64) - 1), entries=st.tuples(*[st.integers(0, (1 << 64) - 1)] * 3))
def test_a_walk_from_anywhere_faults_into_nothing(pa: int, entries: tuple[int, int, int]) -> None:
    _, lp = core()
    words = LockWords()
    held = HeldLocks(words)
    if held.take_page(lp, pa, PamtPath(*entries), True) is None:
        assert words.rows() == {}
    else:
        assert len(held) == 3


# --- EPT
def test_an_ept_walk_ends_at_the_level_and_at_what_does_not_lead_on() -> None:
    _, lp = core()
    gpa = 3 << 39 | 5 << 30 | 7 << 21 | 9 << 12
    for level, index in ((3, 3), (2, 5), (1, 7)):
        lp.wr64(KEY + (3 - level) * PAGE + index * 8, KEY + (4 - level) * PAGE | 7)
    lp.wr64(KEY + 3 * PAGE + 9 * 8, 0xABC0_0087)
    assert lp.walk_ept(KEY, 3, gpa, 0) == (KEY + 3 * PAGE + 72, 0xABC0_0087, 0)
    assert lp.walk_ept(KEY, 3, gpa, 2) == (KEY + PAGE + 40, KEY + 2 * PAGE | 7, 2)
    assert lp.walk_ept(KEY, 3, gpa + (1 << 21), 0) == (KEY + 2 * PAGE + 64, 0, 1)
    for low_bits in (0x87, *range(7), 0x0F, 0x17, 0x27, 0x47):
        lp.wr64(KEY + PAGE + 40, KEY + 2 * PAGE | low_bits)
        assert lp.walk_ept(KEY, 3, gpa, 0) == (KEY + PAGE + 40, KEY + 2 * PAGE | low_bits, 2)
    lp.wr64(KEY + PAGE + 40, KEY + 2 * PAGE | 7 | 0x700)
    assert lp.walk_ept(KEY, 3, gpa, 0)[2] == 0, "bits 10:8 do not matter"


def test_an_ept_walk_faults_where_a_load_would() -> None:
    memory, lp = core()
    lp.wr64(KEY, 1 << 51 | 7)
    with pytest.raises(BusFault):
        lp.walk_ept(KEY, 3, 0, 0)
    with pytest.raises(BusFault):
        lp.walk_ept((1 << 64) - PAGE, 3, (1 << 64) - 1, 0)
    memory.raw_write(0, b"x")
    with pytest.raises(MachineCheck):
        lp.walk_ept(KEY, 3, 0, 0)
    with pytest.raises(ValueError, match="5"):
        lp.walk_ept(KEY, 5, 0, 0)


# --- SHA-384
@given(pieces=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 200)), max_size=5))
def test_a_context_in_memory_is_a_sha384_of_what_went_in(pieces: list[tuple[int, int, int]]) -> None:
    _, lp = core()
    content = random.Random(2).randbytes(2 * PAGE)
    lp.write(KEY + PAGE, content)
    lp.write(KEY, sha384_init() + bytes(8))
    expected = b""
    for blocks, more, offset in pieces:
        record = bytes([blocks]) * (128 * blocks)
        lp.extend_sha384(KEY, record, KEY + PAGE + offset, 128 * more)
        expected += record + content[offset : offset + 128 * more]
    context = lp.read(KEY, 72)
    assert int.from_bytes(context[64:], "little") == len(expected)
    assert sha384_final(context[:64], len(expected)) == hashlib.sha384(expected).digest()


@pytest.mark.parametrize(("record", "size"), [(1, 0), (128, 1), (0, 1152), (1152, 0), (100, 29), (0, (1 << 63) - 1)])
def test_what_is_hashed_is_whole_blocks_and_not_too_many(record: int, size: int) -> None:
    _, lp = core()
    with pytest.raises(ValueError, match="128"):
        lp.extend_sha384(KEY, bytes(record), KEY, size)


def test_measuring_faults_where_a_load_or_a_store_would_and_leaves_the_context() -> None:
    memory, lp = core()
    lp.write(KEY, sha384_init() + bytes(8))
    with pytest.raises(BusFault):
        lp.extend_sha384(KEY, bytes(128), 1 << 60, 128)
    assert lp.read(KEY, 72) == sha384_init() + bytes(8)
    memory.raw_write(PAGE, b"x")
    with pytest.raises(MachineCheck):
        lp.extend_sha384(KEY, bytes(128), KEY + PAGE, 128)
    assert lp.read(KEY, 72) == sha384_init() + bytes(8)
    lp.seam = False
    with pytest.raises(BusFault):
        lp.extend_sha384(KEY, bytes(128))
