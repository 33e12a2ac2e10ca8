"""A host with TDX up, shared by the tests that need one, and the accounts that must balance after each."""

import signal

import pytest
from hypothesis import HealthCheck, settings

from softtdx.vmm.boot import boot_host

# A busy machine is slow: how long an example or its making takes says nothing of what is tested.
settings.register_profile("softtdx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("softtdx")


@pytest.fixture(scope="session", autouse=True)
def children_can_be_interrupted():
    """A shell starts background jobs with SIGINT ignored, and the programs under test would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def booted_host():
    return boot_host()


@pytest.fixture
def host(booted_host):
    """The host; afterwards no TD's page, KeyID or host page may be missing."""
    before = booted_host.memory.free_pages
    yield booted_host
    assert set(booted_host.memory.tdx_pages()) == {"PAMT"}
    assert booted_host.tdx.free_keyids == len(booted_host.platform.description.private_keyids) - 1
    assert booted_host.memory.free_pages == before
    assert not booted_host.platform.escapes
