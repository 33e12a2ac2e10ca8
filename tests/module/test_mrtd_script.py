"""MRTD by an independent script: what the specification says in words, against what the module measures."""

import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tdx_machine import PAGE, Leaf, Machine, Td

TRACE = Path(os.environ.get("SOFTTDX_SHARED", Path(__file__).parents[3] / "shared")) / "traces" / "03_mrtd.jsonl.gz"
MRTD_FIELD = 0x1310_0003_0000_0000


def mrtd(sequence):
    """`sequence`: ("add", GPA) and ("extend", GPA, the 256 bytes there)."""
    digest = hashlib.sha384()
    for what, gpa, *chunk in sequence:
        name = {"add": b"MEM.PAGE.ADD", "extend": b"MR.EXTEND"}[what]
        digest.update(name.ljust(16, b"\0") + gpa.to_bytes(8, "little") + bytes(104))
        for part in chunk:
            digest.update(part)
    return digest.digest()


def read_mrtd(machine: Machine, td: Td) -> bytes:
    fields = [machine.ok(Leaf.MNG_RD, rcx=td.tdr, rdx=MRTD_FIELD + n).r8 for n in range(6)]
    return b"".join(field.to_bytes(8, "little") for field in fields)


CHUNK = st.binary(min_size=1, max_size=8).map(lambda seed: (seed * 256)[:256])
GPAS = [0, PAGE, 7 * PAGE, 0x20_0000, 0x7FFF_FFFF_F000]


@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_any_build_sequence_measures_as_the_script_says(data):
    machine = Machine()
    td = Td.create(machine)
    sequence, content = [], {}
    for gpa in data.draw(st.lists(st.sampled_from(GPAS), unique=True, max_size=4)):
        td.add_path(gpa)
        content[gpa] = b"".join(data.draw(CHUNK) for _ in range(2)).ljust(PAGE, b"\0")
        td.add_page(gpa, content[gpa])
        sequence.append(("add", gpa))
        for number in data.draw(st.lists(st.integers(0, 15), max_size=4)):
            at = data.draw(st.sampled_from(sorted(content)))
            machine.ok(Leaf.MR_EXTEND, rcx=at + number * 256, rdx=td.tdr)
            sequence.append(("extend", at + number * 256, content[at][number * 256 : number * 256 + 256]))
    td.finalize()
    assert read_mrtd(machine, td) == mrtd(sequence)


@pytest.mark.skipif(not TRACE.exists(), reason="recordings of a real module are not here")
def test_the_script_gives_the_values_that_a_real_module_gave():
    memory, pages, sequence, seen = {}, {}, [], 0
    with gzip.open(TRACE, "rt") as lines:
        for step in map(json.loads, lines):
            operands = {name: int(value, 16) for name, value in step.get("in", {}).items()}
            if step.get("op") == "mem":
                content = bytearray([step.get("fill", 0)]) * step["len"]
                for at, hexed in step.get("data", []):
                    content[at : at + len(hexed) // 2] = bytes.fromhex(hexed)
                memory[int(step["pa"], 16)] = bytes(content)
            elif step.get("name") == "TDH.MNG.INIT":
                pages, sequence = {}, []
            elif step.get("name") == "TDH.MEM.PAGE.ADD" and step["st"] == "0x0":
                pages[operands["rcx"]] = memory[operands["r9"]]
                sequence.append(("add", operands["rcx"]))
            elif step.get("name") == "TDH.MR.EXTEND" and step["st"] == "0x0":
                gpa = operands["rcx"]
                sequence.append(("extend", gpa, pages[gpa & -PAGE][gpa % PAGE : gpa % PAGE + 256]))
            elif step.get("op") == "result":
                assert mrtd(sequence).hex() == step["mrtd"], step["case"]
                seen += 1
    assert seen >= 5
