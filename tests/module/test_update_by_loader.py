"""TD-preserving update as a host does it: SEAMLDR.INSTALL puts another module over the running one."""

import pytest
from tdx_machine import PAGE, Leaf, Machine, Td

from softtdx.abi.leaves import SeamldrLeaf
from softtdx.abi.status import SeamldrStatus, Status
from softtdx.abi.structs import SeamldrParams, SeamldrScenario
from softtdx.hw import Registers
from softtdx.seamldr import development_release, launch_np_seamldr

PARAMS, SIGSTRUCT, IMAGE = 0x4400_0000, 0x4400_2000, 0x4410_0000


class Loaded(Machine):
    """A machine whose module came through the loaders."""

    def _load(self) -> None:
        assert launch_np_seamldr(self.platform) == SeamldrStatus.SUCCESS
        assert self.install(SeamldrScenario.LOAD) == SeamldrStatus.SUCCESS

    def install(self, scenario: SeamldrScenario) -> SeamldrStatus:
        release, lp = development_release(), self.platform.lps[0]
        params = SeamldrParams()
        params.scenario = scenario
        params.sigstruct_pa = SIGSTRUCT
        params.num_module_pages = pages = len(release.image) // PAGE
        params.module_pages = [IMAGE + i * PAGE for i in range(pages)] + [0] * (496 - pages)
        lp.write(PARAMS, bytes(params))
        lp.write(SIGSTRUCT, release.sigstruct)
        lp.write(IMAGE, release.image)
        for each in self.platform.lps:
            regs = each.seamcall(Registers(rax=SeamldrLeaf.INSTALL, rcx=PARAMS))
        self.module = self.platform.seam.module
        return SeamldrStatus(regs.rax)

    def initialize(self) -> None:
        self.ok(Leaf.SYS_INIT)
        for index in range(len(self.platform.lps)):
            self.ok(Leaf.SYS_LP_INIT, lp=index)


@pytest.fixture
def loaded():
    return Loaded()


def test_tds_live_on_under_the_new_module(loaded):
    td = Td.create(loaded)
    td.add_path(0)
    page = td.add_page(0, b"kept")
    td.finalize()
    loaded.ok(Leaf.SYS_SHUTDOWN, rcx=1)
    old = loaded.module
    assert loaded.install(SeamldrScenario.UPDATE) == SeamldrStatus.SUCCESS
    assert loaded.module is not old
    loaded.initialize()
    loaded.ok(Leaf.SYS_UPDATE)
    assert td.entry(0)[1:] == (4, 0)
    assert loaded.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=page).rdx == td.tdr
    td.block(0)
    td.track()
    loaded.ok(Leaf.MEM_PAGE_REMOVE, rcx=0, rdx=td.tdr)


def test_a_module_that_is_loaded_and_not_updated_finds_nothing_of_the_old_one(loaded):
    loaded.ok(Leaf.SYS_SHUTDOWN, rcx=1)
    assert loaded.install(SeamldrScenario.LOAD) == SeamldrStatus.SUCCESS
    loaded.initialize()
    loaded.fails(Leaf.SYS_UPDATE, Status.SYS_INVALID_HANDOFF)
