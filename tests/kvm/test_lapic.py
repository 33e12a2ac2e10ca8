"""Local APICs of vCPUs: who an interrupt is for, what the timer does, what registers take."""

import errno
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtdx.abi.msrs import Msr
from softtdx.hw import Platform, preset
from softtdx.kvm import Host, Kvm, KvmError

VCPUS = 20
FIXED, LOWEST, NMI = 0, 1 << 8, 4 << 8
LOGICAL = 1 << 11
SELF, ALL, OTHERS = 1 << 18, 2 << 18, 3 << 18


@pytest.fixture(scope="module")
def vm():
    kvm = Kvm(Host(Platform(preset("spr"))))
    vm = kvm.create_vm()
    vm.create_irqchip()
    for vcpu_id in range(VCPUS):
        vm.create_vcpu(vcpu_id)
    yield vm
    vm.close()
    kvm.mm.close()


@pytest.fixture
def apics(vm):
    apics = [vcpu.apic for vcpu in vm.vcpus.values()]
    for apic in apics:
        vm.host.memory.write(apic.descriptor, bytes(64))
        apic.vcpu.nmi_pending = False
    return apics


def pending(apic):
    """Vectors in the posted-interrupt descriptor; its notification bit says whether there are any."""
    data = apic._memory.read(apic.descriptor, 64)
    bits = int.from_bytes(data[:32], "little")
    assert bool(bits) == bool(data[32] & 1) == apic.posted
    return [vector for vector in range(256) if bits >> vector & 1]


def reached(apics, vector):
    return [apic.id for apic in apics if pending(apic) == [vector]]


def test_a_vm_without_irqchip_has_no_apics():
    kvm = Kvm(Host(Platform(preset("spr"))))
    vm = kvm.create_vm()
    assert vm.create_vcpu(0).apic is None
    with pytest.raises(KvmError) as refused:
        vm.create_irqchip()
    assert refused.value.errno == errno.EEXIST
    with pytest.raises(KvmError):
        vm.signal_msi(0xFEE0_0000, 0x40)
    vm.close()


@pytest.mark.parametrize(
    ("icr", "targets"),
    [
        (3 << 32 | FIXED, [3]),
        (99 << 32 | FIXED, []),
        (SELF, [1]),
        (ALL, list(range(VCPUS))),
        (OTHERS, [0, *range(2, VCPUS)]),
        (0xFFFF_FFFF << 32, list(range(VCPUS))),
        ((1 << 16 | 0b1010) << 32 | LOGICAL, [17, 19]),
        ((1 << 16 | 0b1010) << 32 | LOGICAL | LOWEST, [17]),
    ],
)
def test_an_ipi_reaches_those_it_is_for(apics, icr, targets):
    assert apics[1].write(Msr.X2APIC_ICR, icr | 0x55)
    assert reached(apics, 0x55) == targets
    assert apics[1].read(Msr.X2APIC_ICR) == icr | 0x55


def test_an_nmi_is_no_vector(apics):
    apics[0].write(Msr.X2APIC_ICR, 2 << 32 | NMI)
    assert apics[2].vcpu.nmi_pending
    assert pending(apics[2]) == []


def test_an_illegal_vector_is_an_error_of_the_sender(apics):
    apics[0].write(Msr.X2APIC_ICR, 2 << 32 | 5)
    assert pending(apics[2]) == []
    assert apics[0].read(Msr.X2APIC_ESR) == 0
    assert apics[0].write(Msr.X2APIC_ESR, 0)
    assert apics[0].read(Msr.X2APIC_ESR) == 1 << 5
    apics[0].write(Msr.X2APIC_ESR, 0)
    assert apics[0].read(Msr.X2APIC_ESR) == 0


@given(st.integers(0, VCPUS - 1), st.integers(16, 255))
def test_a_message_reaches_its_apic(vm, target, vector):
    apics = [vcpu.apic for vcpu in vm.vcpus.values()]
    for apic in apics:
        vm.host.memory.write(apic.descriptor, bytes(64))
    assert vm.signal_msi(0xFEE0_0000 | target << 12, vector)
    assert reached(apics, vector) == [target]
    assert not vm.signal_msi(0xFEE0_0000 | 0x70 << 12, vector)
    assert not vm.signal_msi(0x1000, vector)


def test_posting_from_many_threads_loses_nothing(apics):
    def post(first):
        for vector in range(first, 256, 4):
            apics[0].post(vector)

    threads = [threading.Thread(target=post, args=(16 + i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pending(apics[0]) == list(range(16, 256))


def advance(apic, ticks):
    apic.vcpu.ops.advance_tsc(ticks)


def enter(apic):
    with apic.vcpu.vm.host.cpus.run(0) as lp:
        apic.vcpu.cpu = 0
        apic.enter(lp)
        apic.leave(lp)


def test_the_deadline_timer_fires_once(apics):
    apic = apics[0]
    enter(apic)
    apic.write(Msr.X2APIC_LVT_TIMER, 2 << 17 | 0xEC)
    apic.write(Msr.TSC_DEADLINE, apic.vcpu.ops.guest_tsc() + 1000)
    enter(apic)
    assert pending(apic) == []
    advance(apic, 1000)
    enter(apic)
    assert pending(apic) == [0xEC]
    assert apic.read(Msr.TSC_DEADLINE) == 0


def test_a_masked_timer_is_silent_and_a_changed_mode_disarms(apics):
    apic = apics[0]
    enter(apic)
    apic.write(Msr.X2APIC_LVT_TIMER, 2 << 17 | 1 << 16 | 0xEC)
    apic.write(Msr.TSC_DEADLINE, apic.vcpu.ops.guest_tsc() + 10)
    advance(apic, 100)
    enter(apic)
    assert pending(apic) == []
    apic.write(Msr.TSC_DEADLINE, apic.vcpu.ops.guest_tsc() + 10)
    apic.write(Msr.X2APIC_LVT_TIMER, 0xEC)
    advance(apic, 100)
    enter(apic)
    assert pending(apic) == []


def test_the_count_goes_down_and_a_periodic_timer_comes_again(apics):
    apic = apics[0]
    enter(apic)
    apic.write(Msr.X2APIC_DIV_CONF, 0b1011)
    apic.write(Msr.X2APIC_LVT_TIMER, 1 << 17 | 0x40)
    apic.write(Msr.X2APIC_INIT_COUNT, 100)
    advance(apic, 5000)
    assert apic.read(Msr.X2APIC_CUR_COUNT) == 50
    advance(apic, 5000)
    enter(apic)
    assert pending(apic) == [0x40]
    apic._memory.write(apic.descriptor, bytes(64))
    advance(apic, 10_000)
    enter(apic)
    assert pending(apic) == [0x40]
    apic.write(Msr.X2APIC_INIT_COUNT, 0)
    assert apic.read(Msr.X2APIC_CUR_COUNT) == 0


@given(st.integers(0x800, 0x8FF), st.integers(0, (1 << 64) - 1))
def test_no_register_access_does_harm(vm, msr, value):
    apic = vm.vcpus[7].apic
    if msr != Msr.X2APIC_ICR:
        apic.write(msr, value)
    found = apic.read(msr)
    assert found is None or 0 <= found < 1 << 64


def test_reserved_upper_halves_and_unknown_registers_are_refused(apics):
    assert not apics[0].write(Msr.X2APIC_SIVR, 1 << 32)
    assert not apics[0].write(Msr.X2APIC_APICID, 0)
    assert not apics[0].write(Msr.X2APIC_ESR, 1)
    assert apics[0].read(0x8FF) is None
    assert [apics[i].read(Msr.X2APIC_APICID) for i in (0, 19)] == [0, 19]
    assert apics[17].read(Msr.X2APIC_LDR) == 1 << 16 | 2
