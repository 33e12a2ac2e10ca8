"""Platforms as Python objects: a machine that nobody uses any more gives its memory back."""

import gc
import weakref

import pytest

from softtdx.hw import Platform

CHUNK = 2 << 20  # DRAM comes in chunks of this size
CHUNKS = 200


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_forgotten_machines_do_not_pile_up(no_collector: None) -> None:
    forgotten = []
    for _ in range(4):
        platform = Platform()
        for chunk in range(CHUNKS):
            platform.memory.write(0x1000_0000 + chunk * CHUNK, b"used")
        assert platform.memory.resident() >= CHUNKS * CHUNK
        forgotten.append(weakref.ref(platform))
        del platform
    assert [ref() is None for ref in forgotten[:-1]] == [True] * 3


def test_a_machine_in_use_stays(no_collector: None) -> None:
    platform = Platform()
    for chunk in range(CHUNKS):
        platform.memory.write(0x1000_0000 + chunk * CHUNK, b"used")
    Platform()
    assert platform.memory.read(0x1000_0000, 4) == b"used"
