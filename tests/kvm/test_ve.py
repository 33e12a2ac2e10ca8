"""#VE: which accesses of a TD give it one, and which exit to the host, by what KVM and the module put into entries."""

from dataclasses import replace

import pytest
from host_actions import run_hosted

from softtdx.abi import sept
from softtdx.abi.fields import table
from softtdx.abi.ghci import VmcallLeaf
from softtdx.abi.leaves import TdcallLeaf
from softtdx.abi.structs import Attributes
from softtdx.kvm import seamcalls as sc
from softtdx.kvm.memory import PAGE
from softtdx.kvm.tdx import TdxVm
from softtdx.vmm.errors import GuestError
from softtdx.vmm.python_guest import VeError

MIB = 1 << 20
DEVICE = 1 << 33
EPT_VIOLATION = 48
PENDING_VE_DISABLE = 1


def entries(vm):
    """Every entry of every table of the shared EPT."""
    memory = vm.host.memory
    return [e for page in vm.ept._tables for e in memoryview(memory.read(page, PAGE)).cast("Q")]


def test_entries_of_the_shared_ept_suppress_ve_but_for_addresses_without_memory(host):
    def program(td, vm, do):
        assert all(entry & sept.SVE for entry in entries(vm))
        with pytest.raises(VeError):
            td.load(td.shared(DEVICE))
        assert td.ve_info().r9 == DEVICE | td.shared_bit
        marks = [entry for entry in entries(vm) if not entry & (sept.SVE | sept.RWX)]
        assert marks == [0]
        assert td.tdvmcall(VmcallLeaf.MAP_GPA, 4 * MIB | td.shared_bit, PAGE).r10 == 0
        td.store(td.shared(4 * MIB), 1)  # an exit that KVM handles, no #VE
        do(lambda: vm.mm.shrink(1))
        assert td.load(td.shared(4 * MIB)) == 1
        assert all(e & sept.SVE or not e or not e & sept.LEAF for e in entries(vm))

    run_hosted(host, program)


def test_only_the_first_touch_of_a_device_exits(host):
    def program(td, vm, do):
        del do
        counts = []
        for _ in range(3):
            before = vm.stats["exits:EPT_VIOLATION"]
            with pytest.raises(VeError):
                td.load(td.shared(DEVICE))
            td.ve_info()
            counts.append(vm.stats["exits:EPT_VIOLATION"] - before)
        assert counts == [1, 0, 0]

    run_hosted(host, program)


def test_where_a_device_was_memory_can_be_put_and_taken_away_again(host):
    def program(td, vm, do):
        def touch():
            with pytest.raises(VeError):
                td.load(td.shared(DEVICE))
            td.ve_info()

        touch()
        do(lambda: vm.set_user_memory_region2(7, DEVICE, PAGE, vm.mm.mmap(PAGE)))
        td.store(td.shared(DEVICE), 6)
        assert td.load(td.shared(DEVICE)) == 6
        do(lambda: vm.set_user_memory_region2(7, 0, 0, 0))
        touch()

    run_hosted(host, program)


def test_entries_of_the_secure_ept_suppress_ve(host):
    def program(td, vm, do):
        assert td.accept(0x9000) == 0
        do(lambda: vm.vcpus[0].pre_fault_memory(0xA000, PAGE))
        tdr = vm.ops.require_tdr()

        def read():
            with host.cpus.run() as lp:
                return [
                    sc.mem_sept_rd(lp, tdr, gpa, level).rcx for gpa, level in ((0x9000, 0), (0xA000, 0), (0xB000, 0))
                ]

        assert all(entry & sept.SVE for entry in do(read))

    run_hosted(host, program)


@pytest.fixture
def attributes(monkeypatch):
    """What TDs are created with."""
    real, wanted = TdxVm._init_vm, [Attributes.SEPT_VE_DISABLE]
    monkeypatch.setattr(TdxVm, "_init_vm", lambda self, params: real(self, replace(params, attributes=wanted[0])))
    return wanted


@pytest.mark.parametrize("attribute", [Attributes(0), Attributes.SEPT_VE_DISABLE])
def test_the_opt_out_of_ve_for_pending_pages_starts_as_the_attribute_says(host, attributes, attribute):
    attributes[0] = attribute

    def program(td, vm, do):
        control = td.tdcall(TdcallLeaf.VM_RD, rdx=table("td")["TD_CTLS"].field_id)
        assert control.rax == 0
        assert bool(control.r8 & PENDING_VE_DISABLE) == bool(attribute)
        do(lambda: vm.vcpus[0].pre_fault_memory(0xA000, PAGE))
        if attribute:
            td.load(0xA000)  # exits, and ends the TD: KVM has nothing to give that the TD would not have to accept
        with pytest.raises(VeError):
            td.load(0xA000)
        info = td.ve_info()
        assert (info.rcx & 0xFFFF_FFFF, info.r9) == (EPT_VIOLATION, 0xA000)
        assert td.accept(0xA000) == 0
        assert td.load(0xA000) == 0

    if attribute:
        with pytest.raises(GuestError, match="before accepting"):
            run_hosted(host, program)
    else:
        run_hosted(host, program)
