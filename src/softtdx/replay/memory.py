"""Private memory of a TD as the recordings name it, by TDR and GPA: read and written through the TD's own S-EPT."""

from typing import Final

from softtdx.hw.platform import Platform
from softtdx.module import TdxModule, tdcs, tdr

__all__ = ["GuestMemory"]

PAGE: Final = 4096
SEPT_ROOT_PAGE: Final = 3
HPA: Final = 0x000F_FFFF_FFFF_F000
LEAF: Final = 1 << 7
EPTP_5_LEVELS: Final = 4 << 3


class GuestMemory:
    """Reads and writes the page that the S-EPT has for a GPA, in whatever state. LookupError when it has none."""

    def __init__(self, platform: Platform, module: TdxModule) -> None:
        """Of the TDs of `module`."""
        self._memory = platform.memory
        self._module = module

    def read(self, tdr_pa: int, gpa: int, size: int) -> bytes:
        """`size` bytes at `gpa`."""
        return b"".join(self._memory.read(pa, part, seam=True) for pa, part in self._parts(tdr_pa, gpa, size))

    def write(self, tdr_pa: int, gpa: int, data: bytes) -> None:
        """Store at `gpa`."""
        at = 0
        for pa, part in self._parts(tdr_pa, gpa, len(data)):
            self._memory.write(pa, data[at : at + part], seam=True)
            at += part

    def _parts(self, tdr_pa: int, gpa: int, size: int) -> list[tuple[int, int]]:
        parts = []
        while size:
            part = min(size, PAGE - gpa % PAGE)
            parts.append((self._translate(tdr_pa, gpa), part))
            gpa += part
            size -= part
        return parts

    def _word(self, pa: int) -> int:
        return int.from_bytes(self._memory.read(pa, 8, seam=True), "little")

    def _translate(self, tdr_pa: int, gpa: int) -> int:
        g = self._module.g
        base = tdr_pa | g.global_key_bits
        key = (self._word(base + tdr.HKID) & 0xFFFF) << g.hkid_shift
        pages = [self._word(base + tdr.TDCX_PA + 8 * index) for index in range(SEPT_ROOT_PAGE + 1)]
        table = pages[SEPT_ROOT_PAGE]
        # The root is the fourth TDCS page, whether the tree has four levels or five.
        top = 4 if self._word(pages[0] + tdcs.EPTP) & 7 << 3 == EPTP_5_LEVELS else 3
        for level in range(top, -1, -1):
            entry = self._word(table + (gpa >> 12 + 9 * level & 0x1FF) * 8)
            if not entry & HPA or (level == 0 and not entry & LEAF):
                raise LookupError(f"GPA {gpa:#x} of the TD {tdr_pa:#x} has no page")
            if entry & LEAF:  # blocked or pending, it still is the TD's page
                mask = (1 << 12 + 9 * level) - 1
                return entry & HPA & ~mask | gpa & mask | key
            table = entry & HPA | key
        raise AssertionError("unreachable")
