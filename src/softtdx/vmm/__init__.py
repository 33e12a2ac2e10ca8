"""QEMU's part: machines built on KVM's ioctl surface.

Reading order: `machine`, `payload` and `launcher` (what is loaded, and where), `devices` and `serial`, `hypercalls`
and `quoting`, `agent` and `registry` (who asks a running TD for a quote, and how he finds it), `python_guest` (a Python
function as a vCPU's program); `linux`, `virtio` and `net` are the machine that boots Linux.
"""

from softtdx.vmm.errors import GuestError as GuestError
from softtdx.vmm.errors import MachineError as MachineError
from softtdx.vmm.errors import PayloadError as PayloadError
from softtdx.vmm.machine import End as End
from softtdx.vmm.machine import Machine as Machine
from softtdx.vmm.machine import MachineConfig as MachineConfig
from softtdx.vmm.machine import MachineResult as MachineResult
from softtdx.vmm.payload import Payload as Payload
from softtdx.vmm.payload import load_payload as load_payload
from softtdx.vmm.payload import parse_payload as parse_payload
