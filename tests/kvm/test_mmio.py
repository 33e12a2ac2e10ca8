"""Loads and stores of device registers, decoded as the assembler wrote them."""

import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtdx.kvm.mmio import MmioInstruction, decode_mmio

CASES = [
    ("movl %eax, (%rdi)", True, 4, 0, 4, False, False, None),
    ("movq %r9, 0x1000(%r8,%rcx,8)", True, 8, 9, 8, False, False, None),
    ("movw %cx, 4(%rax)", True, 2, 1, 2, False, False, None),
    ("movb %ah, (%rdx)", True, 1, 0, 1, True, False, None),
    ("movb %sil, (%rdx)", True, 1, 6, 1, False, False, None),
    ("movb %r12b, (%rsp)", True, 1, 12, 1, False, False, None),
    ("movl 0x12345678(%rip), %edx", False, 4, 2, 4, False, False, None),
    ("movq 0x12345678, %r15", False, 8, 15, 8, False, False, None),
    ("movzbl (%r13), %ecx", False, 1, 1, 4, False, False, None),
    ("movzwl 2(%rbx), %r10d", False, 2, 10, 4, False, False, None),
    ("movsbq (%rbx), %rax", False, 1, 0, 8, False, True, None),
    ("movswl (%rbx), %eax", False, 2, 0, 4, False, True, None),
    ("movl $0x80000001, 8(%rax)", True, 4, 0, 0, False, False, 0x80000001),
    ("movq $-1, (%rax)", True, 8, 0, 0, False, False, (1 << 64) - 1),
    ("movw $0x1234, (%rax,%rbx)", True, 2, 0, 0, False, False, 0x1234),
    ("movb $7, %gs:(%rax)", True, 1, 0, 0, False, False, 7),
]


@pytest.fixture(scope="module")
def encodings(tmp_path_factory):
    if shutil.which("as") is None:
        pytest.skip("no assembler here")
    folder = tmp_path_factory.mktemp("as")
    codes = {}
    for text, *_ in CASES:
        (folder / "a.s").write_text(text + "\n")
        if subprocess.run(["as", "--64", "-o", "a.o", "a.s"], cwd=folder, check=False).returncode:
            pytest.skip("the assembler is not one for x86-64")
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", "a.o", "a.bin"], cwd=folder, check=True)
        codes[text] = (folder / "a.bin").read_bytes()
    return codes


@pytest.mark.parametrize(("text", "write", "size", "reg", "reg_size", "high", "signed", "immediate"), CASES)
def test_a_move_is_decoded(encodings, text, write, size, reg, reg_size, high, signed, immediate):
    code = encodings[text]
    expected = MmioInstruction(len(code), write, size, reg, reg_size, high, signed, immediate)
    found = decode_mmio(code + b"\x90" * 8)
    assert found is not None
    if immediate is not None:
        expected = MmioInstruction(len(code), write, size, immediate=immediate)
    assert found == expected
    assert decode_mmio(code[:-1]) != expected or text.startswith("x")


@pytest.mark.parametrize("code", ["", "0f", "0fb6", "89c0", "f3a4", "0105", "c7480000", "ff00", "480fb6"])
def test_what_is_not_emulated_is_said_to_be_so(code):
    assert decode_mmio(bytes.fromhex(code)) is None


@given(st.binary(max_size=15))
def test_any_bytes_decode_or_not(code):
    found = decode_mmio(code)
    assert found is None or 0 < found.length <= len(code)
