"""SEAMOPS: the SEAM-mode services of the processor itself, around the platform's report key.

The report key never leaves this file. REPORTMACSTRUCT and TEE_TCB_INFO are written by "hardware" here, so that
neither the TDX module nor a host can invent them (SDM vol. 3D, SEAMOPS; TDX module base specification, chapter
"Measurement and attestation").
"""

import hashlib
import hmac
import struct
from dataclasses import dataclass
from enum import IntEnum

from softtdx.hw.faults import GeneralProtection

__all__ = ["REPORT_MAC_SIZE", "SeamDbEntry", "SeamIdentity", "SeamOpsEngine", "SeamOpsLeaf", "SeamOpsStatus"]

REPORT_MAC_SIZE = 256
TEE_TCB_INFO_SIZE = 239
_MAC_AT = 224
_TEE_TCB_INFO_VALID = 0x3_01FF  # which TEE_TCB_INFO fields a TDX 1.5 processor fills in


class SeamOpsLeaf(IntEnum):
    """The leaf in RAX."""

    CAPABILITIES = 0
    SEAMREPORT = 1
    SEAMDB_CLEAR = 2
    SEAMDB_INSERT = 3
    SEAMDB_GETREF = 4
    SEAMDB_REPORT = 5
    SEAMVERIFYREPORT = 6


class SeamOpsStatus(IntEnum):
    """What a leaf leaves in RAX."""

    SUCCESS = 0
    INPUT_ERROR = 1
    ENTROPY_ERROR = 2
    DATABASE_ERROR = 3
    CPUSVN_ERROR = 4
    REPORTMACSTRUCT_ERROR = 5


@dataclass(frozen=True)
class SeamIdentity:
    """What SEAMEXTEND recorded of the module that the loader installed."""

    tee_tcb_svn: bytes  # 16
    mrseam: bytes  # 48
    mrsigner: bytes  # 48, zero for the platform vendor's own signer
    attributes: int  # 64 bits


@dataclass(frozen=True)
class SeamDbEntry:
    """One generation of the SEAM database: lets a TD's report name the module that it was started under."""

    identity: SeamIdentity
    nonce: bytes  # 32


class SeamOpsEngine:
    """The report key, the SEAM database and the reports made from them; one for the platform."""

    def __init__(self, report_key: bytes, cpu_svn: bytes, random: "RandomSource") -> None:
        """`report_key` is 32 bytes; `cpu_svn` 16; `random` is asked for nonces."""
        self._key = report_key
        self._cpu_svn = cpu_svn
        self._random = random
        self._current: SeamIdentity | None = None
        self._database: list[SeamDbEntry] = []

    @property
    def identity(self) -> SeamIdentity | None:
        """The module now installed, as SEAMEXTEND has it."""
        return self._current

    def capabilities(self) -> int:
        """CAPABILITIES: a bit for each leaf that exists."""
        return sum(1 << leaf for leaf in SeamOpsLeaf)

    def seamextend(self, identity: SeamIdentity) -> None:
        """Record the measured module; only the loader issues it."""
        self._current = identity

    def database_clear(self) -> None:
        """SEAMDB_CLEAR: forget every generation."""
        self._database.clear()

    def database_insert(self) -> None:
        """SEAMDB_INSERT: the current module becomes a new generation."""
        if self._current is None:
            raise GeneralProtection("SEAMDB_INSERT with no module measured")
        self._database.append(SeamDbEntry(self._current, self._random.bytes(32)))

    def database_reference(self) -> tuple[int, bytes, int] | None:
        """SEAMDB_GETREF: (index of the last entry, its nonce, size of the database); None when it is empty."""
        if not self._database:
            return None
        return len(self._database) - 1, self._database[-1].nonce, len(self._database)

    def report(
        self,
        report_type: bytes,
        report_data: bytes,
        tee_info_hash: bytes,
        reference: tuple[int, bytes] | None = None,
    ) -> tuple[SeamOpsStatus, bytes]:
        """SEAMREPORT, or SEAMDB_REPORT when `reference` (index, nonce) is given.

        Returns the status and 495 bytes: REPORTMACSTRUCT (256) then TEE_TCB_INFO (239). The identity reported is
        that of the database entry; TEE_TCB_SVN2 is the current module's.
        """
        if self._current is None or len(report_type) != 4 or len(report_data) != 64 or len(tee_info_hash) != 48:
            return SeamOpsStatus.INPUT_ERROR, b""
        identity = self._current
        if reference is not None:
            index, nonce = reference
            if not 0 <= index < len(self._database) or self._database[index].nonce != nonce:
                return SeamOpsStatus.DATABASE_ERROR, b""
            identity = self._database[index].identity
        info = (
            struct.pack("<Q", _TEE_TCB_INFO_VALID)
            + identity.tee_tcb_svn
            + identity.mrseam
            + identity.mrsigner
            + struct.pack("<Q", identity.attributes)
            + self._current.tee_tcb_svn
        ).ljust(TEE_TCB_INFO_SIZE, b"\0")
        head = (
            report_type
            + bytes(12)
            + self._cpu_svn
            + hashlib.sha384(info).digest()
            + tee_info_hash
            + report_data
            + bytes(32)
        )
        return SeamOpsStatus.SUCCESS, head + self._mac(head) + info

    def verify(self, report_mac: bytes) -> SeamOpsStatus:
        """SEAMVERIFYREPORT: was this REPORTMACSTRUCT made on this platform, at this CPUSVN?"""
        if len(report_mac) != REPORT_MAC_SIZE:
            return SeamOpsStatus.INPUT_ERROR
        if report_mac[16:32] != self._cpu_svn:
            return SeamOpsStatus.CPUSVN_ERROR
        if not hmac.compare_digest(report_mac[_MAC_AT:], self._mac(report_mac[:_MAC_AT])):
            return SeamOpsStatus.REPORTMACSTRUCT_ERROR
        return SeamOpsStatus.SUCCESS

    def _mac(self, head: bytes) -> bytes:
        return hmac.new(self._key, head, hashlib.sha256).digest()


class RandomSource:
    """The platform's entropy: deterministic for a seed, so that two runs report the same."""

    def __init__(self, seed: int, purpose: str) -> None:
        """One independent stream for each (seed, purpose)."""
        self._state = hashlib.sha256(f"softtdx entropy {seed} {purpose}".encode()).digest()

    def bytes(self, count: int) -> bytes:
        """The next `count` bytes (SHAKE-256, ratcheted)."""
        output = hashlib.shake_256(self._state).digest(count + 32)
        self._state = output[:32]
        return output[32:]

    def u64(self) -> int:
        """The next 64-bit word: what RDRAND and RDSEED give."""
        return int.from_bytes(self.bytes(8), "little")
