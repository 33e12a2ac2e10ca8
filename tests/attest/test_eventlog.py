"""Event logs and reference values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtdx.attest import MalformedError, Quote
from softtdx.attest.eventlog import (
    SHA384,
    Event,
    EventLog,
    EventType,
    event_type_name,
    extend,
    make_ccel,
    parse_ccel,
    rtmr_of,
)
from softtdx.attest.measure import LinuxBoot, Mrtd, Region, linux_boot_log, mrtd_of

events = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(list(EventType)), st.binary(max_size=100)), max_size=12)


def log_of(items: list[tuple[int, EventType, bytes]]) -> EventLog:
    log = EventLog.empty()
    for rtmr, kind, data in items:
        log = log.measured(rtmr, kind, data)
    return log


@given(items=events, filler=st.sampled_from([b"\xff", b"\0"]), room=st.integers(0, 200))
def test_a_written_log_reads_back_with_all_its_events(
    items: list[tuple[int, EventType, bytes]], filler: bytes, room: int
) -> None:
    log = log_of(items)
    area = log.to_bytes() + filler * room
    found = EventLog.parse(area)
    assert found.events == log.events
    assert found.to_bytes() == area


@given(items=events)
def test_the_rtmrs_are_what_extending_by_hand_gives(items: list[tuple[int, EventType, bytes]]) -> None:
    by_hand = [bytes(48)] * 4
    for rtmr, kind, data in items:
        if kind is not EventType.NO_ACTION:
            by_hand[rtmr] = hashlib.sha384(by_hand[rtmr] + hashlib.sha384(data).digest()).digest()
    assert log_of(items).rtmrs() == tuple(by_hand)


def test_the_real_log_replays_to_the_real_quotes_rtmrs(fixture_file: Callable[[str], bytes]) -> None:
    data = fixture_file("ccel_data.dat")
    log = EventLog.parse(data)
    assert log.to_bytes() == data
    rtmrs = Quote.parse(fixture_file("cos-113-tdx-quote.dat")).body.rtmrs
    assert log.replay(rtmrs).ok
    names = [event.describe()["text"] for event in log.events]
    assert {"SecureBoot", "BootOrder", "Exit Boot Services Returned with Success"} <= set(names)


def test_one_event_left_out_of_the_real_log_is_noticed(fixture_file: Callable[[str], bytes]) -> None:
    log = EventLog.parse(fixture_file("ccel_data.dat"))
    rtmrs = Quote.parse(fixture_file("cos-113-tdx-quote.dat")).body.rtmrs
    for index, event in enumerate(log.events):
        shorter = EventLog(log.header, log.algorithms, log.events[:index] + log.events[index + 1 :])
        matches = shorter.replay(rtmrs).matches
        assert matches == tuple(number != event.rtmr for number in range(4))


def test_the_real_ccel_table_is_read(fixture_file: Callable[[str], bytes]) -> None:
    table = parse_ccel(fixture_file("ccel_table.dat"))
    assert (table.cc_type, table.log_area_length) == (2, 0x40000)
    assert bytes(table) == fixture_file("ccel_table.dat")


def test_a_made_ccel_table_is_a_good_one() -> None:
    table = parse_ccel(make_ccel(0xBED0_0000, 0x1_0000))
    assert (table.log_area_address, table.log_area_length, table.cc_type) == (0xBED0_0000, 0x1_0000, 2)


@pytest.mark.parametrize("at", [0, 4, 9, 36, 48])
def test_a_ccel_table_with_one_byte_changed_is_refused(at: int) -> None:
    data = bytearray(make_ccel(0xBED0_0000, 0x1_0000))
    data[at] ^= 1
    with pytest.raises(MalformedError):
        parse_ccel(bytes(data))


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (4, 4, "no crypto-agile"),
        (32, 0, "no crypto-agile"),
        (28, 0xFF, "needs"),
        (56, 0, "names 0 digest"),
        (56, 17, "names 17 digest"),
        (62, 47, "47 bytes"),
    ],
)
def test_a_log_with_a_bad_header_says_what_is_wrong(at: int, value: int, words: str) -> None:
    data = bytearray(log_of([(0, EventType.ACTION, b"x")]).to_bytes())
    data[at] = value
    with pytest.raises(MalformedError, match=words):
        EventLog.parse(bytes(data))


@pytest.mark.parametrize(("at", "value"), [(8, 17), (12, 0xB), (62, 0xFF), (65, 0xFF)])
def test_a_log_with_a_bad_event_is_refused(at: int, value: int) -> None:
    start = len(EventLog.empty().to_bytes())
    data = bytearray(log_of([(0, EventType.ACTION, b"x")]).to_bytes())
    data[start + at] = value
    with pytest.raises(MalformedError, match="event log"):
        EventLog.parse(bytes(data))


def test_a_register_that_is_not_there_and_a_digest_of_the_wrong_size_are_refused() -> None:
    with pytest.raises(MalformedError, match="RTMR4 does not exist"):
        EventLog.empty().measured(4, EventType.ACTION, b"")
    with pytest.raises(MalformedError, match="48 bytes, this is 32"):
        EventLog.empty().measured(0, EventType.ACTION, b"", bytes(32))


def test_an_event_without_a_sha384_digest_cannot_be_replayed() -> None:
    log = EventLog.empty()
    odd = EventLog(log.header, log.algorithms, (Event(1, EventType.ACTION, ((0xB, bytes(32)),), b""),))
    with pytest.raises(MalformedError, match="cannot be replayed"):
        odd.rtmrs()


def test_types_have_their_tcg_names() -> None:
    assert event_type_name(0x80000001) == "EV_EFI_VARIABLE_DRIVER_CONFIG"
    assert event_type_name(0x12345) == "0x12345"
    assert Event(1, 5, ((SHA384, bytes(48)),), b"").digest() == bytes(48)


def sha(data: bytes) -> bytes:
    return hashlib.sha384(data).digest()


def test_the_rtmrs_of_a_linux_boot_follow_from_its_files() -> None:
    log = linux_boot_log(LinuxBoot(b"kernel", "console=ttyS0", b"initrd", configuration=b"header", acpi=b"tables"))
    end = sha(bytes(4))
    assert log.rtmrs() == (
        rtmr_of([sha(b"header"), sha(b"tables"), end]),
        rtmr_of([sha(b"kernel"), end]),
        rtmr_of([sha(b"console=ttyS0"), sha(b"initrd"), end]),
        bytes(48),
    )
    assert EventLog.parse(log.to_bytes()).rtmrs() == log.rtmrs()
    assert linux_boot_log(LinuxBoot(b"kernel", "")).rtmrs()[2] == rtmr_of([sha(b""), end])
    with pytest.raises(MalformedError, match="not ASCII"):
        linux_boot_log(LinuxBoot(b"kernel", "caf\u00e9"))


def test_extending_is_sha384_of_register_and_digest() -> None:
    assert extend(bytes(48), bytes(48)) == hashlib.sha384(bytes(96)).digest()


def test_mrtd_is_the_hash_of_the_build_records() -> None:
    page = bytes(range(256)) * 16
    expected = hashlib.sha384()
    expected.update(b"MEM.PAGE.ADD".ljust(16, b"\0") + (0x1000).to_bytes(8, "little") + bytes(104))
    for at in range(0, 4096, 256):
        expected.update(b"MR.EXTEND".ljust(16, b"\0") + (0x1000 + at).to_bytes(8, "little") + bytes(104))
        expected.update(page[at : at + 256])
    expected.update(b"MEM.PAGE.ADD".ljust(16, b"\0") + (0x8000).to_bytes(8, "little") + bytes(104))
    assert mrtd_of([Region(0x1000, page), Region(0x8000, bytes(4096), measured=False)]) == expected.digest()


def test_what_no_td_can_be_built_of_is_refused() -> None:
    mrtd = Mrtd()
    with pytest.raises(MalformedError, match="4 KiB"):
        mrtd.page_add(0x800)
    with pytest.raises(MalformedError, match="256 bytes"):
        mrtd.extend(0x1000, bytes(255))
    with pytest.raises(MalformedError, match="256 bytes"):
        mrtd.extend(0x1001, bytes(256))
    with pytest.raises(MalformedError, match="whole pages"):
        mrtd_of([Region(0x1000, b"x")])
