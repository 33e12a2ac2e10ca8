"""Fetches from a PCS or PCCS the collateral that goes with a quote."""

from __future__ import annotations

import json
from urllib.parse import unquote

import httpx

from softtdx.attest.chain import Cert, pck_extension, split_pem
from softtdx.attest.collateral import Collateral
from softtdx.attest.errors import CollateralError, ServiceUnavailableError
from softtdx.attest.quote import CERTIFICATION_PCK_CHAIN, Quote
from softtdx.attest.x509 import PROCESSOR_CA_CN

__all__ = ["fetch_collateral"]

TIMEOUT = 30.0
OK = 200
MAX_ANSWER = 1 << 20


def fetch_collateral(quote: bytes, url: str, *, client: httpx.Client | None = None) -> Collateral:
    """The collateral for the platform that made the quote, from the service at `url`.

    Raises `ServiceUnavailableError` when there is no answer, `CollateralError` when it is not what was asked for.
    """
    parsed = Quote.parse(quote)
    if parsed.signature.chain_type != CERTIFICATION_PCK_CHAIN:
        raise CollateralError("the quote carries no PCK chain, so it does not say which platform it is of")
    leaf = Cert(split_pem(parsed.signature.chain)[0])
    ca = "processor" if leaf.issuer_common_name == PROCESSOR_CA_CN else "platform"
    fmspc = pck_extension(leaf).fmspc.hex().upper()
    base = url.rstrip("/")
    with client or httpx.Client(timeout=TIMEOUT) as http:
        crl, crl_chain = _get(
            http, f"{base}/sgx/certification/v4/pckcrl?ca={ca}&encoding=der", "SGX-PCK-CRL-Issuer-Chain"
        )
        tcb, tcb_chain = _get(http, f"{base}/tdx/certification/v4/tcb?fmspc={fmspc}", "TCB-Info-Issuer-Chain")
        qe, qe_chain = _get(http, f"{base}/tdx/certification/v4/qe/identity", "SGX-Enclave-Identity-Issuer-Chain")
        root_crl, _ = _get(http, f"{base}/sgx/certification/v4/rootcacrl", None)
    tcb_info, tcb_signature = _signed(tcb, "tcbInfo")
    qe_identity, qe_signature = _signed(qe, "enclaveIdentity")
    return Collateral(
        pck_crl_issuer_chain=crl_chain,
        root_ca_crl=_unhex(root_crl),
        pck_crl=crl,
        tcb_info_issuer_chain=tcb_chain,
        tcb_info=tcb_info,
        tcb_info_signature=tcb_signature,
        qe_identity_issuer_chain=qe_chain,
        qe_identity=qe_identity,
        qe_identity_signature=qe_signature,
    )


def _get(http: httpx.Client, url: str, chain_header: str | None) -> tuple[bytes, str]:
    """The body, and the issuer chain that stands URL-encoded in the header named."""
    try:
        with http.stream("GET", url) as answer:
            if answer.status_code != OK:
                raise CollateralError(f"{url} answers {answer.status_code}")
            body = b""
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > MAX_ANSWER:
                    raise CollateralError(f"{url} answers with more than {MAX_ANSWER} bytes")
            chain = answer.headers.get(chain_header, "") if chain_header else ""
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServiceUnavailableError(f"no answer from {url}: {error}") from None
    if chain_header and not chain:
        raise CollateralError(f"{url} answers without the header {chain_header}")
    return body, unquote(chain)


def _signed(body: bytes, name: str) -> tuple[str, bytes]:
    """The object of that name exactly as it stands in the answer, for it is signed, and its signature."""
    try:
        text = body.decode()
        signature = bytes.fromhex(json.loads(text)["signature"])
        decoder = json.JSONDecoder()
        start = text.index("{", text.index(f'"{name}"'))
        _, end = decoder.raw_decode(text, start)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CollateralError(f"the service's {name} is not JSON of an object and its signature") from None
    return text[start:end], signature


def _unhex(body: bytes) -> bytes:
    """A CRL in hexadecimal, as the PCCS gives it, or in DER."""
    try:
        return bytes.fromhex(body.decode())
    except ValueError:
        return body
