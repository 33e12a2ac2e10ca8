"""Machines that the module's tests share."""

import pytest
from tdx_machine import Machine, Td


@pytest.fixture
def machine():
    return Machine()


@pytest.fixture
def td(machine):
    """A TD with one vCPU, measured: `td.vcpu_pages[0]` is the TDVPR."""
    td = Td.create(machine)
    td.finalize()
    return td
