"""The same policy met by a TD that runs: the interpreter honours the controls and bitmaps that the module wrote."""

import pytest
from test_exit_policy import OWN, expected

from softtdx.abi.exits import ExitReason, VeCategory
from softtdx.abi.leaves import TdcallLeaf
from softtdx.abi.msrs import policies
from softtdx.vmm.boot import boot_host
from softtdx.vmm.python_guest import GpError, VeError, run_python_guest

WRITE_ONLY = {0x49, 0x10B}  # IA32_PRED_CMD, IA32_FLUSH_CMD
ENUMERATED = {"GP_OR_VE_BY_TSC_DEADLINE"}  # features that our VMM configures for its TDs
CONFIGURABLE = int(VeCategory.CONFIGURABLE_PARAVIRT)


@pytest.fixture(scope="module")
def host():
    return boot_host()


def outcome(td, instruction, *operands):
    """'next', '#13', or '#20' and the category of the #VE."""
    try:
        instruction(*operands)
    except GpError:
        return "#13", 0
    except VeError:
        info = td.tdcall(TdcallLeaf.VP_VEINFO_GET, 1)
        return "#20", info.rcx >> 32
    return "next", 0


def wanted(row):
    if row.rd_bitmap == "FIXED_0":
        return ("#13", 0) if row.first in WRITE_ONLY else ("next", 0)
    if row.rd_bitmap != "FIXED_1":
        return "#13", 0  # a feature that this TD has not
    if row.rd_action in ENUMERATED:
        return "#20", CONFIGURABLE
    return expected(row, write=False, reduced=False)


def test_rdmsr_of_every_row_of_the_msr_table(host):
    wrong = []

    def guest(td):
        for row in policies():
            if row.first in OWN and row.first not in (0xBD, 0x10A):
                continue
            for msr in (row.first, row.last):
                want = ("next", 0) if row.first in OWN else wanted(row)
                found = outcome(td, td.rdmsr, msr)
                if found != want:
                    wrong.append((hex(msr), row.name, found, want))

    run_python_guest(host, guest)
    assert not wrong


def test_instructions_that_exit_come_back_as_the_policy_says(host):
    found = {}

    def guest(td):
        found["hlt"] = outcome(td, td.hlt)
        found["in"] = outcome(td, td.inb, 0x60)
        found["out"] = outcome(td, td.outl, 0xCF8, 0x8000_0000)
        found["cpuid 4000_0000"] = outcome(td, td.cpuid, 0x4000_0000)
        found["cpuid 0"] = outcome(td, td.cpuid, 0)
        found["wrmsr beyond"] = outcome(td, td.wrmsr, 0x4B56_4D01, 1)
        found["wrmsr efer"] = outcome(td, td.wrmsr, 0xC000_0080, td.rdmsr(0xC000_0080) ^ 1)
        found["wrmsr x2apic icr"] = outcome(td, td.wrmsr, 0x830, 0x40)
        found["wrmsr x2apic tpr"] = outcome(td, td.wrmsr, 0x808, 0x20)

    run_python_guest(host, guest)
    ve = ("#20", int(VeCategory.PARAVIRT))
    assert found == {
        "hlt": ve, "in": ve, "out": ve, "cpuid 4000_0000": ve, "cpuid 0": ("next", 0), "wrmsr beyond": ve,
        "wrmsr efer": ("next", 0), "wrmsr x2apic icr": ve, "wrmsr x2apic tpr": ("next", 0),
    }  # fmt: skip


def test_ve_information_of_an_io_instruction_is_the_processors(host):
    seen = []

    def guest(td):
        try:
            td.outw(0x3F8, 0x41)
        except VeError:
            info = td.ve_info()
            seen.append((info.rcx & 0xFFFF_FFFF, info.rdx, info.r10 & 0xFFFF_FFFF))

    run_python_guest(host, guest)
    # Two bytes (1), OUT, port in 31:16; 66 EF is the instruction.
    assert seen == [(ExitReason.IO_INSTRUCTION, 0x3F8 << 16 | 1, 2)]
