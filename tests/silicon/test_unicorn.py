"""The interpreter against Unicorn, on every host: integer, string and packed-integer instructions.

Unicorn raises no SSE exceptions, checks no alignment and reports no error codes, so only cases that run to their end
are compared, and floating point is left to the native oracle (test_instructions.py).
"""

import pytest
from isa_oracles import UnicornOracle, join, split
from isa_records import BREAKPOINT, REGISTERS, Case, describe, outcome
from test_instructions import cases_of

from softtdx._silicon import Trial

# What the QEMU in Unicorn 2.1 gets wrong, or does not have; the native oracle has them all.
NOT_UNICORN = {
    "adcx_adox": "not decoded in every form",
    "blsi_blsmsk_blsr": "CF is inverted",
    "bextr": "a length that reaches beyond the operand",
    "bzhi": "CF, and counts at the operand size",
    "pdep32": "the upper half of the register stays",
    "cmpxchg32": "the upper half of the destination is cleared without an exchange",
    "cmpxchg8b_16b": "the other flags are lost",
    "pcmpistr": "as pcmpestr",
    "pcmpestr": "the element behind the last valid one counts as valid",
    "phadd": "a source that is the destination is read after it was written",
    "phsub": "as phadd",
    "sha": "not there",
    "loop_jcxz": "LOOPE and LOOPNE lose flags",
    "gf2p8": "not there",
}
COMPARED = {"flags", "rip", "window", *REGISTERS, *(f"xmm{n}" for n in range(16))}


def known(case: Case) -> bool:
    return any(name.strip().startswith(tuple(NOT_UNICORN)) for name in case.name.split(";"))


def compare(family: str, count: int, seed: int) -> int:
    """The number of cases that were compared."""
    cases = [case for case in cases_of(family, count, seed) if not known(case)]
    records = join(cases)
    compared, wrong = 0, []
    results = zip(cases, split(Trial().run(records)), UnicornOracle().run(records), strict=True)
    for case, mine, theirs in results:
        if mine[144] != BREAKPOINT:
            continue
        compared += 1
        if theirs is None:
            wrong.append(describe(case, ["Unicorn faults"]))
            continue
        ours, other = outcome(mine, case), outcome(theirs, case)
        found = [
            f"{key}: {ours[key]} instead of {other[key]}" for key in ours if key in COMPARED and ours[key] != other[key]
        ]
        if found:
            wrong.append(describe(case, found))
    assert not wrong, f"{len(wrong)} cases differ\n" + "\n".join(wrong[:3])
    return compared


@pytest.mark.parametrize("family", ["integer", "strings", "vector integer"])
def test_instructions_do_what_unicorn_does(family: str) -> None:
    assert compare(family, 1200, seed=5) > 700


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["integer", "strings", "vector integer"])
def test_many_instructions_do_what_unicorn_does(family: str) -> None:
    for seed in range(5):
        compare(family, 10_000, seed=500 + seed)
