"""Private and shared memory of a TD against a plain model: whatever the order of conversions, loads and stores."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softtdx.abi.ghci import VmcallLeaf
from softtdx.vmm import MachineConfig
from softtdx.vmm.python_guest import PythonGuest

PAGE = 4096
PAGES = 6
BASE = 0x1000

page_numbers = st.integers(0, PAGES - 1)
values = st.integers(1, 2**64 - 1)
operations = st.one_of(
    st.tuples(st.just("store"), page_numbers, values),
    st.tuples(st.just("load"), page_numbers, st.none()),
    st.tuples(st.just("host"), page_numbers, values),
    st.tuples(st.just("share"), page_numbers, st.integers(1, PAGES)),
    st.tuples(st.just("keep"), page_numbers, st.integers(1, PAGES)),
)


class Model:
    """Which pages are shared, and the first word of each."""

    def __init__(self):
        self.shared = [False] * PAGES
        self.word = [0] * PAGES


def convert(td, model, first, count, shared):
    last = min(PAGES, first + count)
    gpa = BASE + first * PAGE
    bit = td.shared_bit if shared else 0
    assert td.tdvmcall(VmcallLeaf.MAP_GPA, gpa | bit, (last - first) * PAGE).r10 == 0
    for page in range(first, last):
        if model.shared[page] != shared:
            model.shared[page], model.word[page] = shared, 0
            if not shared:
                assert td.accept(BASE + page * PAGE) == 0


def address(td, model, page):
    gpa = BASE + page * PAGE
    return td.shared(gpa) if model.shared[page] else gpa


def host_access(guest, model, page, value):
    """The host writes user memory of the slot: seen by the TD if the page is shared, without effect if it is not."""
    slot = guest.machine.vm.memslots.find(BASE)
    hva = slot.hva(BASE + page * PAGE)
    if model.shared[page]:
        assert int.from_bytes(guest.machine.kvm.mm.read(hva, 8), "little") == model.word[page]
        guest.machine.kvm.mm.write(hva, value.to_bytes(8, "little"))
        model.word[page] = value
        return
    memory, description = guest.host.platform.memory, guest.host.platform.description
    mapping = guest.machine.vm.ops.secure.lookup(BASE + page * PAGE)
    word = model.word[page].to_bytes(8, "little")
    for keyid in range(description.first_private_keyid):
        seen = memory.read(description.keyed(mapping.hpa, keyid), 8)
        assert model.word[page] < 1 << 32 or seen != word


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(operations, min_size=5, max_size=30))
def test_memory_behaves_like_the_model(host, steps):
    def program(td):
        model = Model()
        for page in range(PAGES):
            assert td.accept(BASE + page * PAGE) == 0
        for what, page, value in steps:
            if what == "store":
                td.store(address(td, model, page), value)
                model.word[page] = value
            elif what == "load":
                assert td.load(address(td, model, page)) == model.word[page]
            elif what == "host":
                host_access(guest, model, page, value)
            else:
                convert(td, model, page, value, what == "share")
        for page in range(PAGES):
            assert td.load(address(td, model, page)) == model.word[page]

    with PythonGuest(host, program, MachineConfig(memory=1 << 20)) as guest:
        guest.run()
