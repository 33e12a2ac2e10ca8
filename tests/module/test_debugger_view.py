"""What a debugger on the host reads of a debug TD: control structures as TDH.VP.INIT left them."""

import pytest
from guest_script import interrupt, run
from tdx_machine import ATTRIBUTES_DEBUG, NULL_PA, Leaf, Machine, Td, status, td_params

from softtdx.abi.cpuid import find
from softtdx.abi.exits import ExitReason
from softtdx.abi.fields import L2_VMCS_CLASSES, CpuidFieldCode, table
from softtdx.abi.status import Status
from softtdx.abi.structs import TdParams
from softtdx.abi.vmcs_field import VmcsField
from softtdx.hw.faults import VmFail
from softtdx.module.cpuid_config import CPUID_FIXED0_BITMAP

L2_VMS = 1
CPUID_VALUES = 0x9410_0003_0000_0000
XFAM_LBR = 1 << 15


@pytest.fixture(scope="module")
def debuggee():
    td = Td.create(Machine(), params=td_params(attributes=ATTRIBUTES_DEBUG, l2_vms=L2_VMS))
    td.finalize()
    return td


def vp_field(name: str, element: int = 0) -> int:
    return next(row for row in table("vp").fields if row.name == name).field_id + element


def read(td: Td, field: int) -> int:
    return td.machine.ok(Leaf.VP_RD, rcx=td.vcpu_pages[0], rdx=field).r8


@pytest.mark.parametrize(("name", "element", "value"), [
    ("BASE_L2_CR0_GUEST_HOST_MASK", 0, 0xFFFF_FFFF_7FFA_FFE0),
    ("BASE_L2_CR0_READ_SHADOW", 0, 0x20),
    ("BASE_L2_CR4_READ_SHADOW", 0, 0x2040),
    ("SHADOW_CR0_GUEST_HOST_MASK", 1, NULL_PA),
    ("SHADOW_CR0_READ_SHADOW", 1, 0),
    ("SHADOW_CR4_GUEST_HOST_MASK", 1, NULL_PA),
    ("SHADOW_CR4_READ_SHADOW", 1, 0),
    ("SHADOW_CR4_GUEST_HOST_MASK", 2, 0),
])  # fmt: skip
def test_masks_of_control_registers_of_l2_vms_are_there_from_the_start(debuggee, name, element, value):
    assert read(debuggee, vp_field(name, element)) == value


def test_the_mask_of_cr4_for_l2_vms_is_what_an_l1_vmm_may_not_write(debuggee):
    m = debuggee.machine
    fixed1 = m.ok(Leaf.MNG_RD, rcx=debuggee.tdr, rdx=0x9610_0003_0000_0489).r8  # VIRTUAL_IA32_VMX_CR4_FIXED1
    owned = read(debuggee, vp_field("BASE_L2_CR4_GUEST_HOST_MASK"))
    assert ~owned & NULL_PA == fixed1 & ~0x2040  # VMXE and MCE are 1 and stay it


@pytest.mark.parametrize(("field", "value"), [
    (VmcsField.GUEST_RIP, 0xFFFF_FFF0),
    (VmcsField.GUEST_CR0, 0x21),
    (VmcsField.GUEST_CR4, 0x2040),
    (VmcsField.GUEST_CS_ACCESS_RIGHTS, 0xC09B),
    (VmcsField.GUEST_IA32_EFER, 0x901),
    (VmcsField.VIRTUAL_APIC_ADDRESS, NULL_PA),
    (VmcsField.SHARED_EPTP, NULL_PA),
    (VmcsField.CR0_MASK, NULL_PA),
    (VmcsField.CR0_READ_SHADOW, 0x21),
    (VmcsField.CR4_READ_SHADOW, 0x2040),
])  # fmt: skip
def test_the_vmcs_of_an_l2_vm_starts_as_that_of_l1_does(debuggee, field, value):
    row = next(row for row in table("l2_vmcs").fields if row.field_code == field)
    assert read(debuggee, row.field_id & ~(0x3F << 56) | L2_VMCS_CLASSES[0] << 56) == value


def test_the_host_state_in_the_vmcs_is_made_at_the_first_entry_and_again_on_another_processor():
    td = Td.create(Machine(), params=td_params(attributes=ATTRIBUTES_DEBUG))
    tdvpr = td.finalize()
    m = td.machine
    of_lp, of_module = vp_field("LP_DEPENDENT_HPA_UPDATED"), vp_field("MODULE_DEPENDENT_FIELDS_UPDATED")
    assert (read(td, of_lp), read(td, of_module)) == (0, 0)
    run(m.lps[0], tdvpr, interrupt())
    assert (read(td, of_lp), read(td, of_module)) == (1, 1)
    m.ok(Leaf.VP_FLUSH, rcx=tdvpr)
    assert m.ok(Leaf.VP_RD, lp=1, rcx=tdvpr, rdx=of_lp).r8 == 0
    assert m.ok(Leaf.VP_RD, lp=1, rcx=tdvpr, rdx=of_module).r8 == 1


# --- values that no MSR takes
@pytest.mark.parametrize(("name", "value", "msr"), [
    ("IA32_DS_AREA", 1 << 47, 0x600),
    ("IA32_DS_AREA", (1 << 64) - (1 << 48), 0x600),
    ("IA32_DS_AREA", 1 << 63, 0x600),
    ("IA32_UARCH_MISC_CTL", 2, 0x1B01),
    ("IA32_TSC_AUX", 1 << 32, 0xC0000103),
    ("IA32_SPEC_CTRL", 1 << 9, 0x48),
    ("IA32_SPEC_CTRL", 1 << 63, 0x48),
    ("IA32_LBR_DEPTH", 0, 0x14CF),
    ("IA32_LBR_DEPTH", 33, 0x14CF),
    ("IA32_LBR_DEPTH", 40, 0x14CF),
    ("IA32_LBR_DEPTH", 128, 0x14CF),
])  # fmt: skip
def test_an_entry_with_a_value_that_no_msr_takes_ends_the_td_and_names_the_msr(name, value, msr):
    params = TdParams.parse(td_params(attributes=ATTRIBUTES_DEBUG))
    if name == "IA32_LBR_DEPTH":
        params.xfam |= XFAM_LBR
    td = Td.create(Machine(), params=bytes(params))
    m, tdvpr = td.machine, td.finalize()
    m.ok(Leaf.VP_WR, rcx=tdvpr, rdx=vp_field(name), r8=value, r9=NULL_PA)
    regs = m.call(Leaf.VP_ENTER, rcx=tdvpr)
    assert status(regs.rax) == (Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE, ExitReason.ENTRY_FAILURE_MSR_LOADING)
    assert (regs.rcx, regs.rdx, regs.r8, regs.r9) == (0, 3 | msr << 32, 0, 0)
    m.fails(Leaf.VP_ENTER, Status.TD_FATAL, rcx=tdvpr)


@pytest.mark.parametrize(("name", "value"), [
    ("IA32_DS_AREA", (1 << 47) - 8),
    ("IA32_DS_AREA", (1 << 64) - (1 << 47)),
    ("IA32_UARCH_MISC_CTL", 1),
    ("IA32_TSC_AUX", 0xFFFF_FFFF),
    ("IA32_SPEC_CTRL", 7),
])  # fmt: skip
def test_a_debuggers_value_that_an_msr_takes_is_there_after_a_run(name, value):
    td = Td.create(Machine(), params=td_params(attributes=ATTRIBUTES_DEBUG))
    m, tdvpr = td.machine, td.finalize()
    m.ok(Leaf.VP_WR, rcx=tdvpr, rdx=vp_field(name), r8=value, r9=NULL_PA)
    run(m.lps[0], tdvpr, interrupt())
    assert read(td, vp_field(name)) == value


# --- CPUID leaves that read as 0 and have no row
def cpuid_field(leaf: int) -> int:
    return CPUID_VALUES | CpuidFieldCode(leaf, None).encode()


def zero_leaf() -> int:
    """A leaf without a row of which CPUID_FIXED0_BITMAP says that it is 0."""
    return next(leaf for leaf in range(36) if CPUID_FIXED0_BITMAP >> leaf & 1 and find(leaf, 0) is None)


def test_a_cpuid_leaf_without_a_row_reads_as_0_and_cannot_be_written(debuggee):
    m, field = debuggee.machine, cpuid_field(zero_leaf())
    assert m.ok(Leaf.MNG_RD, rcx=debuggee.tdr, rdx=field).r8 == 0
    regs = m.call(Leaf.MNG_WR, rcx=debuggee.tdr, rdx=field, r8=1, r9=NULL_PA)
    assert status(regs.rax) == (Status.METADATA_FIELD_NOT_READABLE, 0)


def test_nothing_follows_a_cpuid_leaf_without_a_row_and_the_module_gives_up():
    td = Td.create(Machine())
    field = cpuid_field(zero_leaf())
    m = td.machine
    assert m.ok(Leaf.MNG_RD, version=1, rcx=td.tdr, rdx=field).rdx == field + 1
    with pytest.raises(VmFail):
        m.call(Leaf.MNG_RD, version=1, rcx=td.tdr, rdx=field + 1)
