"""The provisioning certification service of a simulated platform over HTTP: the API of Intel's PCS and PCCS, v4.

Intel "PCS API documentation" v4 for paths, parameters and headers; the PCCS differs in giving the root CA CRL in
hexadecimal at `/sgx/certification/v4/rootcacrl`, and both ways are here. Every answer is made when the service starts.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from urllib.parse import quote as url_quote

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from softtdx.attest.http_service import HttpListener
from softtdx.attest.keys import sign_raw
from softtdx.attest.pki import Pki
from softtdx.attest.tcb import timestamp
from softtdx.attest.tls import TlsFiles

__all__ = ["DEFAULT_PORT", "PcsListener", "make_app"]

DEFAULT_PORT = 8081

SGX, TDX = "/sgx/certification/v4", "/tdx/certification/v4"
JSON, DER, PEM = "application/json", "application/pkix-crl", "application/x-pem-file"
UPDATES = ("standard", "early")


class _Api:
    """The answers, by what was asked."""

    def __init__(self, pki: Pki) -> None:
        self.pki = pki
        self.fmspc = pki.options.tcb.fmspc.hex().upper()
        chain = url_quote(pki.tcb_issuer_chain)
        self.tcb = _answer(pki.tcb_info_response(), JSON, {"TCB-Info-Issuer-Chain": chain})
        self.qe = _answer(pki.qe_identity_response(), JSON, {"SGX-Enclave-Identity-Issuer-Chain": chain})
        self.numbers = _answer(_evaluation_numbers(pki), JSON, {"TCB-Evaluation-Data-Numbers-Issuer-Chain": chain})
        self.crls = {
            (ca, encoding): _answer(
                crl if encoding == "der" else _crl_pem(crl),
                DER if encoding == "der" else PEM,
                {"SGX-PCK-CRL-Issuer-Chain": url_quote(pki.pck_crl_issuer_chain(ca))},
            )
            for ca, crl in pki.pck_crls.items()
            for encoding in ("der", "pem")
        }

    async def tcb_info(self, request: Request) -> Response:
        """TCB info for an FMSPC."""
        fmspc = _hex_parameter(request, "fmspc", 6)
        self._check_edition(request)
        if fmspc != self.fmspc:
            raise HTTPException(404, f"no TCB info for FMSPC {fmspc}; this platform's is {self.fmspc}")
        return _copy(self.tcb)

    async def qe_identity(self, request: Request) -> Response:
        """The TD quoting enclave's identity."""
        self._check_edition(request)
        return _copy(self.qe)

    async def evaluation_numbers(self, _: Request) -> Response:
        """Which TCB evaluation data sets there are: one."""
        return _copy(self.numbers)

    async def pck_crl(self, request: Request) -> Response:
        """The CRL of one of the PCK CAs."""
        ca, encoding = request.query_params.get("ca", ""), request.query_params.get("encoding", "pem")
        if (ca, encoding) not in self.crls:
            raise HTTPException(400, "ca is platform or processor, encoding is pem or der")
        return _copy(self.crls[ca, encoding])

    async def root_crl_hex(self, _: Request) -> Response:
        """The root CA's CRL, as the PCCS gives it."""
        return Response(self.pki.root_crl.hex(), media_type=DER)

    async def root_crl(self, _: Request) -> Response:
        """The root CA's CRL where certificates say it is."""
        return Response(self.pki.root_crl, media_type=DER)

    async def pck_certificate(self, request: Request) -> Response:
        """The PCK certificate for the platform's TCB."""
        self._check_platform(request)
        return Response(
            self.pki.pck_chain.partition("-----END CERTIFICATE-----\n")[0] + "-----END CERTIFICATE-----\n",
            media_type=PEM,
            headers=self._pck_headers() | {"SGX-TCBm": self._tcbm()},
        )

    async def pck_certificates(self, request: Request) -> Response:
        """All PCK certificates of the platform: there is one."""
        self._check_platform(request)
        tcb = self.pki.options.tcb
        levels = {f"sgxtcbcomp{index:02}svn": svn for index, svn in enumerate(tcb.cpu_svn, 1)}
        leaf = self.pki.pck.public_bytes(serialization.Encoding.PEM).decode()
        entry = {"tcb": levels | {"pcesvn": tcb.pce_svn}, "tcbm": self._tcbm(), "cert": url_quote(leaf)}
        return Response(json.dumps([entry]), media_type=JSON, headers=self._pck_headers())

    async def fmspcs(self, _: Request) -> Response:
        """The platforms there is TCB info for."""
        return Response(json.dumps([{"fmspc": self.fmspc, "platform": "SoftTDX"}]), media_type=JSON)

    def _check_edition(self, request: Request) -> None:
        parameters = request.query_params
        number = self.pki.options.vary.evaluation_data_number
        if "update" in parameters and "tcbEvaluationDataNumber" in parameters:
            raise HTTPException(400, "give update or tcbEvaluationDataNumber, not both")
        if parameters.get("update", "standard") not in UPDATES:
            raise HTTPException(400, "update is standard or early")
        wanted = parameters.get("tcbEvaluationDataNumber", str(number))
        if not wanted.isdecimal():
            raise HTTPException(400, "tcbEvaluationDataNumber is a number")
        if wanted != str(number):
            raise HTTPException(404, f"there is only the data set {number}")

    def _check_platform(self, request: Request) -> None:
        parameters, tcb = request.query_params, self.pki.options.tcb
        if "encrypted_ppid" not in parameters and "qeid" not in parameters:
            raise HTTPException(400, "encrypted_ppid or qeid is missing")
        if _hex_parameter(request, "pceid", 2) != tcb.pce_id.hex().upper():
            raise HTTPException(404, "no PCK certificate for that pceid")
        qe_id = parameters.get("qeid", self.pki.ids.qe_id.hex())
        if qe_id.lower() != self.pki.ids.qe_id.hex():
            raise HTTPException(404, "no PCK certificate for that qeid")

    def _tcbm(self) -> str:
        tcb = self.pki.options.tcb
        return (tcb.cpu_svn + tcb.pce_svn.to_bytes(2, "little")).hex().upper()

    def _pck_headers(self) -> dict[str, str]:
        return {
            "SGX-PCK-Certificate-Issuer-Chain": url_quote(self.pki.pck_crl_issuer_chain()),
            "SGX-PCK-Certificate-CA-Type": self.pki.options.ca,
            "SGX-FMSPC": self.fmspc,
        }


def _answer(body: str | bytes, media_type: str, headers: Mapping[str, str]) -> Response:
    return Response(body, media_type=media_type, headers=dict(headers))


def _copy(response: Response) -> Response:
    """A response of its own, so that no middleware adds to the one all get."""
    return Response(bytes(response.body), headers=dict(response.headers))


def _crl_pem(der: bytes) -> bytes:
    return x509.load_der_x509_crl(der).public_bytes(serialization.Encoding.PEM)


def _evaluation_numbers(pki: Pki) -> str:
    options = pki.options
    number, date = options.vary.evaluation_data_number, timestamp(options.issued)
    entry = {"tcbEvaluationDataNumber": number, "tcbRecoveryEventDate": date, "tcbDate": date}
    text = json.dumps(
        {
            "id": "TDX",
            "version": 1,
            "issueDate": date,
            "nextUpdate": json.loads(pki.tcb_info[0])["nextUpdate"],
            "tcbEvalNumbers": [entry],
        },
        separators=(",", ":"),
    )
    signature = sign_raw(pki.keys["tcb"], text.encode()).hex()
    return f'{{"tcbEvaluationDataNumbers":{text},"signature":"{signature}"}}'


def _hex_parameter(request: Request, name: str, size: int) -> str:
    value = request.query_params.get(name, "")
    try:
        data = bytes.fromhex(value)
    except ValueError:
        data = b""
    if len(data) != size or len(value) != 2 * size:
        raise HTTPException(400, f"{name} is {2 * size} hexadecimal digits")
    return value.upper()


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(error.detail, error.status_code, {"Request-ID": secrets.token_hex(16)})


def make_app(pki: Pki) -> Starlette:
    """The service as an ASGI application."""
    api = _Api(pki)
    routes = {
        f"{TDX}/tcb": api.tcb_info,
        f"{TDX}/qe/identity": api.qe_identity,
        f"{TDX}/tcbevaluationdatanumbers": api.evaluation_numbers,
        f"{SGX}/pckcrl": api.pck_crl,
        f"{SGX}/rootcacrl": api.root_crl_hex,
        f"{SGX}/pckcert": api.pck_certificate,
        f"{SGX}/pckcerts": api.pck_certificates,
        f"{SGX}/fmspcs": api.fmspcs,
        "/IntelSGXRootCA.der": api.root_crl,
    }
    return Starlette(
        routes=[Route(path, endpoint, methods=["GET"]) for path, endpoint in routes.items()],
        exception_handlers={HTTPException: _refuse},
    )


class PcsListener(HttpListener):
    """The service on a TCP port."""

    def __init__(
        self, pki: Pki, host: str = "127.0.0.1", port: int = DEFAULT_PORT, tls: TlsFiles | None = None
    ) -> None:
        super().__init__(make_app(pki), "PCS", host, port, tls)
