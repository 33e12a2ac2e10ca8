"""The machine is handed to another kernel, with or without TDs: nothing of theirs is left in memory."""

import threading

import pytest
from td_build_steps import Build

from softtdx.hw import Platform, preset
from softtdx.kvm import Host, KvmError
from softtdx.kvm.memory import PAGE
from softtdx.seamldr import development_release
from softtdx.vmm import MachineConfig
from softtdx.vmm.errors import GuestError, MachineError
from softtdx.vmm.python_guest import PythonGuest

MIB = 1 << 20
EIO = 5
SECRET = 0x5EC2E7_0F_A_7D


def fresh():
    host = Host(Platform(preset("spr")))
    return host, host.memory.free_pages


def next_kernel_finds_nothing(host, pages):
    """It reads with KeyID 0 what belonged to TDX: no machine check, no TD-owner bit, no contents."""
    for pa in pages:
        assert host.memory.read(pa, PAGE) == bytes(PAGE)
        assert not host.platform.memory.raw_line(pa)[2]


@pytest.mark.parametrize("steps", range(8))
def test_a_td_that_was_built_that_far_leaves_nothing(steps):
    host, before = fresh()
    host.enable_tdx(development_release())
    build = Build(host).do(steps)
    pages = list(host.memory.leaked())
    assert pages
    host.kexec()
    next_kernel_finds_nothing(host, pages)
    assert host.tdx is None
    assert not host.memory.tdx_pages()
    build.kvm.mm.close()
    assert host.memory.free_pages == before
    with pytest.raises(KvmError) as error:
        build.vm.create_vcpu(7)
    assert error.value.errno == EIO
    host.enable_tdx(development_release())  # the next kernel does
    with Build(host).do():
        pass
    host.disable_tdx()


def test_running_guests_are_stopped_and_leave_nothing():
    host, before = fresh()
    host.enable_tdx(development_release())
    inside = threading.Semaphore(0)

    def program(td):
        if td.is_td:
            assert td.accept(0x9000) == 0
        td.store(0x9000, SECRET)
        inside.release()
        while True:
            td.load(0x9000)

    guests = [PythonGuest(host, program, MachineConfig(memory=MIB, vm=vm)) for vm in (False, True, False)]
    ends = []

    def run(guest):
        try:
            guest.run()
        except (KvmError, GuestError, MachineError) as error:
            ends.append(error)

    threads = [threading.Thread(target=run, args=(guest,), daemon=True) for guest in guests]
    for thread in threads:
        thread.start()
    for _ in guests:
        inside.acquire()
    pages = list(host.memory.leaked())
    host.kexec()
    next_kernel_finds_nothing(host, pages)
    for thread in threads:
        thread.join()
    for guest in guests:
        guest.close()
    assert len(ends) == 3
    assert host.memory.free_pages == before
    secret = SECRET.to_bytes(8, "little")
    assert not any(secret in host.memory.read(pa, PAGE) for pa in pages)


def test_without_tdx_it_is_a_stop():
    host, before = fresh()
    with PythonGuest(host, lambda td: td.load(0x9000), MachineConfig(memory=MIB, vm=True)) as guest:
        guest.run()
        host.kexec()
        with pytest.raises(KvmError):
            guest.machine.vcpus[0].run()
    assert host.memory.free_pages == before
