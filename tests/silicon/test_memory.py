"""DRAM behind the memory-encryption engine, through its Python face."""

import hashlib
import threading

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from softtdx import _silicon
from softtdx._silicon import (
    BusFault,
    MachineCheck,
    Memory,
    SiliconFault,
    VmFail,
    sha384_blocks,
    sha384_final,
    sha384_init,
)

KEYID_BITS = 6
FIRST_PRIVATE = 32
TD, OTHER_TD = 33, 34
BASE = 0x10_0000
SIZE = 0x40_0000
CHUNK = 2 << 20
MAC_BITS = 28
SECRET = b"A trust domain keeps its secret in exactly sixty-four bytes here"
INTEGRITIES = ["crypto", "logical", "none"]


def new_memory(integrity: str = "crypto", *, tme: bool = True, seed: int = 1) -> Memory:
    memory = Memory(
        [(BASE, SIZE)],
        keyid_bits=KEYID_BITS,
        first_private_keyid=FIRST_PRIVATE,
        integrity=integrity,
        tme=tme,
        seed=seed,
    )
    for keyid in (1, TD, OTHER_TD):
        memory.set_key(keyid)
    return memory


def pa(keyid: int, address: int) -> int:
    return keyid << (52 - KEYID_BITS) | address


@pytest.mark.parametrize("integrity", INTEGRITIES)
def test_what_a_td_writes_it_reads_and_the_raw_dram_never_holds(integrity: str) -> None:
    memory = new_memory(integrity)
    memory.write(pa(TD, BASE), SECRET * 100, seam=True)
    assert memory.read(pa(TD, BASE), 6400, seam=True) == SECRET * 100
    dump = memory.raw_read(BASE, 8192)
    assert all(SECRET[at : at + 8] not in dump for at in range(57))
    assert memory.read(pa(TD, BASE + 10), 6390, seam=True) == (SECRET * 100)[10:]


@pytest.mark.parametrize("integrity", ["crypto", "logical"])
def test_the_host_reads_zeros_where_a_td_wrote(integrity: str) -> None:
    memory = new_memory(integrity)
    memory.write(pa(TD, BASE), SECRET * 2, seam=True)
    assert memory.read(BASE, 128) == bytes(128)
    assert memory.read(pa(1, BASE), 128) == bytes(128)
    assert memory.read(pa(TD, BASE), 128, seam=True) == SECRET * 2


def test_without_integrity_a_wrong_key_reads_garbage_and_harms_nothing() -> None:
    memory = new_memory("none")
    memory.write(pa(TD, BASE), SECRET, seam=True)
    views = {memory.read(pa(keyid, BASE), 64, seam=True) for keyid in (0, 1, OTHER_TD)}
    assert len(views) == 3
    assert not views & {SECRET, bytes(64), memory.raw_read(BASE, 64)}
    assert memory.read(pa(TD, BASE), 64, seam=True) == SECRET


def test_a_td_may_not_write_part_of_a_line_that_it_does_not_own() -> None:
    memory = new_memory()
    with pytest.raises(MachineCheck):
        memory.write(pa(TD, BASE + 8), SECRET, seam=True)
    assert memory.raw_line(BASE)[3]


def test_another_td_gets_a_machine_check_and_then_so_does_the_owner() -> None:
    memory = new_memory()
    memory.write(pa(TD, BASE + 64), SECRET, seam=True)
    with pytest.raises(MachineCheck) as caught:
        memory.read(pa(OTHER_TD, BASE + 70), 1, seam=True)
    assert caught.value.pa == pa(OTHER_TD, BASE + 64)
    with pytest.raises(MachineCheck):
        memory.read(pa(TD, BASE + 64), 1, seam=True)
    with pytest.raises(MachineCheck):
        memory.read(BASE + 64, 1)
    memory.write(pa(TD, BASE + 64), SECRET, seam=True)
    assert memory.read(pa(TD, BASE + 64), 64, seam=True) == SECRET


def test_logical_integrity_lets_one_td_read_garbage_of_another() -> None:
    memory = new_memory("logical")
    memory.write(pa(TD, BASE), SECRET, seam=True)
    garbage = memory.read(pa(OTHER_TD, BASE), 64, seam=True)
    assert garbage not in (SECRET, bytes(64))
    with pytest.raises(MachineCheck):
        memory.read(pa(TD, BASE + 64), 1, seam=True)  # host data: the owner bit is clear


def test_a_partial_host_write_poisons_silently() -> None:
    memory = new_memory()
    memory.write(pa(TD, BASE), SECRET * 2, seam=True)
    memory.write(BASE + 3, b"x")
    assert [memory.raw_line(BASE + at)[3] for at in (0, 64)] == [True, False]
    with pytest.raises(MachineCheck):
        memory.read(pa(TD, BASE), 8, seam=True)
    memory.write(BASE + 60, bytes(68))  # ends with the whole second line
    assert memory.raw_line(BASE)[3]
    assert memory.read(BASE + 64, 64) == bytes(64)


@given(bit=st.integers(0, 511), data=st.binary(min_size=64, max_size=64))
def test_a_flipped_bit_of_dram_is_a_machine_check(bit: int, data: bytes) -> None:
    memory = new_memory()
    memory.write(pa(TD, BASE), data, seam=True)
    raw = bytearray(memory.raw_read(BASE, 64))
    raw[bit // 8] ^= 1 << bit % 8
    memory.raw_write(BASE, bytes(raw))
    with pytest.raises(MachineCheck):
        memory.read(pa(TD, BASE), 64, seam=True)


@given(bit=st.integers(0, 511), integrity=st.sampled_from(["logical", "none"]))
def test_without_a_mac_a_flipped_bit_scrambles_its_block_of_sixteen_bytes_only(bit: int, integrity: str) -> None:
    memory = new_memory(integrity)
    memory.write(pa(TD, BASE), SECRET, seam=True)
    raw = bytearray(memory.raw_read(BASE, 64))
    raw[bit // 8] ^= 1 << bit % 8
    memory.raw_write(BASE, bytes(raw))
    seen = memory.read(pa(TD, BASE), 64, seam=True)
    changed = {at // 16 for at in range(64) if seen[at] != SECRET[at]}
    assert changed == {bit // 128}


def test_a_flip_that_is_undone_was_never_there() -> None:
    memory = new_memory()
    memory.write(pa(TD, BASE), SECRET, seam=True)
    before = memory.raw_line(BASE)
    memory.raw_write(BASE + 5, bytes([before[0][5] ^ 0xFF]))
    assert memory.raw_line(BASE) != before
    memory.raw_write(BASE + 5, before[0][5:6])
    assert memory.raw_line(BASE) == before
    assert memory.read(pa(TD, BASE), 64, seam=True) == SECRET


def test_an_old_line_replays_at_its_address_and_cannot_be_spliced() -> None:
    memory = new_memory()
    memory.write(pa(TD, BASE), SECRET, seam=True)
    data, mac, owner, poisoned = memory.raw_line(BASE)
    assert owner
    assert not poisoned
    assert 0 <= mac < 1 << MAC_BITS
    memory.write(pa(TD, BASE), bytes(128), seam=True)
    memory.raw_set_line(BASE, data, mac, owner)
    assert memory.read(pa(TD, BASE), 64, seam=True) == SECRET
    memory.raw_set_line(BASE + 64, data, mac, owner)
    with pytest.raises(MachineCheck):
        memory.read(pa(TD, BASE + 64), 64, seam=True)


@given(wrong=st.integers(0, (1 << MAC_BITS) - 1))
def test_a_line_with_another_mac_is_refused(wrong: int) -> None:
    memory = new_memory()
    memory.write(pa(TD, BASE), SECRET, seam=True)
    data, mac, owner, _ = memory.raw_line(BASE)
    memory.raw_set_line(BASE, data, wrong, owner)
    if wrong == mac:
        assert memory.read(pa(TD, BASE), 64, seam=True) == SECRET
    else:
        with pytest.raises(MachineCheck):
            memory.read(pa(TD, BASE), 64, seam=True)


def test_a_new_key_makes_old_lines_unreadable_and_an_old_line_is_no_replay() -> None:
    memory = new_memory()
    memory.write(pa(TD, BASE), SECRET, seam=True)
    old = memory.raw_line(BASE)
    memory.set_key(TD)
    with pytest.raises(MachineCheck):
        memory.read(pa(TD, BASE), 64, seam=True)
    memory.write(pa(TD, BASE), SECRET, seam=True)
    assert memory.raw_line(BASE)[0] != old[0]
    memory.raw_set_line(BASE, *old[:3])
    with pytest.raises(MachineCheck):
        memory.read(pa(TD, BASE), 64, seam=True)


def test_a_key_given_twice_is_the_same_key_on_every_platform() -> None:
    key = (bytes(range(16)), bytes(range(16, 32)))
    ciphertexts = []
    for seed in (1, 2):
        memory = new_memory(seed=seed)
        memory.set_key(TD, key)
        memory.write(pa(TD, BASE), SECRET, seam=True)
        ciphertexts.append(memory.raw_line(BASE))
        memory.set_key(TD, key)
        assert memory.read(pa(TD, BASE), 64, seam=True) == SECRET
    assert ciphertexts[0][0] == ciphertexts[1][0]
    assert ciphertexts[0][1] != ciphertexts[1][1]  # the MAC key is the platform's own


def test_a_line_is_aes_xts_with_its_address_as_tweak() -> None:
    key = (bytes(range(16)), bytes(range(16, 32)))
    memory = new_memory()
    memory.set_key(TD, key)
    memory.write(pa(TD, BASE + 0x1C0), SECRET, seam=True)
    tweak = (BASE + 0x1C0).to_bytes(16, "little")
    xts = Cipher(algorithms.AES(key[0] + key[1]), modes.XTS(tweak)).encryptor()
    assert memory.raw_read(BASE + 0x1C0, 64) == xts.update(SECRET) + xts.finalize()


def test_a_seed_gives_the_same_dram_and_another_seed_does_not() -> None:
    dumps = []
    for seed in (5, 5, 6):
        memory = new_memory(seed=seed)
        memory.write(pa(TD, BASE), SECRET, seam=True)
        memory.write(BASE + 64, SECRET)
        dumps.append((memory.raw_line(BASE), memory.raw_line(BASE + 64)))
    assert dumps[0] == dumps[1]
    assert dumps[0][0] != dumps[2][0]
    assert dumps[0][1] != dumps[2][1]


def test_without_tme_keyid_0_bypasses_encryption() -> None:
    memory = new_memory(tme=False)
    memory.write(BASE, SECRET)
    assert memory.raw_read(BASE, 64) == SECRET
    memory.write(pa(1, BASE), SECRET)
    assert memory.raw_read(BASE, 64) != SECRET


def test_a_shared_keyid_without_a_key_is_keyid_0_and_a_private_one_is_refused() -> None:
    memory = new_memory()
    memory.write(pa(2, BASE), SECRET)
    assert memory.read(BASE, 64) == SECRET
    memory.clear_key(1)
    assert memory.read(pa(1, BASE), 64) == SECRET
    memory.clear_key(TD)
    for keyid in (TD, 63):
        with pytest.raises(BusFault) as caught:
            memory.read(pa(keyid, BASE), 1, seam=True)
        assert caught.value.pa == pa(keyid, BASE)


@pytest.mark.parametrize("address", [1 << 52, 1 << 63 | BASE, (1 << 64) - 1])
@pytest.mark.parametrize("seam", [False, True])
def test_reserved_address_bits_are_a_bus_fault(address: int, seam: bool) -> None:
    memory = new_memory()
    with pytest.raises(BusFault) as caught:
        memory.read(address, 1, seam=seam)
    assert caught.value.pa == address
    with pytest.raises(BusFault):
        memory.write(address, b"1", seam=seam)


def test_only_seam_may_name_a_private_keyid() -> None:
    memory = new_memory()
    for keyid in (FIRST_PRIVATE, TD, 63):
        with pytest.raises(BusFault):
            memory.read(pa(keyid, BASE), 1)
        with pytest.raises(BusFault):
            memory.write(pa(keyid, BASE), b"1")
    assert memory.read(BASE, 64) == bytes(64)


def test_outside_dram_reads_are_ones_and_writes_are_lost() -> None:
    memory = new_memory()
    end = BASE + SIZE
    memory.write(end - 2, b"abcd")
    assert memory.read(end - 2, 4) == b"ab\xff\xff"
    assert memory.read(0, 3) == b"\xff\xff\xff"
    memory.raw_write(end, b"abcd")
    assert memory.raw_read(end, 4) == b"\xff" * 4
    assert memory.raw_read((1 << 64) - 2, 5) == b"\xff" * 5
    memory.raw_set_line(end, bytes(64), 0, owner=False)
    assert memory.raw_line(end)[0] == b"\xff" * 64
    with pytest.raises(BusFault):
        memory.read((1 << 46) - 1, 2)  # would run into KeyID 1


def test_only_chunks_that_were_written_to_are_resident() -> None:
    memory = new_memory()
    memory.read(BASE, SIZE)
    memory.raw_read(BASE, SIZE)
    assert memory.resident() == 0
    memory.write(BASE, b"1")
    assert memory.resident() == CHUNK
    memory.write(BASE + CHUNK - 1, b"22")
    assert memory.resident() == 2 * CHUNK


def test_a_terabyte_of_dram_costs_nothing_until_it_is_used() -> None:
    memory = Memory([(0, 1 << 40)], keyid_bits=6, first_private_keyid=32)
    memory.write((1 << 40) - 64, SECRET)
    assert memory.read((1 << 40) - 64, 64) == SECRET
    assert memory.resident() == CHUNK


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"ranges": []}, "no memory range"),
        ({"ranges": [(0, 0)]}, "4 KiB"),
        ({"ranges": [(0, 4095)]}, "0xfff"),
        ({"ranges": [(0, 8192), (4096, 4096)]}, "overlaps"),
        ({"ranges": [(0, 1 << 47)]}, "KeyIDs begin"),
        ({"ranges": [((1 << 64) - 4096, 4096)]}, "KeyIDs begin"),
        ({"keyid_bits": 16}, "16"),
        ({"first_private_keyid": 0}, "0"),
        ({"first_private_keyid": 65}, "65"),
        ({"integrity": "both"}, "both"),
    ],
)
def test_a_memory_that_no_platform_has_is_refused(change: dict[str, object], word: str) -> None:
    good: dict[str, object] = {"ranges": [(0, 4096)], "keyid_bits": 6, "first_private_keyid": 32}
    Memory(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=word):
        Memory(**(good | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("keyid", [0, 64, 0xFFFF_FFFF])
def test_a_keyid_that_cannot_be_programmed_is_refused(keyid: int) -> None:
    memory = new_memory()
    with pytest.raises(ValueError, match=str(keyid)):
        memory.set_key(keyid)
    with pytest.raises(ValueError, match=str(keyid)):
        memory.clear_key(keyid)


def test_arguments_of_a_wrong_shape_are_refused() -> None:
    memory = new_memory()
    with pytest.raises(ValueError, match="16"):
        memory.set_key(TD, (bytes(15), bytes(16)))
    with pytest.raises(OverflowError):
        memory.read(-1, 1)
    with pytest.raises(OverflowError):
        memory.read(1 << 64, 1)
    with pytest.raises(OverflowError):
        memory.read(BASE, -1)
    with pytest.raises(MemoryError):
        memory.read(BASE, (1 << 63) - 1)
    with pytest.raises(ValueError, match="64"):
        memory.raw_set_line(BASE, bytes(63), 0, owner=False)


def test_threads_may_share_a_memory() -> None:
    memory = new_memory()
    wrong: list[bytes] = []

    def work(number: int) -> None:
        at, data = BASE + number * 64, bytes([number]) * 64
        for turn in range(300):
            memory.write(pa((0, 1, TD)[turn % 3], at), data, seam=True)
            seen = memory.read(pa((0, 1, TD)[turn % 3], at), 64, seam=True)
            if seen != data:
                wrong.append(seen)

    threads = [threading.Thread(target=work, args=[number]) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert {memory.raw_line(BASE + number * 64)[2:] for number in range(1, 5)} == {(True, False)}


def test_the_exceptions_have_their_places() -> None:
    assert issubclass(MachineCheck, SiliconFault)
    assert issubclass(BusFault, SiliconFault)
    assert not issubclass(VmFail, SiliconFault)
    assert VmFail.__module__ == SiliconFault.__module__ == "softtdx._silicon"
    assert _silicon.Memory.__module__ == "softtdx._silicon"


@given(data=st.binary(max_size=700), cut=st.integers(0, 5))
def test_sha384_in_pieces_is_sha384(data: bytes, cut: int) -> None:
    at = min(cut, len(data) // 128) * 128
    state = sha384_blocks(sha384_init(), data[:at])
    assert sha384_final(state, at, data[at:]) == hashlib.sha384(data).digest()


@pytest.mark.parametrize("size", [0, 111, 112, 113, 127, 128, 129, 239, 240, 256])
def test_sha384_pads_at_every_edge(size: int) -> None:
    assert sha384_final(sha384_init(), 0, b"a" * size) == hashlib.sha384(b"a" * size).digest()


def test_sha384_refuses_what_is_no_state_and_no_whole_block() -> None:
    state = sha384_init()
    with pytest.raises(ValueError, match="63"):
        sha384_blocks(state[:63], bytes(128))
    with pytest.raises(ValueError, match="127"):
        sha384_blocks(state, bytes(127))
    with pytest.raises(ValueError, match="1"):
        sha384_final(state, 1)
    with pytest.raises(ValueError, match="65"):
        sha384_final(state + b"1", 0)
