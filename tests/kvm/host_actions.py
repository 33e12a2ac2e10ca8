"""A Python guest that lets its host do something in the middle: the vCPU leaves the guest for it, as on hardware."""

from softtdx.abi.ghci import VmcallLeaf
from softtdx.abi.kvm import KvmExit
from softtdx.vmm import Machine, MachineConfig
from softtdx.vmm.python_guest import PythonGuest

PORT = 0x600


class HostedMachine(Machine):
    """A machine whose port 0x600 runs what `action` is."""

    action = None
    answer = None
    error = None

    def _handle(self, vcpu, run):
        if run.exit_reason is KvmExit.IO and run.io.port == PORT:
            try:
                self.answer = self.action()
            except BaseException as error:
                self.error = error
            return
        super()._handle(vcpu, run)


def run_hosted(host, program, memory=8 << 20, machine_class=HostedMachine, **config):
    """Run program(td, vm, do); do(function) has the host call the function and returns what it returned."""
    machine = machine_class(host, MachineConfig(memory=memory, **config))

    def main(td):
        def do(function):
            machine.action, machine.error = function, None
            if td.is_td:
                td.tdvmcall(VmcallLeaf.IO, 1, 1, PORT, 0)
            else:
                td.outb(PORT, 0)
            if machine.error is not None:
                raise machine.error
            return machine.answer

        program(td, machine.vm, do)

    with PythonGuest(host, main, machine=machine) as guest:
        return guest.run().stats
