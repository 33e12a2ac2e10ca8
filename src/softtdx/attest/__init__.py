"""Attestation: TDREPORT, quotes, the simulated PKI, collateral, event logs, verification.

What is where, lowest first:

    wire, der, keys, x509, sgx_extension   how bytes, keys and certificates are made and read
    tdreport, quote                        TDREPORT_STRUCT; quotes v4 and v5
    tcb, pki, store, collateral            what a platform's PKI says of it, and what a verifier is given
    quoting, getquote, qgs                 the quoting enclave: TDREPORT -> quote; GetQuote's buffer; the QGS protocol
    chain, appraisal, policy, verifier     our own verifier: certificates, TCB levels, what a user asks, the verdict
    dcap                                   dcap-qvl, the independent verifier that comes with the project
    pcs, pcs_client, http_service, tls     collateral over HTTP
    guest_api, guest_client                a TD's own interfaces, for programs outside one and inside
    eventlog, measure, tdvf                measured boot: logs, and reference values ahead of time
    inspection, bench                      files of unknown kind decoded; figures
"""

from softtdx.attest.collateral import Collateral as Collateral
from softtdx.attest.dcap import DcapRejectedError as DcapRejectedError
from softtdx.attest.dcap import DcapVerdict as DcapVerdict
from softtdx.attest.dcap import verify_with_dcap_qvl as verify_with_dcap_qvl
from softtdx.attest.errors import CollateralError as CollateralError
from softtdx.attest.errors import MalformedError as MalformedError
from softtdx.attest.errors import PkiError as PkiError
from softtdx.attest.errors import QuotingError as QuotingError
from softtdx.attest.pki import Pki as Pki
from softtdx.attest.pki import PkiOptions as PkiOptions
from softtdx.attest.policy import Policy as Policy
from softtdx.attest.policy import PolicyError as PolicyError
from softtdx.attest.quote import BodyType as BodyType
from softtdx.attest.quote import Quote as Quote
from softtdx.attest.quoting import QuotingEnclave as QuotingEnclave
from softtdx.attest.tcb import PlatformTcb as PlatformTcb
from softtdx.attest.tcb import TcbStatus as TcbStatus
from softtdx.attest.tcb import TcbVariation as TcbVariation
from softtdx.attest.tdreport import TdReport as TdReport
from softtdx.attest.tdreport import parse_tdreport as parse_tdreport
from softtdx.attest.verifier import Verdict as Verdict
from softtdx.attest.verifier import VerificationError as VerificationError
from softtdx.attest.verifier import Verifier as Verifier
