"""NP-SEAMLDR: the non-persistent loader, an authenticated code module that lives for one launch.

The boot processor runs it by GETSEC[ENTERACCS] while the other processors wait. It checks what the platform's
firmware set up and puts the persistent loader into SEAMRR. (Facts: Intel TDX loader interface specification,
NP-SEAMLDR.)
"""

from threading import Lock

from softtdx.abi.msrs import SEAMRR_BASE_CONFIGURED, SEAMRR_MASK_LOCK, SEAMRR_MASK_VALID, Msr
from softtdx.abi.status import SeamldrStatus
from softtdx.hw import Platform
from softtdx.seamldr.p_seamldr import PSeamldr
from softtdx.seamldr.release import trusted_signer

__all__ = ["launch_np_seamldr"]

_SEAMRR_ACTIVE = SEAMRR_MASK_LOCK | SEAMRR_MASK_VALID
_MIN_SEAMRR = 32 << 20
_LAUNCHING = Lock()  # GETSEC[ENTERACCS] is exclusive on a machine; this process may simulate several


def launch_np_seamldr(platform: Platform, lp: int = 0, signer: bytes | None = None) -> int:
    """GETSEC[ENTERACCS] of the NP-SEAMLDR on processor `lp`; returns what it leaves in R9/RAX.

    `signer`: SHA-384 of the modulus of the only module signer to trust, by default this build's development key.

    SeamldrStatus in order of checking: EMODBUSY a P-SEAMLDR is already there; ELDRINPROG another launch is under way;
    EBADPLATF no TDX private KeyIDs; EBADRANGE SEAMRR is not configured, locked and large enough.
    """
    if platform.seam.loader is not None:
        return SeamldrStatus.EMODBUSY
    if not _LAUNCHING.acquire(blocking=False):
        return SeamldrStatus.ELDRINPROG
    try:
        processor = platform.lps[lp]
        if processor.rdmsr(Msr.MKTME_KEYID_PARTITIONING) >> 32 == 0:
            return SeamldrStatus.EBADPLATF
        base = processor.rdmsr(Msr.SEAMRR_PHYS_BASE)
        mask = processor.rdmsr(Msr.SEAMRR_PHYS_MASK)
        if not base & SEAMRR_BASE_CONFIGURED or mask & _SEAMRR_ACTIVE != _SEAMRR_ACTIVE:
            return SeamldrStatus.EBADRANGE
        if platform.seam.size < _MIN_SEAMRR:
            return SeamldrStatus.EBADRANGE
        platform.seam.loader = PSeamldr(
            platform.seam, acm_apic_id=processor.apic_id, signer=trusted_signer() if signer is None else signer
        )
        return SeamldrStatus.SUCCESS
    finally:
        _LAUNCHING.release()
