"""The event-notify interrupt: to the vCPU that asked for it, when a quote is there."""

from __future__ import annotations

from typing import Any

import pytest

from softtdx.abi.ghci import VmcallLeaf, VmcallStatus
from softtdx.attest.getquote import GetQuote
from softtdx.kvm.uapi import TdxExit
from softtdx.vmm.hypercalls import HypercallServices


class Vm:
    """As much of a VM as the interrupt needs: whether it has local APICs, and what was signalled."""

    def __init__(self, *, irqchip: bool) -> None:
        self.irqchip = irqchip
        self.signalled: list[tuple[int, int]] = []

    def enable_cap(self, cap: int, *args: int) -> None:
        """User space answers MapGPA."""

    def signal_msi(self, address: int, data: int) -> bool:
        self.signalled.append((address, data))
        return True


class AtOnce(GetQuote):
    """Takes any call and is done with it at once."""

    def call(self, memory: Any, gpa: int, size: int, notify: Any) -> VmcallStatus:
        notify()
        return VmcallStatus.SUCCESS


@pytest.mark.parametrize(("apic", "address"), [(0, 0xFEE0_0000), (3, 0xFEE0_3000), (0x1FE, 0xFEEF_E020)])
def test_the_interrupt_goes_to_the_vcpu_that_set_it_up(apic: int, address: int) -> None:
    vm: Any = Vm(irqchip=True)
    services = HypercallServices(vm, AtOnce(lambda report: report))
    quote = TdxExit().put(VmcallLeaf.GET_QUOTE, (0x1000, 0x1000), VmcallStatus.SUBFUNC_UNSUPPORTED)
    services.tdx(quote)
    assert vm.signalled == []
    services.tdx(
        TdxExit().put(VmcallLeaf.SETUP_EVENT_NOTIFY_INTERRUPT, (0x40,), VmcallStatus.SUBFUNC_UNSUPPORTED), apic
    )
    services.tdx(quote)
    assert vm.signalled == [(address, 0x40)]


def test_a_vm_without_local_apics_gets_none() -> None:
    vm: Any = Vm(irqchip=False)
    services = HypercallServices(vm, AtOnce(lambda report: report))
    services.tdx(TdxExit().put(VmcallLeaf.SETUP_EVENT_NOTIFY_INTERRUPT, (0x40,), VmcallStatus.SUBFUNC_UNSUPPORTED))
    services.tdx(TdxExit().put(VmcallLeaf.GET_QUOTE, (0x1000, 0x1000), VmcallStatus.SUBFUNC_UNSUPPORTED))
    assert vm.signalled == []
