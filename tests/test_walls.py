"""The walls, read off the sources: what the module and the host's floors import, to the name."""

import ast
from pathlib import Path

import pytest

import softtdx

ROOT = Path(softtdx.__file__).parent
STANDARD = {
    "collections",
    "contextlib",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "hmac",
    "itertools",
    "struct",
    "threading",
    "typing",
}
WALL_2 = {"softtdx.hw.isa", "softtdx.hw.registers", "softtdx.hw.faults", "softtdx.hw.seamops"}


def imports(path):
    """(module, is relative) of every import statement of a file, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", bool(node.level)


def sources(floor):
    return sorted((ROOT / floor).rglob("*.py"))


@pytest.mark.parametrize("path", sources("module"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_module_uses_the_instruction_set_and_nothing_else_of_the_hardware(path):
    for name, relative in imports(path):
        allowed = (
            relative
            or name in WALL_2
            or name.startswith("softtdx.abi")
            or name == "softtdx._silicon"  # SHA-384 compression, a computation
            or name.split(".")[0] in STANDARD
        )
        assert allowed, f"{path.name} imports {name}"


def test_of_the_silicon_the_module_uses_only_sha384():
    for path in sources("module"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "softtdx._silicon":
                assert all(alias.name.startswith("sha384_") for alias in node.names), path.name


@pytest.mark.parametrize("floor", ["kvm", "vmm"])
def test_the_host_reaches_the_module_only_by_seamcall(floor):
    for path in sources(floor):
        for name, _ in imports(path):
            assert not name.startswith(("softtdx.module", "softtdx.seamldr.p_seamldr")), f"{path.name} imports {name}"


def test_the_loader_does_not_import_the_module_it_measures():
    for path in sources("seamldr"):
        assert not any(name.startswith("softtdx.module") for name, _ in imports(path)), path.name
