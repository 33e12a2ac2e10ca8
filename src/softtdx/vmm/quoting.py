"""The quoting service beside the VMM: this platform's quoting enclave and PKI, reached by GetQuote."""

from softtdx.attest.pki import Pki
from softtdx.attest.quoting import QuotingEnclave
from softtdx.attest.tcb import PlatformTcb
from softtdx.hw import Platform
from softtdx.hw.seamops import SeamOpsStatus

__all__ = ["QuotingService", "platform_pki"]


def platform_pki(platform: Platform) -> Pki:
    """The PKI of a simulated platform, the same for the same seed; its TCB is what TDREPORTs of the platform say."""
    identity = platform.seamops.identity
    default = PlatformTcb()
    tcb = PlatformTcb(
        cpu_svn=platform.description.cpu_svn,
        tee_tcb_svn=identity.tee_tcb_svn if identity else default.tee_tcb_svn,
        mr_signer_seam=identity.mrsigner if identity else default.mr_signer_seam,
        seam_attributes=(identity.attributes if identity else 0).to_bytes(8, "little"),
    )
    return Pki.create(platform.description.seed, tcb=tcb)


class QuotingService:
    """Makes quotes of this platform's TDREPORTs, and keeps the last report and quote for the VMM's own report."""

    def __init__(self, platform: Platform, pki: Pki | None = None, *, asynchronous: bool = False) -> None:
        """With the platform's own PKI unless another is given.

        `asynchronous`: requests stay in flight while the TD runs on, as on a real host; then when a quote is there
        differs from run to run.
        """
        seamops = platform.seamops
        self.pki = pki or platform_pki(platform)
        self._enclave = QuotingEnclave(self.pki, lambda mac: seamops.verify(mac) is SeamOpsStatus.SUCCESS)
        self.asynchronous = asynchronous
        self.last_report: bytes | None = None
        self.last_quote: bytes | None = None

    def quote(self, tdreport: bytes) -> bytes:
        """A quote of a TDREPORT (1024 bytes). SoftTdxError when it is not this platform's."""
        quote = self.sign(tdreport)
        self.last_report, self.last_quote = bytes(tdreport), quote
        return quote

    def sign(self, tdreport: bytes) -> bytes:
        """The same without keeping it: for who asks beside the guest."""
        return self._enclave.quote(tdreport)
