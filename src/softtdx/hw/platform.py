"""The machine as its firmware hands it over: memory, KeyIDs, SEAMRR, logical processors, report key."""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import Lock
from typing import Final
from weakref import WeakSet

from softtdx._silicon import Memory
from softtdx.abi.msrs import (
    SEAMRR_BASE_CONFIGURED,
    SEAMRR_MASK_LOCK,
    SEAMRR_MASK_VALID,
    TME_ACTIVATE_ENABLE,
    TME_ACTIVATE_KEYID_BITS_SHIFT,
    TME_ACTIVATE_LOCK,
    TME_ACTIVATE_TDX_KEYID_BITS_SHIFT,
    Msr,
)
from softtdx.abi.structs import SysInfoTable
from softtdx.hw import watch
from softtdx.hw.caches import Caches
from softtdx.hw.description import PlatformDescription, preset
from softtdx.hw.dram import Dram
from softtdx.hw.events import EventStream
from softtdx.hw.isa import SeamSoftware
from softtdx.hw.lp import LogicalProcessor
from softtdx.hw.seamops import RandomSource, SeamOpsEngine

__all__ = ["Platform", "SeamRange"]

_MASK52 = (1 << 52) - 1
_TME_ALGORITHMS = 0xF << 48  # IA32_TME_ACTIVATE: the key algorithms that PCONFIG may use


class SeamRange:
    """SEAMRR and what is loaded in it.

    `loader` is the P-SEAMLDR, `module` the TDX module; either is None until it is installed.
    """

    def __init__(self, base: int, size: int) -> None:
        """An enabled, empty range."""
        self.base = base
        self.size = size
        self.enabled = True
        self.loader: SeamSoftware | None = None
        self.module: SeamSoftware | None = None
        self.shut_down = False

    def unbreakable_shutdown(self, *, to_loader: bool) -> None:
        """The SEAM software died (#MC, module panic): no SEAMCALL reaches it until the platform is reset."""
        self.module = None
        self.shut_down = True
        if to_loader:
            self.loader = None


_powered_on: "WeakSet[Platform]" = WeakSet()
_COLLECT_ABOVE: Final = 256 << 20  # bytes of DRAM


def _collect_forgotten_platforms() -> None:
    """Free the machines that nobody uses any more, if they may hold much.

    A machine's parts refer to each other, so only Python's cycle collector frees it, and that one counts objects: it
    does not see that a few of them hold a gigabyte of DRAM.
    """
    if sum(platform.memory.resident() for platform in list(_powered_on)) > _COLLECT_ABOVE:
        gc.collect()


class Platform:
    """One machine, powered on, with TME and SEAMRR set up by its firmware and all processors in VMX root mode."""

    def __init__(self, description: PlatformDescription | None = None) -> None:
        """Power on the machine that `description` (default: the preset "spr") describes."""
        _collect_forgotten_platforms()
        d = description or preset("spr")
        self.description = d
        self.memory = Memory(
            list(d.ram),
            keyid_bits=d.keyid_bits,
            first_private_keyid=d.first_private_keyid,
            integrity=d.integrity,
            tme=d.tme,
            seed=d.seed,
        )
        self.memory.set_seamrr(*d.seamrr)
        self.dram = Dram(self.memory, d.ram)
        self.caches = Caches(self.memory)
        self.events = EventStream()
        self.tsc = 0  # the furthest that any processor's TSC was seen at
        self.entropy = RandomSource(d.seed, "rdrand")
        self.seamops = SeamOpsEngine(RandomSource(d.seed, "report key").bytes(32), d.cpu_svn, self.entropy)
        self.seam = SeamRange(*d.seamrr)
        self.escapes: dict[int, Callable[[LogicalProcessor], None]] = {}
        self.lps = [LogicalProcessor(self, index) for index in range(d.lps)]
        self._key_lock = Lock()
        self._keys: dict[int, set[int]] = {}  # KeyID -> packages it is programmed on
        self._msrs = self._fixed_msrs()
        self.memory.write(self.seam.base, self._mcheck_table(), seam=True)
        _powered_on.add(self)

    def rdmsr(self, msr: int) -> int | None:
        """MSRs that the description or the platform's set-up fixes; None for the others."""
        return self._msrs.get(msr)

    def program_random_key(self, package: int, keyid: int) -> bool:
        """PCONFIG on `package`: a fresh random key for `keyid`. False when another PCONFIG is under way.

        Every package of the simulated machine keeps its own key table; they share one memory engine, whose key
        changes when the first package programs the KeyID anew.
        """
        if not self._key_lock.acquire(blocking=False):
            return False
        try:
            programmed = self._keys.setdefault(keyid, set())
            if not programmed or package in programmed:
                programmed.clear()
                self.memory.set_key(keyid)
            programmed.add(package)
        finally:
            self._key_lock.release()
        if self.events.active:
            self.events.publish("key", package, keyid=keyid)
        return True

    def write_back_caches(self, package: int) -> None:
        """IA32_WBNOINVDP: what is held as dirty goes to DRAM."""
        self.caches.write_back(package)
        if self.events.active:
            self.events.publish("cache_write_back", package)

    def after_load(
        self, address: int, size: int, act: Callable[[], None], *, skip: int = 0
    ) -> AbstractContextManager[None]:
        """While entered: `act` once, right behind a load of root-mode software that touches the DRAM range.

        `skip` loads of it are let pass first. This is how another processor's store lands between two loads, in the
        same place every time (see `hw.watch`).
        """
        return watch.after_load(self, address, size, act, skip)

    def release_escape(self, number: int) -> None:
        """Forget a hook of the escape instruction."""
        self.escapes.pop(number, None)

    def _fixed_msrs(self) -> dict[int, int]:
        d = self.description
        base, size = d.seamrr
        msrs = dict(d.msrs)
        private = (1 << d.keyid_bits) - d.first_private_keyid
        msrs[Msr.MKTME_KEYID_PARTITIONING] = private << 32 | (d.first_private_keyid - 1)
        msrs[Msr.TME_ACTIVATE] = (
            msrs.get(Msr.TME_ACTIVATE, _TME_ALGORITHMS) & ~(0xFF << TME_ACTIVATE_KEYID_BITS_SHIFT)
            | TME_ACTIVATE_LOCK
            | TME_ACTIVATE_ENABLE
            | d.keyid_bits << TME_ACTIVATE_KEYID_BITS_SHIFT
            | (private.bit_length() - 1) << TME_ACTIVATE_TDX_KEYID_BITS_SHIFT
        )
        msrs[Msr.SEAMRR_PHYS_BASE] = base | SEAMRR_BASE_CONFIGURED
        msrs[Msr.SEAMRR_PHYS_MASK] = _MASK52 & ~(size - 1) | SEAMRR_MASK_LOCK | SEAMRR_MASK_VALID
        return msrs

    def _mcheck_table(self) -> bytes:
        """What MCHECK verified of the machine and leaves at the base of SEAMRR for the loader: CMRs, processors."""
        d = self.description
        table = SysInfoTable()
        table.tot_num_lps, table.tot_num_sockets = d.lps, d.packages
        family = d.cpuid.get((1, None), (0, 0, 0, 0))[0]
        table.socket_cpuid_table = [family] * d.packages + [0] * (len(table.socket_cpuid_table) - d.packages)
        table.smrr2_not_supported = 1
        table.tdx_without_integrity = int(d.integrity != "crypto")
        for entry, (base, size) in zip(table.cmr_data, d.cmrs, strict=False):
            entry.base, entry.size = base, size
        return bytes(table)
