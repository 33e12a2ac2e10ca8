"""Virtio 1.2 devices on PCI: `queue` (split virtqueues), `device`, `pci` (the transport), `console`, `block`, `net`.

All device memory is the guest's shared memory: a TD's driver uses it because of VIRTIO_F_ACCESS_PLATFORM.
"""

from softtdx.vmm.virtio.block import VirtioBlock as VirtioBlock
from softtdx.vmm.virtio.console import VirtioConsole as VirtioConsole
from softtdx.vmm.virtio.net import VirtioNet as VirtioNet
from softtdx.vmm.virtio.pci import VirtioPci as VirtioPci
