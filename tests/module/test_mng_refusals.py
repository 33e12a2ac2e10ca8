"""Every way in which a TDH.MNG.* leaf or MR.FINALIZE refuses a call, and which refusal comes first."""

from collections.abc import Callable

import pytest
from refusals import Refusals, check_each, check_order
from scenario import Row, Scenario, free_page_rows, state_rows, tdr_rows
from tdx_machine import BUFFER, NULL_PA, Leaf, Td, td_params

from softtdx.abi.status import Operand, Status

RCX, RDX = Operand.RCX, Operand.RDX
INVALID = Status.OPERAND_INVALID
LIFECYCLE = Status.LIFECYCLE_STATE_INCORRECT


class Lives(Scenario):
    """The scenario with TDs at the ends of their lives too."""

    def __init__(self) -> None:
        super().__init__()
        m = self.machine
        m.next_hkid += 2  # of `keyless` and `bare`
        self.flushed = Td.create(m)
        m.ok(Leaf.MNG_VPFLUSHDONE, rcx=self.flushed.tdr)
        self.torn_down = Td.create(m)
        m.ok(Leaf.MNG_VPFLUSHDONE, rcx=self.torn_down.tdr)
        m.ok(Leaf.PHYMEM_CACHE_WB)
        m.ok(Leaf.MNG_KEY_FREEID, rcx=self.torn_down.tdr)
        self.unflushed = Td.create(m)
        m.ok(Leaf.MNG_VPFLUSHDONE, rcx=self.unflushed.tdr)
        self.without_vcpu = Td.create(m)
        self.full = Td.create(m, initialize=False)
        for _ in range(32 - 6):
            m.call(Leaf.MNG_ADDCX, rcx=m.page(), rdx=self.full.tdr)


def tdr(s: Lives, *, exclusive: bool = True, operand: str = "rcx", flag: bool = False) -> list[Row]:
    return tdr_rows(s, operand, exclusive=exclusive, flag=flag)


def create(s: Lives) -> Refusals:
    unused = s.machine.next_hkid + 2
    return Refusals(
        Leaf.MNG_CREATE,
        {"rcx": s.free_page, "rdx": unused},
        [
            Row("a shared KeyID", INVALID, RDX, {"rdx": 31}),
            Row("a KeyID beyond the last", INVALID, RDX, {"rdx": 64}),
            Row("reserved bits of the HKID", INVALID, RDX, {"rdx": unused | 1 << 16}),
            *free_page_rows(s, "rcx"),
            Row("KOT held", Status.OPERAND_BUSY, Operand.KOT, held="key:-2"),
            Row("the HKID of a TD", Status.HKID_NOT_FREE, 0, {"rdx": s.td.hkid}),
            Row("the module's HKID", Status.HKID_NOT_FREE, 0, {"rdx": 32}),
            Row("an HKID that is flushed", Status.HKID_NOT_FREE, 0, {"rdx": s.flushed.hkid}),
        ],
    )


def key_config(s: Lives) -> Refusals:
    return Refusals(
        Leaf.MNG_KEY_CONFIG,
        {"rcx": s.keyless.tdr},
        [
            *tdr(s),
            Row("keys are there", LIFECYCLE, 0, {"rcx": s.td.tdr}),
            Row("blocked", LIFECYCLE, 0, {"rcx": s.flushed.tdr}),
            Row("teardown", LIFECYCLE, 0, {"rcx": s.torn_down.tdr}),
        ],
    )


def addcx(s: Lives) -> Refusals:
    return Refusals(
        Leaf.MNG_ADDCX,
        {"rcx": s.free_page, "rdx": s.bare.tdr},
        [
            *tdr(s, operand="rdx"),
            Row("no key", Status.TD_KEYS_NOT_CONFIGURED, 0, {"rdx": s.keyless.tdr}),
            Row("teardown", Status.TD_KEYS_NOT_CONFIGURED, 0, {"rdx": s.torn_down.tdr}),
            *free_page_rows(s, "rcx"),
        ],
    )


def init(s: Lives) -> Refusals:
    s.machine.host_write(BUFFER, td_params())
    return Refusals(
        Leaf.MNG_INIT,
        {"rcx": s.uninitialized.tdr, "rdx": BUFFER},
        [
            *tdr(s, flag=True),
            *state_rows(s, "rcx", op_state_lock=False, wrong=(s.building, 1)),
            Row("OP_STATE runnable", Status.OP_STATE_INCORRECT, 2, {"rcx": s.td.tdr}),
            Row("parameters misaligned", INVALID, RDX, {"rdx": BUFFER | 0x200}),
            Row("parameters with a private KeyID", INVALID, RDX, {"rdx": BUFFER | 33 << 46}),
            Row("parameters above MAXPA", INVALID, RDX, {"rdx": BUFFER | 1 << 52}),
            Row("parameters in SEAMRR", INVALID, RDX, {"rdx": 0x6000_0000}),
            Row("parameters nowhere", INVALID, RDX, {"rdx": NULL_PA}),
        ],
    )


def finalize(s: Lives) -> Refusals:
    return Refusals(
        Leaf.MR_FINALIZE,
        {"rcx": s.without_vcpu.tdr},
        [
            *tdr(s),
            *state_rows(s, "rcx", op_state_lock=False),
            Row("runnable already", Status.OP_STATE_INCORRECT, 2, {"rcx": s.td.tdr}),
            Row("no vCPU", Status.NO_VCPUS, 0),
        ],
    )


def vpflushdone(s: Lives) -> Refusals:
    return Refusals(
        Leaf.MNG_VPFLUSHDONE,
        {"rcx": s.td.tdr},
        [
            *tdr(s),
            Row("KOT held", Status.OPERAND_BUSY, Operand.KOT, held="key:-2"),
            Row("blocked already", LIFECYCLE, 0, {"rcx": s.flushed.tdr}),
            Row("teardown", LIFECYCLE, 0, {"rcx": s.torn_down.tdr}),
            Row("a vCPU is associated", Status.FLUSHVP_NOT_DONE, 0),
        ],
    )


def freeid(s: Lives) -> Refusals:
    return Refusals(
        Leaf.MNG_KEY_FREEID,
        {"rcx": s.unflushed.tdr},
        [
            *tdr(s),
            Row("runnable", LIFECYCLE, 0, {"rcx": s.td.tdr}),
            Row("no key yet", LIFECYCLE, 0, {"rcx": s.keyless.tdr}),
            Row("freed already", LIFECYCLE, 0, {"rcx": s.torn_down.tdr}),
            Row("KOT held", Status.OPERAND_BUSY, Operand.KOT, held="key:-2"),
            Row("caches not written back", Status.WBCACHE_NOT_COMPLETE, 0),
        ],
    )


def mng_rd(s: Lives) -> Refusals:
    return Refusals(
        Leaf.MNG_RD,
        {"rcx": s.td.tdr, "rdx": 0x1110_0003_0000_0000},
        [
            *tdr(s, exclusive=False),
            *state_rows(s, "rcx"),
            Row("no such class", Status.METADATA_FIELD_ID_INCORRECT, 0, {"rdx": 0x3E << 56}),
            Row("no such field", Status.METADATA_FIELD_ID_INCORRECT, 0, {"rdx": 0x1110_0003_0000_0FFF}),
            Row("a key", Status.METADATA_FIELD_NOT_READABLE, 0, {"rdx": 0x1810_0003_0000_0010}),
        ],
    )


def mng_wr(s: Lives) -> Refusals:
    return Refusals(
        Leaf.MNG_WR,
        {"rcx": s.td.tdr, "rdx": 0x1110_0003_0000_0000, "r8": 1, "r9": 1},
        [
            *tdr(s, exclusive=False),
            *state_rows(s, "rcx"),
            Row("no such field", Status.METADATA_FIELD_ID_INCORRECT, 0, {"rdx": 0x1110_0003_0000_0FFF}),
            Row("ATTRIBUTES", Status.METADATA_FIELD_NOT_WRITABLE, 0),
        ],
    )


LEAVES: list[Callable[[Lives], Refusals]] = [
    create, key_config, addcx, init, finalize, vpflushdone, freeid, mng_rd, mng_wr,
]  # fmt: skip


@pytest.fixture(scope="module")
def scenario() -> Lives:
    return Lives()


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_each_refusal_has_its_status_and_leaves_no_trace(scenario: Lives, leaf: Callable[[Lives], Refusals]) -> None:
    check_each(scenario, leaf(scenario))


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_of_two_faults_the_first_in_order_is_reported(scenario: Lives, leaf: Callable[[Lives], Refusals]) -> None:
    check_order(scenario, leaf(scenario))


@pytest.mark.parametrize("rcx", [0, 1, NULL_PA, 1 << 52])
def test_key_reclaimid_succeeds_whatever_it_is_given(scenario: Lives, rcx: int) -> None:
    assert scenario.machine.ok(Leaf.MNG_KEY_RECLAIMID, rcx=rcx).rcx == rcx
