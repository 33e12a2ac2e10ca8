"""The host's memory management: the swap area, and the passes that a kernel's daemons make over all memory.

Each pass can be called; `start` has a thread call them, as kswapd, khugepaged and the NUMA scanner run.
"""

import threading
from typing import TYPE_CHECKING

from softtdx.kvm.khugepaged import Khugepaged
from softtdx.kvm.numa import NumaBalancing
from softtdx.kvm.swap import SwapArea

if TYPE_CHECKING:
    from softtdx.kvm.host import Host

__all__ = ["HostMm", "Kswapd"]

_LOW_WATERMARK = 64  # one in so many pages is to be free


class Kswapd:
    """Background reclaim: keep a share of the memory free, so that nobody has to wait for it."""

    def __init__(self, host: "Host") -> None:
        """Wakes up when fewer than `low` pages are free."""
        self._host = host
        self.low = host.memory.total_pages // _LOW_WATERMARK

    def scan(self) -> int:
        """One pass: reclaim what is missing to the watermark; returns how many pages came."""
        self._host.reap()
        missing = self.low - self._host.memory.free_pages
        return self._host.memory.reclaim(missing) if missing > 0 else 0


class HostMm:
    """What `Host.mm` is: `swap`, `kswapd`, `khugepaged` and `numa`."""

    def __init__(self, host: "Host", swap_pages: int) -> None:
        """No thread runs yet. Reclaim first asks page tables of guests, then user memory."""
        self._host = host
        self.swap = SwapArea(swap_pages)
        self.kswapd = Kswapd(host)
        self.khugepaged = Khugepaged(host)
        self.numa = NumaBalancing(host)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        host.memory.register_shrinker(self.shrink_page_tables)

    def shrink_page_tables(self, pages: int) -> int:
        """The shrinker over page tables and S-EPT pages that map nothing; returns how many were freed."""
        freed = 0
        for vm in list(self._host.vms):
            if freed >= pages:
                break
            if not vm.dead and not vm.closed:
                freed += vm.drop_empty_tables()
        return freed

    def start(self, interval: float) -> None:
        """Have a thread make all passes every `interval` seconds."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, args=(interval,), name="softtdx-mm", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def _run(self, interval: float) -> None:
        while not self._stop.wait(interval):
            self.kswapd.scan()
            self.khugepaged.scan()
            self.numa.scan()
