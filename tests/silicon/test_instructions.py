"""The interpreter against the host's own processor: random and directed sequences of every class of instruction.

Everything is compared: registers, flags, MXCSR and x87 state, memory, and faults with their error code and address.
Only flags that the architecture leaves undefined are not, by name, as the templates say (SDM volume 2).
"""

import random

import pytest
from integer_templates import INTEGER, STRINGS
from isa_context import Template, build
from isa_oracles import NativeOracle, join, split
from isa_records import Case, describe, differences
from vector_templates import APPROXIMATE, MMX, VECTOR_FLOAT, VECTOR_INT
from x87_templates import TRANSCENDENTAL, X87

from softtdx._silicon import Trial

FAMILIES: dict[str, list[Template]] = {
    "integer": INTEGER,
    "strings": STRINGS,
    "vector integer": VECTOR_INT,
    "vector float": VECTOR_FLOAT,
    "approximate": APPROXIMATE,
    "mmx": MMX,
    "x87": X87,
    "transcendental": TRANSCENDENTAL,
    "mixed": [*INTEGER, *STRINGS, *VECTOR_INT, *VECTOR_FLOAT, *X87, *MMX],
}
# Registers in use of the x87 stack: any pattern, or so many from the top.
DEPTHS: dict[str, list[int | None]] = {"x87": [None, 2, 4, 6], "mixed": [2, 4], "transcendental": [2, 4]}

native = pytest.mark.skipif(
    not NativeOracle.available(), reason="the native oracle needs an x86-64 Linux host and a C compiler"
)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> NativeOracle:
    return NativeOracle(tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="module")
def trial() -> Trial:
    return Trial()


def cases_of(family: str, count: int, seed: int) -> list[Case]:
    rng = random.Random(seed)
    templates = FAMILIES[family]
    depths = DEPTHS.get(family, [0])
    cases = []
    while len(cases) < count:
        # Approximate results must not be used by another instruction.
        single = family in {"approximate", "transcendental"} or rng.random() < 0.4
        length = 1 if single else rng.randrange(2, 7)
        case = build(rng, templates, length=length, depth=rng.choice(depths))
        cases.append(case)
    return cases


def failures(cases: list[Case], trial: Trial, oracle: NativeOracle) -> list[str]:
    records = join(cases)
    ours, theirs = trial.run(records), oracle.run(records)
    wrong = []
    for case, mine, other in zip(cases, split(ours), split(theirs), strict=True):
        found = differences(case, mine, other)
        if found:
            wrong.append(describe(case, found))
    return wrong


@native
@pytest.mark.parametrize("family", FAMILIES)
def test_instructions_do_what_the_processor_does(family: str, trial: Trial, oracle: NativeOracle) -> None:
    wrong = failures(cases_of(family, 2500, seed=20), trial, oracle)
    assert not wrong, f"{len(wrong)} cases differ\n" + "\n".join(wrong[:3])


@native
@pytest.mark.nightly
@pytest.mark.parametrize("family", FAMILIES)
def test_a_million_instruction_cases_do_what_the_processor_does(
    family: str, trial: Trial, oracle: NativeOracle
) -> None:
    for seed in range(6):
        wrong = failures(cases_of(family, 20_000, seed=1000 + seed), trial, oracle)
        assert not wrong, f"{len(wrong)} cases differ\n" + "\n".join(wrong[:3])


@native
def test_every_template_is_an_instruction_of_this_processor(trial: Trial) -> None:
    rng = random.Random(7)
    everything = [t for family, templates in FAMILIES.items() if family != "mixed" for t in templates]
    cases = [build(rng, [template], length=1, depth=4) for template in everything for _ in range(4)]
    undefined = {
        case.name for case, record in zip(cases, split(trial.run(join(cases))), strict=True) if record[144] == 6
    }
    # LDDQU has a memory form only; the template emits both.
    assert undefined <= {"lddqu"}


def test_an_oracle_that_lies_is_found_out(trial: Trial) -> None:
    cases = cases_of("integer", 50, seed=3)
    results = [bytearray(record) for record in split(trial.run(join(cases)))]
    for case, record in zip(cases, results, strict=True):
        assert not differences(case, bytes(record), bytes(record))
        for at in (0, 136, 144, 800):
            forged = bytearray(record)
            forged[at] ^= 1
            assert differences(case, bytes(forged), bytes(record)), (case.name, at)


def test_wrong_sizes_of_records_are_refused(trial: Trial) -> None:
    assert trial.run(b"") == b""
    with pytest.raises(ValueError, match="1024-byte records"):
        trial.run(bytes(1000))
