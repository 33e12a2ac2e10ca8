"""What attestation costs on this machine: functions for `softtdx bench attest`, each returning figures by name."""

from __future__ import annotations

import hashlib
import hmac
import importlib
from collections.abc import Callable
from http.client import HTTPConnection
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from softtdx.abi.structs import REPORT_TYPE_TDX, Attributes, TdReport
from softtdx.attest.pcs import PcsListener
from softtdx.attest.pki import Pki
from softtdx.attest.quoting import QuotingEnclave
from softtdx.attest.verifier import Verifier

__all__ = ["NOW", "bench_pcs", "bench_quote", "bench_verify", "sample_platform"]

NOW = 1_767_225_600
SEED = 1
KEY = b"softtdx bench report key"
MAC_AT = 224


def _mac(head: bytes) -> bytes:
    return hmac.new(KEY, head[:MAC_AT], hashlib.sha256).digest()


def sample_platform() -> tuple[Pki, QuotingEnclave, bytes]:
    """A PKI, its quoting enclave, and a TDREPORT that the enclave takes for its platform's."""
    pki = Pki.create(SEED)
    report = TdReport()
    report.tee_tcb_info.tee_tcb_svn = pki.options.tcb.tee_tcb_svn
    report.td_info.attributes = Attributes.SEPT_VE_DISABLE
    head = report.report_mac
    head.report_type.type, head.cpu_svn = REPORT_TYPE_TDX, pki.options.tcb.cpu_svn
    head.tee_tcb_info_hash = hashlib.sha384(report.tee_tcb_info.view).digest()
    head.tee_info_hash = hashlib.sha384(report.td_info.view).digest()
    head.mac = _mac(bytes(head))
    enclave = QuotingEnclave(pki, lambda found: hmac.compare_digest(_mac(found), found[MAC_AT:]))
    return pki, enclave, bytes(report)


def _seconds_per_call(call: Callable[[], object], calls: int) -> float:
    call()
    start = perf_counter()
    for _ in range(calls):
        call()
    return (perf_counter() - start) / calls


def bench_quote(calls: int = 1000) -> dict[str, float]:
    """`quotes_per_s`: TDREPORTs verified and turned into version 4 quotes, one after the other."""
    _, enclave, report = sample_platform()
    return {"quotes_per_s": 1 / _seconds_per_call(lambda: enclave.quote(report), calls)}


def bench_verify(calls: int = 300) -> dict[str, float]:
    """Milliseconds a verification, in the same run: ours with and without memory of its collateral, dcap-qvl's.

    `ratio` and `ratio_anew` are ours over dcap-qvl's.
    """
    dcap_qvl: Any = importlib.import_module("dcap_qvl")
    pki, enclave, report = sample_platform()
    quote, collateral, root = enclave.quote(report), pki.collateral(), pki.root_der
    theirs = dcap_qvl.QuoteCollateralV3.from_json(collateral.to_json())
    verifier = Verifier(root)
    verifier.verify(quote, collateral, now=NOW).require()
    ms = {
        "ours_ms": 1e3 * _seconds_per_call(lambda: verifier.verify(quote, collateral, now=NOW), calls),
        "ours_anew_ms": 1e3 * _seconds_per_call(lambda: Verifier(root).verify(quote, collateral, now=NOW), calls),
        "dcap_qvl_ms": 1e3 * _seconds_per_call(lambda: dcap_qvl.verify_with_root_ca(quote, theirs, root, NOW), calls),
    }
    ratios = {"ratio": ms["ours_ms"] / ms["dcap_qvl_ms"], "ratio_anew": ms["ours_anew_ms"] / ms["dcap_qvl_ms"]}
    return ms | ratios


def bench_pcs(calls: int = 1000) -> dict[str, float]:
    """`requests_per_s`: TCB info from the PCS over one HTTP connection, client and service in this process."""
    pki, _, _ = sample_platform()
    path = f"/tdx/certification/v4/tcb?fmspc={pki.options.tcb.fmspc.hex()}"
    with PcsListener(pki, port=0) as pcs:
        # The plainest client there is: one with more to offer takes longer than the service it asks.
        client = HTTPConnection(urlsplit(pcs.url).netloc)

        def ask() -> bytes:
            client.request("GET", path)
            return client.getresponse().read()

        try:
            return {"requests_per_s": 1 / _seconds_per_call(ask, calls)}
        finally:
            client.close()
