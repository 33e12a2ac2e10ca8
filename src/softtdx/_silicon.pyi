"""The Rust core's Python face: DRAM with MKTME-i, and one `Core` a logical processor.

Every physical address (`pa`) is 64 bits as software writes it: the KeyID stands in its top bits, below bit 52
(bits 51:52-keyid_bits), the DRAM address below them. Addresses and register values are unsigned.
"""

from collections.abc import Callable
from typing import Final

class SiliconFault(Exception):  # noqa: N818 - a fault is the architecture's word
    """An access the hardware refuses. `pa` is the address, KeyID included."""

    pa: int

class MachineCheck(SiliconFault):
    """#MC: poison was consumed (integrity failure of the line at `pa`)."""

class BusFault(SiliconFault):
    """The address has reserved bits set, or names a private KeyID outside SEAM mode (#PF with RSVD on hardware), or one
    without a key; or the access runs over the top of DRAM addresses, or a page operation is not page aligned.
    """

class VmFail(Exception):  # noqa: N818 - VMfail is the SDM's word
    """VMfailInvalid or VMfailValid. `error` is the VM-instruction error number, 0 for VMfailInvalid."""

    error: int

class Memory:
    """All DRAM of a platform, behind its memory-encryption engine.

    `ranges`: (base, size) of each DRAM range, 4 KiB aligned. Addresses outside read as all ones and drop writes.
    `integrity`: "crypto" (28-bit MAC and TD-owner bit), "logical" (TD-owner bit only) or "none".
    """

    def __init__(
        self,
        ranges: list[tuple[int, int]],
        *,
        keyid_bits: int,
        first_private_keyid: int,
        integrity: str = "crypto",
        tme: bool = True,
        seed: int = 0,
    ) -> None: ...
    # PCONFIG's and TME's part. A key is (data key, tweak key), 16 bytes each; None draws it from the seeded source.
    # A reprogrammed KeyID cannot read what its old key wrote. Without a key a shared KeyID behaves as KeyID 0, and a
    # private one refuses every access. ValueError: KeyID 0 (its key is TME's), or one that does not exist.
    def set_key(self, keyid: int, key: tuple[bytes, bytes] | None = None) -> None: ...
    def clear_key(self, keyid: int) -> None: ...
    def set_seamrr(self, base: int, size: int) -> None:
        """From now on a Host access to the range is aborted (reads all ones, writes dropped); Seam accesses pass."""
    # Accesses of an agent on the bus (host software, a device): seam=False may not name a private KeyID.
    def read(self, pa: int, size: int, seam: bool = False) -> bytes: ...
    def write(self, pa: int, data: bytes, seam: bool = False) -> None: ...
    def cas64(self, pa: int, old: int, new: int, seam: bool = False) -> int:
        """LOCK CMPXCHG: returns the value found; it was replaced if that equals `old`."""
    # What a probe on the memory bus sees and does; no KeyID in `pa`. Lengths and addresses are free.
    def raw_read(self, pa: int, size: int) -> bytes: ...
    def raw_write(self, pa: int, data: bytes) -> None: ...
    def raw_line(self, pa: int) -> tuple[bytes, int, bool, bool]:
        """(64 bytes of ciphertext, 28-bit MAC, TD-owner bit, poisoned) of the line at `pa`."""
    def raw_set_line(self, pa: int, data: bytes, mac: int, owner: bool) -> None:
        """Puts a line back as `raw_line` gave it (replay), or at another address (splice)."""
    def resident(self) -> int:
        """Bytes of DRAM that anything was ever written to, in whole chunks."""

class Core:
    """One logical processor: its register file, MSRs, TLB, current VMCS, and VMX non-root execution.

    One thread at a time uses a Core; `kick` alone may be called from any thread.
    """

    def __init__(self, memory: Memory, apic_id: int) -> None: ...
    seam: bool  # in SEAM root mode: private KeyIDs may be named, SEAM-only instructions work
    # --- loads and stores of this processor in root mode (BusFault, MachineCheck). Little endian.
    def rd8(self, pa: int) -> int: ...
    def rd16(self, pa: int) -> int: ...
    def rd32(self, pa: int) -> int: ...
    def rd64(self, pa: int) -> int: ...
    def wr8(self, pa: int, value: int) -> None: ...
    def wr16(self, pa: int, value: int) -> None: ...
    def wr32(self, pa: int, value: int) -> None: ...
    def wr64(self, pa: int, value: int) -> None: ...
    def read(self, pa: int, size: int) -> bytes: ...
    def write(self, pa: int, data: bytes) -> None: ...
    def cas64(self, pa: int, old: int, new: int) -> int:
        """LOCK CMPXCHG: returns the value found; it was replaced if that equals `old`."""
    def zero_page(self, pa: int, pages: int = 1) -> None:
        """MOVDIR64B of zeroes over whole 4 KiB pages: no read, sets the TD-owner bit by the KeyID's kind."""
    def copy_page(self, dst: int, src: int) -> None:
        """MOVDIR64B loop: 4 KiB from `src` to `dst`."""
    # --- what many loads and stores do, by one call
    def walk_ept(self, table: int, top: int, gpa: int, level: int) -> tuple[int, int, int]:
        """From the EPT page `table` (KeyID included), whose entries have level `top` (0 to 4), towards `level`.

        Returns (address of the entry, the entry, its level); ends early at one that does not lead on: it is not
        present, maps a page, withholds a right or is misconfigured.
        """
    def extend_sha384(self, pa: int, record: bytes, source: int = 0, size: int = 0) -> None:
        """Compresses `record` and then `size` bytes at `source` into the SHA-384 context at `pa`.

        The context: 64 bytes as of `sha384_init`, then the bytes taken in so far (64 bits). ValueError unless record
        and bytes together are whole 128-byte blocks, at most 1024 bytes.
        """
    # --- the register file that a guest runs on (VMX saves RIP, RSP, RFLAGS in the VMCS; software the others)
    # order: rax rcx rdx rbx rsp rbp rsi rdi r8..r15; RSP here is not used at VM entry (GUEST_RSP is)
    def gpr(self, index: int) -> int: ...
    def set_gpr(self, index: int, value: int) -> None: ...
    def gprs(self) -> tuple[int, ...]: ...
    def set_gprs(self, values: tuple[int, ...]) -> None: ...
    def load_gprs(self, pa: int) -> None:
        """16 registers from 128 bytes of memory, in the order above."""
    def store_gprs(self, pa: int) -> None: ...
    def xmm(self, index: int) -> int: ...
    def set_xmm(self, index: int, value: int) -> None: ...
    def xsave(self, pa: int, mask: int) -> None:
        """XSAVES (compacted) of the guest's extended state at `pa` (64-byte aligned)."""
    def xrstor(self, pa: int, mask: int) -> None: ...
    def xinit(self, mask: int) -> None: ...
    xcr0: int
    cr2: int
    cr8: int
    dr: list[int]  # DR0..DR3, DR6 (index 4); DR7 is in the VMCS. Assign the whole list.
    # --- MSRs this processor really has (those a guest reads and writes without an exit among them)
    def rdmsr(self, msr: int) -> int | None:
        """None: there is no such MSR."""
    def wrmsr(self, msr: int, value: int) -> None: ...
    def rdtsc(self) -> int:
        """TSC of this platform: virtual and deterministic unless `tsc_real`, see `configure`."""
    def advance_tsc(self, ticks: int) -> None:
        """The virtual TSC goes on by `ticks`: the host was idle. From any thread."""
    def set_host_timer(self, tsc: int | None) -> None:
        """The processor's own deadline timer: an external interrupt at this TSC value. None disarms it."""
    def configure(self, **options: int | bool) -> None:
        """What this processor is: `tsc_real`, `tsc_hz`, `tsc_per_1024` (virtual TSC ticks for 1024 instructions),
        `pa_bits`, `vmcs_revision`, `seed` (RDRAND), `cr4_valid`, `xcr0_valid`, `xss_valid`, `sample`
        (instructions from one entry of `samples()` to the next, 0 for none: its default); unknown names raise
        ValueError.
        """
    # --- VMX. Field encodings are the SDM's (Appendix B) and the TDX additions (shared EPTP 0x203C, HKID 0x4026).
    def vmclear(self, pa: int) -> None: ...
    def vmptrld(self, pa: int) -> None: ...
    def vmptrst(self) -> int: ...
    def vmread(self, field: int) -> int: ...
    def vmwrite(self, field: int, value: int) -> None: ...
    def vmenter(self, launch: bool) -> int:
        """VMLAUNCH/VMRESUME: runs the guest until a VM exit, GIL released; returns the exit reason (bits 15:0, bit 31
        set for a failed entry). The other exit fields are in the VMCS. Raises VmFail.

        Returns 0x10000 | n when the guest executed the escape instruction of hook n (see `allow_escape`): no VM exit
        took place, the guest state is live in this Core (`live_*`), and `vmcontinue` goes on.
        """
    def vmcontinue(self) -> int: ...
    def invept(self, kind: int, eptp: int) -> None: ...
    def invvpid(self, kind: int, vpid: int, gla: int) -> None: ...
    def kick(self) -> None:
        """An external interrupt for this processor: a guest running on it exits (reason 1) at the next boundary."""
    def nmi(self) -> None: ...
    def posted_interrupt(self) -> None:
        """The posted-interrupt notification vector arrived: a running guest takes its PIR without an exit."""
    # --- guests in Python: the escape instruction `0F B9 /r` (UD1) with modrm 0x05 and disp32 0x54445800|n
    def allow_escape(self, on: bool) -> None: ...
    def live_state(self) -> dict[str, int]: ...
    def set_live(self, name: str, value: int) -> None:
        """`name`: rip, rsp, rflags; GPRs by set_gpr."""
    def guest_read(self, gla: int, size: int) -> bytes:
        """Through the live guest's page tables and EPT without side effects; SiliconFault if it does not translate."""
    def guest_write(self, gla: int, data: bytes) -> None: ...
    # --- counters
    retired: int
    """Instructions retired in non-root mode: `counters()["instructions"]` for who asks at every entry. Read only."""
    def counters(self) -> dict[str, int]:
        """instructions, lookups, decoded, tlb_fills, exits, undefined (instructions that raised #UD for want of
        support), ... While the processor runs: as of its last exit or pause.
        """
    def samples(self) -> list[tuple[int, int]]:
        """(RIP, instructions) of the guests run since `configure(sample=n)`, the most first."""
    def undefined(self) -> list[str]:
        """The instructions, disassembled, that this interpreter could not do and so raised #UD (newest 100)."""
    trace: Callable[[str], None] | None

class LockWords:
    """Words of SEAM software's own data that processors change with LOCK-prefixed instructions, one for each key.

    Bit 0: held exclusively; bit 1: a mark; bits 63:2: the number of shared holders. 0 is a free word. What the mark
    means, and what to do about a word that is not free, is software's: it has `load` and `cas`. Keys are signed.
    """

    def __init__(self) -> None: ...
    def load(self, key: int) -> int: ...
    def cas(self, key: int, old: int, new: int) -> int:
        """LOCK CMPXCHG: returns the word found; it was replaced if that equals `old`."""
    def release(self, key: int, exclusive: bool) -> None:
        """Gives a word back; a mark stays. ValueError when it is not held in this mode."""
    def rows(self) -> dict[int, int]:
        """Every word that is not 0."""

class PamtPath:
    """Where the PAMT entries of a 1 GiB block begin, KeyID included: the one of 1 GiB, 512 of 2 MiB, 2^18 of 4 KiB."""

    def __init__(self, e1g: int, e2m: int, e4k: int) -> None: ...

class HeldLocks:
    """The words that one processor holds, in the order in which it took them."""

    def __init__(self, words: LockWords) -> None: ...
    def __len__(self) -> int: ...
    def entries(self) -> list[tuple[int, bool]]:
        """(key, exclusive) of each."""
    def take(self, key: int, exclusive: bool) -> bool:
        """Takes a word if it is 0, or for a shared hold if neither held exclusively nor marked; else does nothing."""
    def watch(self, key: int) -> None:
        """Begins to watch a word that is held (IndexError), and no other any more."""
    def take_watched(self, key: int) -> bool:
        """Takes a free word exclusively if nobody has had it since it was watched; the watch goes on. Else False."""
    def take_all(self, entries: list[tuple[int, bool]]) -> bool:
        """All of them or, when one cannot be taken, none."""
    def take_page(self, core: Core, pa: int, path: PamtPath, exclusive: bool) -> tuple[int, int] | None:
        """A PAMT walk to the 4 KiB entry of `pa` where nobody is in the way.

        Takes `pa` in 1 GiB | 2 and in 2 MiB | 1 shared and `pa` as asked; returns (address of the entry, its first
        quadword). None, with nothing taken: an entry above is not split (its type, bits 23:16, is not 0), a word is
        not free, or a load would fault.
        """
    def note(self, key: int, exclusive: bool) -> None:
        """Software took a word by `cas`."""
    def release(self, key: int, exclusive: bool) -> None:
        """Gives one back. IndexError when it is not in the list."""
    def release_to(self, count: int = 0) -> None:
        """Gives back, the last first, all but the first `count`."""

class Trial:
    """Instruction tests in bulk: a processor with one small 64-bit user-mode guest, outside any platform.

    A record has 1024 bytes, little endian: 16 registers (0; order as `Core.gprs`), RFLAGS (128), RIP (136; in: bytes of
    code), vector and error code (144, 148; 0x100 | exit reason if the guest left by no exception), CR2 (152), code
    (160; up to 64 bytes at 0x10000000, INT3 behind), checksum of the writable pages (224), instructions executed (232),
    an FXSAVE64 image (256), and the 256 bytes of data (768) around the boundary of the two writable pages at
    0x20000000. The third page there is read-only, the fourth missing.
    """

    def __init__(self) -> None: ...
    def run(self, records: bytes) -> bytes:
        """Each record executed until its first exception; ValueError if they are no whole number of records."""
    def undefined(self) -> list[str]:
        """As `Core.undefined`."""

def sha384_init() -> bytes:
    """The 64-byte SHA-384 chaining value at the start (SHA-512 words, big endian)."""

def sha384_blocks(state: bytes, data: bytes) -> bytes:
    """Compresses whole 128-byte blocks of `data` into `state`; the TDX module keeps the state in its TDCS."""

def sha384_final(state: bytes, length: int, tail: bytes = b"") -> bytes:
    """The 48-byte digest of `length` bytes already compressed (a multiple of 128) and `tail`."""

PAYLOADS: Final[dict[str, bytes]]
"""Guest programs built with this crate from native/guests: "launcher" (flat), "demo" (ELF64), ..."""
