"""The examples of docs/attacks.md are tests, and pass; the laboratory's hooks take wrong uses for what they are."""

import re
from pathlib import Path

import pytest

from softtdx.attack.flawed import Flaw, image_with

PAGE = Path(__file__).parents[2] / "docs" / "attacks.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_of_the_manual_runs(number):
    names: dict[str, object] = {}
    exec(compile(EXAMPLES[number], f"example {number} of {PAGE.name}", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        assert callable(test)
        test()


def test_a_flaw_that_fits_nowhere_is_no_flaw():
    with pytest.raises(ValueError, match="0 times"):
        image_with(Flaw("leaves/mng.py", "no such line", ""))
    with pytest.raises(ValueError, match="times"):
        image_with(Flaw("leaves/mng.py", "cpu", ""))
    with pytest.raises(FileNotFoundError):
        image_with(Flaw("leaves/none.py", "cpu", ""))
