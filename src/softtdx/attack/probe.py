"""What a probe on the memory bus sees of a guest, beside what the host's loads see: `softtdx dram dump`."""

from dataclasses import dataclass, replace

from softtdx._silicon import PAYLOADS
from softtdx.errors import SoftTdxError
from softtdx.hw import DramLine, Platform, preset
from softtdx.hw.dram import LINE
from softtdx.kvm.memory import PAGE
from softtdx.kvm.tdx import TdxVm
from softtdx.vmm import Machine, MachineConfig, parse_payload
from softtdx.vmm.boot import boot_host
from softtdx.vmm.quoting import QuotingService

__all__ = ["Picture", "dump_demo", "page_of"]

_MEMORY = 16 << 20
_SHOWN = 256
_WIDTH = 16


@dataclass(frozen=True)
class Picture:
    """A stretch of DRAM: `data` from `address` on, and the lines with what the engine keeps beside them."""

    guest: str
    raw: bool
    address: int
    data: bytes
    lines: tuple[DramLine, ...]

    def describe(self) -> dict[str, object]:
        """For JSON."""
        lines = [
            {"address": line.address, "mac": line.mac, "td_owner": line.owner, "poisoned": line.poisoned}
            for line in self.lines
        ]
        return {
            "guest": self.guest, "raw": self.raw, "address": self.address, "data": self.data.hex(), "lines": lines,
        }  # fmt: skip

    def hexdump(self) -> str:
        """Sixteen bytes a row."""
        rows = []
        for at in range(0, len(self.data), _WIDTH):
            part = self.data[at : at + _WIDTH]
            text = "".join(chr(b) if 32 <= b < 127 else "." for b in part)
            rows.append(f"{self.address + at:012x}  {part.hex(' '):<{3 * _WIDTH - 1}}  {text}")
        return "\n".join(rows)


def page_of(machine: Machine, gpa: int) -> int:
    """The DRAM address behind a guest-physical address, which the host knows. SoftTdxError where there is none."""
    vm = machine.vm
    if isinstance(vm.ops, TdxVm):
        mapping = vm.ops.secure.lookup(gpa)
        if mapping is not None:
            return mapping.hpa + gpa % mapping.size
    else:
        slot = vm.memslots.find(gpa)
        if slot is not None:
            return machine.kvm.mm.get_page(slot.hva(gpa)) + gpa % PAGE
    raise SoftTdxError(f"the guest has no memory at {gpa:#x}")


def dump_demo(
    physical: tuple[int, int] | None,
    guest: tuple[int, int] | None,
    *,
    raw: bool,
    vm: bool,
    encryption: bool = True,
) -> Picture:
    """Run the demo's guest, and take the picture before it is torn down.

    The range is one of DRAM addresses, or of guest-physical ones within a page; with neither it is the beginning of
    the guest's program.
    """
    description = preset("spr")
    if not encryption:
        description = replace(description, integrity="none", tme=False)
    host = boot_host(description, tdx=not vm)
    payload = parse_payload(PAYLOADS["demo"], "demo")
    quoting = None if vm else QuotingService(host.platform)
    with Machine(host, MachineConfig(memory=_MEMORY, vm=vm), quoting=quoting) as machine:
        machine.load(payload)
        machine.run()
        if physical is None:
            entry = payload.entry & -LINE
            low, high = guest or (entry, min(entry + _SHOWN, (entry & -PAGE) + PAGE))
            if low // PAGE != (high - 1) // PAGE:
                raise SoftTdxError(f"{low:#x}..{high:#x} crosses a page: guest memory is contiguous within one only")
            start = page_of(machine, low)
            physical = start, start + high - low
        return _picture(host.platform, physical, raw=raw, guest="VM" if vm else "TD")


def _picture(platform: Platform, physical: tuple[int, int], *, raw: bool, guest: str) -> Picture:
    start, end = physical
    dram = platform.dram
    data = dram.read(start, end - start)
    first = start & -LINE
    lines = tuple(dram.line(at) for at in range(first, end, LINE))
    if not raw:
        data = platform.memory.read(start, end - start)
    return Picture(guest, raw, start, data, lines)
