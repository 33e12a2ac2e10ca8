"""What is recorded while TDs overlap on several processors can be replayed, in whatever order they left."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from guest_thread import GuestThread
from tdx_machine import Leaf, Machine, Td

from softtdx.abi.leaves import TdcallLeaf
from softtdx.replay import record, replay

ROUNDS = 30


class RecordedMachine(Machine):
    """A machine of which everything from TDH.SYS.INIT on is recorded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recording = ExitStack()
        super().__init__()

    def _load(self) -> None:
        super()._load()
        self.recording.enter_context(record(self.platform, self.folder))
        self.platform.events.publish("seamldr", 0)  # the recorder looks when a loader has installed a module


@pytest.fixture
def machine(tmp_path: Path) -> RecordedMachine:
    return RecordedMachine(tmp_path)


def assert_replays(machine: RecordedMachine) -> set[str]:
    """The recording, ended here, has no difference; returns the kinds of its steps."""
    machine.recording.close()
    report = replay(machine.folder)
    assert [str(m) for m in report.mismatches] == []
    assert not report.skipped
    return set(report.kinds)


def two_vcpus(machine: Machine) -> tuple[Td, list[int]]:
    td = Td.create(machine)
    vcpus = [td.add_vcpu(), td.finalize()]
    machine.ok(Leaf.VP_FLUSH, rcx=vcpus[1])  # it was initialised on processor 0 and will be entered on 1
    return td, vcpus


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first in, first out", "first in, last out"])
def test_vcpus_that_overlap(machine: RecordedMachine, order: tuple[int, int]) -> None:
    _, vcpus = two_vcpus(machine)
    guests = [GuestThread(machine.lps[lp], vcpu) for lp, vcpu in enumerate(vcpus)]
    for at in order:
        assert guests[at].tdcall(TdcallLeaf.VP_INFO) is not None
    for at in order:
        guests[at].interrupt()
    assert {"TDH.VP.ENTER", "TDG.VP.INFO"} <= assert_replays(machine)


def test_processors_that_call_at_once(machine: RecordedMachine) -> None:
    tds = [Td.create(machine), Td.create(machine)]
    pages = [[machine.page() for _ in range(ROUNDS)] for _ in tds]
    failures: list[BaseException] = []

    def work(lp: int) -> Callable[[], None]:
        def build() -> None:
            try:
                for index, page in enumerate(pages[lp]):  # refused: no table above; its locks are taken all the same
                    machine.call(Leaf.MEM_SEPT_ADD, lp=lp, rcx=index << 30 | 1, rdx=tds[lp].tdr, r8=page)
                    machine.call(Leaf.PHYMEM_PAGE_RDMD, lp=lp, rcx=pages[1 - lp][index])
            except BaseException as failure:  # shown by the test's thread
                failures.append(failure)

        return build

    threads = [threading.Thread(target=work(lp)) for lp in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {"TDH.MEM.SEPT.ADD", "TDH.PHYMEM.PAGE.RDMD"} <= assert_replays(machine)


def test_a_td_still_inside_at_the_end_of_the_recording(machine: RecordedMachine) -> None:
    _, vcpus = two_vcpus(machine)
    guest = GuestThread(machine.lps[1], vcpus[1])
    machine.recording.close()
    report = replay(machine.folder)
    assert [str(m) for m in report.mismatches] == []
    guest.stop()
