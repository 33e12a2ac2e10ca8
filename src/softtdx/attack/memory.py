"""Attacks on memory: by the host's loads and stores, and by a probe on the DIMMs."""

from softtdx.attack.lab import Observation, Outcome, attack
from softtdx.attack.scene import LINE, PAGE, SECRET_GPA, SPARE_GPA, Scene, Seen, Victim
from softtdx.hw.faults import BusFault
from softtdx.vmm.python_guest import PythonGuest, Td

__all__: list[str] = []

_FORGED = b"the attacker's own idea of what should stand in this cache line"
_ORDINARY = "an ordinary VM, memory integrity off"
_BARE = "an ordinary VM on DIMMs without memory encryption"


@attack(
    "host-read",
    "memory",
    title="The host reads a private page",
    promise="A load with a shared KeyID from a line that a TD owns gives zeroes.",
    expected=Outcome.STOPPED,
    unprotected=_ORDINARY,
)
def host_read(scene: Scene) -> Observation:
    """The host knows which page it gave to the guest. It reads it, as its own memory, with KeyID 0."""

    def act(victim: Victim) -> Seen:
        data = scene.memory.read(victim.pa(), PAGE)
        return Seen(data, f"read {sum(1 for b in data if b)} bytes that are not zero")

    return scene.under_attack(act)


@attack(
    "host-read-every-keyid",
    "memory",
    title="The host reads a private page through every KeyID it may name",
    promise="Only SEAM mode may name a private KeyID; through any shared one a TD's line reads as zeroes.",
    expected=Outcome.STOPPED,
    unprotected=_ORDINARY,
)
def host_read_every_keyid(scene: Scene) -> Observation:
    """The host programs a key into each shared KeyID (PCONFIG) and reads the page through each."""

    def act(victim: Victim) -> Seen:
        d = scene.description
        for keyid in range(1, d.first_private_keyid):
            scene.memory.set_key(keyid)
        pages = [scene.memory.read(d.keyed(victim.pa(), keyid), PAGE) for keyid in range(d.first_private_keyid)]
        return Seen(b"".join(pages), f"read through {len(pages)} KeyIDs")

    return scene.under_attack(act)


@attack(
    "host-names-private-keyid",
    "memory",
    title="The host puts the TD's own KeyID into an address",
    promise="An address with a private KeyID is reserved outside SEAM mode: #PF with RSVD, no access takes place.",
    expected=Outcome.STOPPED,
    unprotected="an ordinary VM, whose KeyID 0 the host may name",
)
def host_names_private_keyid(scene: Scene) -> Observation:
    """The host writes page-table entries with each KeyID there is and reads the page through them."""

    def act(victim: Victim) -> Seen:
        d, refused, data = scene.description, 0, b""
        for keyid in range(1 << d.keyid_bits):
            try:
                data += scene.memory.read(d.keyed(victim.pa(), keyid), LINE)
            except BusFault:
                refused += 1
        return Seen(data, f"{refused} of {1 << d.keyid_bits} KeyIDs refused")

    return scene.under_attack(act)


@attack(
    "host-write-line",
    "memory",
    title="The host overwrites a line of a private page",
    promise="The line loses its TD-owner bit; the TD's next load of it takes a machine check and the TD is dead.",
    expected=Outcome.DETECTED,
    unprotected=_ORDINARY,
)
def host_write_line(scene: Scene) -> Observation:
    """The host stores a whole cache line over the secret with KeyID 0."""

    def act(victim: Victim) -> Seen:
        scene.memory.write(victim.pa(), _FORGED.ljust(LINE)[:LINE])
        return Seen(note="wrote 64 bytes with KeyID 0")

    return scene.under_attack(act)


@attack(
    "host-write-byte",
    "memory",
    title="The host changes one byte of a private page",
    promise="A partial store to a line that a TD owns poisons the line; the TD's next load takes a machine check.",
    expected=Outcome.DETECTED,
    unprotected=_ORDINARY,
)
def host_write_byte(scene: Scene) -> Observation:
    """The host stores one byte into the middle of the secret."""

    def act(victim: Victim) -> Seen:
        scene.memory.write(victim.pa() + 100, b"\x5a")
        return Seen(note="wrote 1 byte with KeyID 0")

    return scene.under_attack(act)


@attack(
    "host-write-shared-keyid",
    "memory",
    title="The host overwrites a private line under a key of its own",
    promise="Whatever shared KeyID wrote it, the line is no longer the TD's: machine check.",
    expected=Outcome.DETECTED,
    unprotected=_ORDINARY,
)
def host_write_shared_keyid(scene: Scene) -> Observation:
    """The host programs KeyID 5 and stores a line over the secret with it."""

    def act(victim: Victim) -> Seen:
        scene.memory.set_key(5)
        scene.memory.write(scene.description.keyed(victim.pa(), 5), bytes(LINE))
        return Seen(note="wrote 64 bytes with KeyID 5")

    return scene.under_attack(act)


@attack(
    "probe-read",
    "memory",
    title="A probe on the memory bus reads the DIMM",
    promise="DRAM holds AES-XTS ciphertext under a key that never leaves the processor.",
    expected=Outcome.STOPPED,
    unprotected=_BARE,
)
def probe_read(scene: Scene) -> Observation:
    """An interposer between processor and DIMM records what lies at the secret's address."""
    scene.bare_dram = True

    def act(victim: Victim) -> Seen:
        return Seen(scene.dram.read(victim.pa(), PAGE), "recorded 4 KiB of the bus")

    return scene.under_attack(act)


@attack(
    "cold-boot",
    "memory",
    title="The DIMMs are frozen, pulled and read elsewhere",
    promise="All of DRAM is ciphertext; without the processor's keys it is noise.",
    expected=Outcome.STOPPED,
    unprotected=_BARE,
)
def cold_boot(scene: Scene) -> Observation:
    """The attacker takes an image of all DRAM that was ever written and searches it for the secret."""
    scene.bare_dram = True

    def act(victim: Victim) -> Seen:
        # The secret's own neighbourhood stands for the whole image: the rest of it holds no secret on either side.
        start = victim.pa() & ~((1 << 21) - 1)
        image = scene.dram.read(start, 1 << 21)
        return Seen(image, f"searched an image of {len(image) >> 20} MiB around the page")

    return scene.under_attack(act)


@attack(
    "dimm-flip-one-bit",
    "memory",
    title="One bit of a private line flips in DRAM",
    promise="The line's 28-bit MAC does not fit any more: machine check before the data is used.",
    expected=Outcome.DETECTED,
    unprotected=_BARE,
)
def flip_one_bit(scene: Scene) -> Observation:
    """A fault (a particle, a voltage glitch) flips a single bit of the stored ciphertext."""
    scene.bare_dram = True

    def act(victim: Victim) -> Seen:
        scene.dram.flip_bits(victim.pa(), (77,))
        return Seen(note="flipped bit 77")

    return scene.under_attack(act)


@attack(
    "dimm-flip-two-bits",
    "memory",
    title="Two bits of a private line flip in DRAM",
    promise="A MAC is no parity: two flips do not cancel out.",
    expected=Outcome.DETECTED,
    unprotected=_BARE,
)
def flip_two_bits(scene: Scene) -> Observation:
    """Two bits of one line flip at once, which ECC that corrects single errors would let through."""
    scene.bare_dram = True

    def act(victim: Victim) -> Seen:
        scene.dram.flip_bits(victim.pa() + LINE, (3, 300))
        return Seen(note="flipped bits 3 and 300")

    return scene.under_attack(act)


@attack(
    "rowhammer",
    "memory",
    title="Rowhammer: a pattern of flips over the whole page",
    promise="Every line with a flip fails its MAC; the first load of one ends the TD.",
    expected=Outcome.DETECTED,
    unprotected=_BARE,
)
def rowhammer(scene: Scene) -> Observation:
    """Hammering neighbouring rows flips weak cells: here every ninth line of the page, in one to three bits."""
    scene.bare_dram = True

    def act(victim: Victim) -> Seen:
        lines = range(0, PAGE // LINE, 9)
        for n in lines:
            scene.dram.flip_bits(
                victim.pa() + n * LINE, tuple((n * 37 + k * 101) % (8 * LINE) for k in range(1 + n % 3))
            )
        return Seen(note=f"flips in {len(lines)} lines")

    return scene.under_attack(act)


@attack(
    "splice",
    "memory",
    title="A line of ciphertext is moved to another address of the same TD",
    promise="The address is part of the AES-XTS tweak and of the MAC: a moved line fails its MAC.",
    expected=Outcome.DETECTED,
    unprotected=_BARE,
)
def splice(scene: Scene) -> Observation:
    """The attacker copies line 1 of the page, ciphertext and MAC, over line 0."""
    scene.bare_dram = True

    def act(victim: Victim) -> Seen:
        scene.dram.splice(victim.pa() + LINE, victim.pa())
        return Seen(note="line 1 put over line 0, with its MAC")

    return scene.under_attack(act)


@attack(
    "replay",
    "memory",
    title="An old line of the TD is put back where it was",
    promise="None: MKTME-i has no freshness. A line recorded under the same key at the same address verifies again.",
    expected=Outcome.CORRUPTED,
    unprotected=_BARE,
)
def replay(scene: Scene) -> Observation:
    """An interposer records a line with its MAC, waits until the TD has written the secret, and puts the old one back.

    This is a limit of the real scheme: it keeps no counter tree, so a bus interposer that replays is not noticed.
    """
    scene.bare_dram = True

    def act(victim: Victim) -> Seen:
        td = victim.td
        current = td.read(SECRET_GPA, LINE)
        td.write(SECRET_GPA, bytes(LINE))
        old = scene.dram.record(victim.pa())
        td.write(SECRET_GPA, current)
        scene.dram.replay(old)
        return Seen(note="the line of before the last write was put back")

    return scene.under_attack(act)


@attack(
    "swap-pages",
    "memory",
    title="Two pages of a guest change places in DRAM",
    promise="Ciphertext and MAC are bound to the physical address: swapped pages fail at the first load.",
    expected=Outcome.DETECTED,
    unprotected=_BARE,
)
def swap_pages(scene: Scene) -> Observation:
    """A hostile DIMM answers with the lines of page B where page A is asked for, and the other way round."""
    scene.bare_dram = True

    def act(victim: Victim) -> Seen:
        victim.touch(SPARE_GPA)
        victim.td.write(SPARE_GPA, bytes(range(256)) * (PAGE // 256))
        scene.dram.swap(victim.pa(), victim.pa(SPARE_GPA), PAGE)
        return Seen(note="all lines of two pages swapped, MACs included")

    return scene.under_attack(act)


@attack(
    "splice-across",
    "memory",
    title="A line of one TD's ciphertext is moved over a line of another's",
    promise="Every TD has a key of its own: another TD's line fails its MAC, wherever it is put.",
    expected=Outcome.DETECTED,
    unprotected=_BARE,
)
def splice_across(scene: Scene) -> Observation:
    """An accomplice's guest wrote the line that the attacker wants the victim to read. An interposer moves it there."""
    scene.bare_dram = True
    place = 0

    def accomplice(td: Td) -> None:
        nonlocal place
        place = Victim(other, td, secret=_FORGED.ljust(PAGE)).pa()

    def act(victim: Victim) -> Seen:
        scene.dram.splice(place, victim.pa())
        return Seen(note="the accomplice's line put over the victim's, with its MAC")

    with PythonGuest(scene.host, accomplice, scene.config()) as other:
        other.run()
        return scene.under_attack(act)


@attack(
    "logical-read",
    "memory",
    title="The host reads a private page where integrity is logical only",
    promise="The TD-owner bit is there without MACs too: a load with a shared KeyID gives zeroes.",
    expected=Outcome.STOPPED,
    unprotected=_ORDINARY,
)
def logical_read(scene: Scene) -> Observation:
    """The same as `host-read`, on a platform that was set up with logical integrity."""
    scene.logical = True
    return host_read(scene)


@attack(
    "logical-write",
    "memory",
    title="The host overwrites a private line where integrity is logical only",
    promise="The line loses its TD-owner bit, MAC or not: the TD's next load of it is a machine check.",
    expected=Outcome.DETECTED,
    unprotected=_ORDINARY,
)
def logical_write(scene: Scene) -> Observation:
    """The same as `host-write-line`, on a platform that was set up with logical integrity."""
    scene.logical = True
    return host_write_line(scene)


@attack(
    "logical-flip",
    "memory",
    title="A bit flips in DRAM where integrity is logical only",
    promise="None: without a MAC nobody notices. The flip decrypts to sixteen bytes of noise.",
    expected=Outcome.CORRUPTED,
    unprotected=_BARE,
)
def logical_flip(scene: Scene) -> Observation:
    """The same as `dimm-flip-one-bit`. Logical integrity is against software, not against who reaches the DIMMs."""
    scene.logical = True
    return flip_one_bit(scene)
