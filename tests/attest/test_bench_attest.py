"""The benchmark functions work and give the figures they promise; how large those are is not tested."""

from __future__ import annotations

from softtdx.attest.bench import bench_pcs, bench_quote, bench_verify


def test_each_benchmark_gives_its_figures() -> None:
    assert bench_quote(3)["quotes_per_s"] > 0
    assert set(bench_verify(3)) == {"ours_ms", "ours_anew_ms", "dcap_qvl_ms", "ratio", "ratio_anew"}
    assert bench_pcs(3)["requests_per_s"] > 0
