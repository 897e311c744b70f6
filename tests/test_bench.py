"""Every workload of the benchmarks on every backend against the reference, and what becomes of the measurements."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from compare import assert_agrees, assert_same_bits

import hotloops as hl
from hotloops import bench
from hotloops.bench import peaks, report, runner
from hotloops.bench.inputs import MissingExtra

pytest.importorskip("sklearn")
WORKLOADS = bench.workloads()
SMALL = [w for w in WORKLOADS.values() if w.name in ("conv3x3_n32_1x28_8", "maxpool2x2s2_n8_64x112", "nms_1000")]


@pytest.mark.parametrize("name", WORKLOADS)
def test_workload(name, host_backend):
    workload = WORKLOADS[name]
    inputs = workload.make(small=True)
    before = {key: array.copy() for key, array in inputs.items()}
    with hl.backend("reference"):
        expected, _ = runner.traced(lambda: workload.call(hl, inputs))
    with hl.backend(host_backend):
        actual, choices = runner.traced(lambda: workload.call(hl, inputs))
    assert choices, "no kernel ran"
    assert {c.backend for c in choices} == {host_backend}
    assert_agrees(actual, expected, choices, name)
    for key, array in inputs.items():
        assert_same_bits(array, before[key], f"{name}, {key} (an input)")


@pytest.mark.parametrize("name", [w.name for w in WORKLOADS.values() if w.quick])
def test_quick_workload_at_its_size(name):
    """The inputs that are timed are the same every time, finite, and what the fastest backend makes of them is right."""
    workload = WORKLOADS[name]
    inputs, again = workload.make(), workload.make()
    for key, array in inputs.items():
        assert np.isfinite(array).all()
        assert_same_bits(array, again[key], key)
    actual, choices = runner.traced(lambda: workload.call(hl, inputs))
    with hl.backend("reference"):
        assert_agrees(actual, workload.call(hl, inputs), choices, name)


def test_workloads_are_complete():
    assert {w.family for w in WORKLOADS.values()} == {"conv", "pool", "rnn", "attention", "boxes"}
    for workload in WORKLOADS.values():
        assert callable(getattr(hl, workload.op)), workload.op
        assert "{" not in workload.shape()
        assert all(small <= workload.sizes[name] for name, small in workload.small_sizes.items())
    assert {w.family for w in WORKLOADS.values() if w.quick} == {w.family for w in WORKLOADS.values()}


def test_unknown_photographs_name_the_extra(monkeypatch):
    from hotloops.bench import inputs

    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    inputs.photographs.cache_clear()
    with pytest.raises(MissingExtra, match=r"hotloops\[bench\]"):
        inputs.photographs()


@pytest.fixture(scope="module")
def found():
    return bench.run(SMALL, threads=[1, 2], seconds=0.01, small=True)


def test_run(found):
    backends = runner.usable_backends()
    assert not found.failures
    assert [(r.name, r.backend, r.threads) for r in found.results] == [
        (w.name, b, t) for t in (1, 2) for w in SMALL for b in backends
    ]
    for r in found.results:
        assert r.agrees and r.ms > 0 and r.calls > 0 and r.kernels
        assert r.speedup == found.find(r.name, "reference", r.threads).ms / r.ms
        assert (r.share is None) == r.name.startswith("nms")
    for threads in ("1", "2"):
        assert 0 < found.peaks[threads]["memory"] and 0 < found.peaks[threads]["gflops"]


def test_flops_and_bytes_come_from_the_records(found):
    r = found.find("conv3x3_n32_1x28_8", "reference", 1)
    assert r.flops == 2 * (2 * 8 * 15 * 15) * 9
    assert r.bytes == 4 * (2 * 15 * 15 + 8 * 9 + 8 + 2 * 8 * 15 * 15)


def test_a_workload_that_raises_is_shown(found):
    def broken(hl, inputs):
        raise ZeroDivisionError("by zero")

    result = bench.run([dataclasses.replace(SMALL[0], call=broken)], backends=["reference"], seconds=0.01, small=True)
    assert not result.results
    assert result.failures[0].reason == "ZeroDivisionError: by zero"


def test_a_wrong_result_is_shown():
    def wrong(hl, inputs):
        y = hl.conv2d(inputs["x"], inputs["w"], inputs["b"], 1, 1)
        return y if hl.explain(hl.softmax, np.zeros(2)).backend == "reference" else y + 1

    result = bench.run([dataclasses.replace(SMALL[0], call=wrong)], seconds=0.01, small=True)
    assert {r.backend for r in result.results if r.agrees} == {"reference"}


def test_difference():
    a = np.array([1.0, -4.0, np.nan, np.inf], np.float32)
    assert runner.difference([a], [a]) == 0
    assert runner.difference([a + np.float32(1)], [a]) == 0.25
    assert runner.difference([np.zeros(4, np.float32)], [a]) == math.inf
    assert runner.difference([a[:3]], [a]) == math.inf
    assert runner.difference([np.arange(3)], [np.arange(3)]) == 0
    assert runner.difference([np.arange(3)], [np.array([0, 2, 1])]) == math.inf
    assert runner.difference([], [a]) == math.inf


def test_json_round_trip(found, tmp_path):
    report.save(found, tmp_path / "a.json")
    assert report.load(tmp_path / "a.json") == found
    (tmp_path / "b.json").write_text(json.dumps({"schema": 0}))
    (tmp_path / "c.json").write_text("nothing")
    for name in "bc":
        with pytest.raises(ValueError, match="no results file"):
            report.load(tmp_path / f"{name}.json")


def test_changes(found):
    slower = dataclasses.replace(found, results=[dataclasses.replace(r, ms=2 * r.ms, spread=0.0) for r in found.results])
    calm = dataclasses.replace(found, results=[dataclasses.replace(r, spread=0.0) for r in found.results])
    noisy = dataclasses.replace(found, results=[dataclasses.replace(r, spread=0.6) for r in found.results])
    assert {c[3] for c in report.changes(calm, calm)} == {""}
    assert {c[3] for c in report.changes(calm, slower)} == {"slower"}
    assert {c[3] for c in report.changes(slower, calm)} == {"faster"}
    assert {c[3] for c in report.changes(noisy, slower)} == {""}


def test_terminal(found):
    pytest.importorskip("rich")
    from rich.console import Console

    for width in (80, 100, 160):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))
        report.print_report(found, console)
        report.print_changes(found, found, console)
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        assert "conv2d" in text and "differs by" in text and "within noise" in text


def test_html_needs_nothing_else(found, tmp_path):
    pytest.importorskip("matplotlib")
    from hotloops.bench import html

    html.save(found, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 2 * (3 + 1)  # the three families' bars and the roofline, for both numbers of threads
    assert not re.search(r'(src|href)="(?!#)', text.replace('xlink:href="#', '"'))
    assert "<script" not in text


def test_readme(found, tmp_path):
    readme = tmp_path / "README.md"
    begin, end = "<!-- bench:begin (made by a command) -->\n", "<!-- bench:end -->\n"
    readme.write_text(f"before\n{begin}STALE\n{end}after\n")
    report.update_readme(found, readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{begin}") and text.endswith(f"{end}after\n")
    assert "STALE" not in text and "| `max_pool2d` |" in text
    report.update_readme(found, readme)
    assert readme.read_text() == text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        report.update_readme(found, readme)


def test_numbers():
    assert [report.digits(v) for v in (0, 0.0123, 1.234, 12.34, 999.9, 123456.0)] == [
        "0",
        "0.0123",
        "1.23",
        "12.3",
        "1,000",
        "123,000",
    ]
    assert report.time_text(0.01234) == "12.3 µs" and report.time_text(12.34) == "12.3 ms"
    assert report.geometric_mean([1, 4]) == pytest.approx(2)


def test_peaks_without_c(monkeypatch):
    monkeypatch.setattr(peaks._dispatch.adapter("c"), "status", lambda: "away")
    monkeypatch.setattr(peaks, "FAR_BYTES", 1 << 20)
    found = peaks.measure(1)
    assert found.gflops > 0 and found.memory > 0 and "NumPy" in found.how


def test_torch_peer():
    pytest.importorskip("torch")
    from hotloops.bench import peers

    names = ["conv3x3_n8_64x56_64", "maxpool3x3s2_fwdbwd", "lstm_T100_N32_I128_H256", "lstm_fwdbwd_T100_N32_I128_H256"]
    names += [
        "sdpa_causal_1x12x1024x64",
        "sdpa_fwdbwd_1x12x512x64",
        "conv3x3_bwd_n8_64x56_64",
        "mha_8x128x512_h8",
        "box_iou_1000x1000",
    ]
    result = bench.run([WORKLOADS[n] for n in names], backends=["reference"], peers=peers.find(["torch"]), seconds=0.01, small=True)
    assert not result.failures
    assert [r.name for r in result.results if r.backend == "torch" and r.agrees] == names


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_peer_that_runs_models(name):
    pytest.importorskip(name)
    pytest.importorskip("onnx")
    from hotloops.bench import onnx_models, peers

    chosen = [w for w in WORKLOADS.values() if w.op in onnx_models.MODELS and not w.parameters.get("gradient")]
    chosen = [w for w in chosen if w.parameters.get("window") != (7,)]  # ONNX averages to one place only
    result = bench.run(chosen, backends=["reference"], peers=peers.find([name]), seconds=0.01, small=True)
    assert not result.failures
    assert [r.name for r in result.results if r.backend == name and r.agrees] == [w.name for w in chosen]


def test_peers_that_are_not_there(monkeypatch):
    from hotloops.bench import peers

    with pytest.raises(ValueError, match="no peer 'nobody'; there are torch, onnxruntime, openvino"):
        peers.find(["nobody"])
    monkeypatch.setattr(peers._config, "version", lambda package: "" if package == "onnx" else "1.0")
    with pytest.raises(ImportError, match="the peer openvino needs onnx: pip install onnx"):
        peers.find(["openvino"])
