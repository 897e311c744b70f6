"""The command `hotloops`, `hl.show_config`, `hl.warmup`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

import hotloops as hl
from hotloops import _config, _dispatch, cli


def run(*arguments, **environment):
    command = [sys.executable, "-m", "hotloops", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, env=os.environ | environment, check=False)


def test_info():
    done = run("info", HOTLOOPS_NUM_THREADS="3")
    assert done.returncode == 0 and not done.stderr
    assert f"hotloops {hl.__version__}" in done.stdout
    assert "3 (from: HOTLOOPS_NUM_THREADS)" in done.stdout
    assert "reference" in done.stdout


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["Backends"]["reference"]["state"] == "available"
    assert found["Versions"]["numpy"] == importlib.metadata.version("numpy")
    assert found["Threads"]["in use"] == hl.get_num_threads()


def test_info_shows_the_error_of_a_broken_backend(capsys, monkeypatch):
    c = _dispatch.adapter("c")
    monkeypatch.setattr(c, "status", lambda: "the C extension does not load: undefined symbol: x")
    monkeypatch.setattr(c, "broken", lambda: "Traceback\nImportError: undefined symbol: x")
    assert cli.main(["info"]) == 0
    assert "    ImportError: undefined symbol: x" in capsys.readouterr().out


def test_show_config(capsys):
    assert hl.show_config() is None
    assert capsys.readouterr().out.startswith("hotloops ")
    found = hl.show_config("dicts")
    assert set(found["Backends"]) == {"c", "numba", "reference", "cuda"}
    with pytest.raises(ValueError, match="show_config"):
        hl.show_config("print")


def test_caches_and_processor():
    assert _config.cpu_name()
    assert all(size > 1000 for size in _config.caches().values())


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "usage"),
        (["fly"], 2, "invalid choice"),
        (["bench", "fish"], 2, "no family 'fish'"),
        (["bench", "--only", "fish*"], 2, "no workload"),
        (["bench", "--backends", "fish"], 2, "no backend 'fish'"),
        (["bench", "--threads", "0"], 2, "numbers from 1 to 256"),
        (["bench", "--peers", "fish"], 2, "no peer 'fish'"),
        (["bench", "--seconds", "-1"], 2, "positive"),
        (["bench", "--compare", "/nowhere.json"], 1, "/nowhere.json"),
        (["report", "/nowhere.json"], 1, "/nowhere.json"),
        (["warmup", "fish"], 2, "no family 'fish'"),
    ],
)
def test_exit_codes(arguments, code, text, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("numba")
    try:
        result = cli.main(arguments)
    except SystemExit as exit:  # argparse's own
        result = exit.code
    assert result == code
    assert text in capsys.readouterr().err


def test_unavailable_backend(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(_dispatch.adapter("cuda"), "status", lambda: "no GPU")
    assert cli.main(["bench", "--backends", "cuda"]) == 1
    assert "no GPU" in capsys.readouterr().err


def test_missing_packages_name_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["bench", "--sizes", "small"]) == 1
    assert "hotloops[bench]" in capsys.readouterr().err


def test_bench_and_report(tmp_path, monkeypatch, capsys):
    for package in ("rich", "matplotlib", "sklearn"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    command = ["bench", "boxes", "--sizes", "small", "--only", "box_iou_1000*", "--threads", "1", "--seconds", "0.01"]
    assert cli.main([*command, "--json", "a.json"]) == 0
    assert cli.main([*command, "--json", "b.json", "--html", "", "--compare", "a.json"]) == 0
    text = capsys.readouterr().out
    assert "box_iou" in text and "compared" in text and "\x1b[" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json", "hotloops-report.html"]
    (tmp_path / "README.md").write_text("<!-- bench:begin -->\n<!-- bench:end -->\n")
    assert cli.main(["report", "a.json", "--html", "c.html", "--readme", "README.md"]) == 0
    assert "`box_iou`" in (tmp_path / "README.md").read_text()
    assert cli.main(["report", "a.json"]) == 0
    assert cli.main(["report", "c.html"]) == 1


def test_list(capsys):
    assert cli.main(["bench", "--list", "--quick"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert "conv3x3_n8_64x56_64" in names and "conv3x3_n8_512x7_512" not in names


def test_check(capsys):
    pytest.importorskip("sklearn")
    assert cli.main(["check", "boxes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(v["right"] > 0 and not v["wrong"] for v in found["variants"].values())
    assert "box_iou" in found["kernels"]
    assert cli.main(["check", "boxes"]) == 0
    assert "agree with the reference" in capsys.readouterr().out


def test_check_tells_what_is_wrong(capsys, monkeypatch):
    pytest.importorskip("sklearn")
    from hotloops.bench import check

    monkeypatch.setattr(check, "difference", lambda actual, truth: 0.5)
    assert cli.main(["check", "boxes"]) == 1
    assert "off by 5.0e-01" in capsys.readouterr().out


def test_warmup(tmp_path):
    """A fresh cache folder is filled by several processes, and a second run finds it full."""
    pytest.importorskip("numba")
    first = run("warmup", "activation", HOTLOOPS_CACHE_DIR=str(tmp_path), HOTLOOPS_NUM_THREADS="2")
    assert first.returncode == 0 and not first.stderr
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbi")}
    second = run("warmup", "activation", HOTLOOPS_CACHE_DIR=str(tmp_path))
    assert second.stdout == first.stdout == f"{2 * len(kept)} kernels compiled\n"
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbi")}


def test_warmup_by_family():
    pytest.importorskip("numba")
    seen = []
    count = hl.warmup("activation", progress=lambda name, done, total: seen.append((done, total)))
    assert 0 < count == 2 * seen[-1][1]
    assert hl.warmup(["activation"]) == count
    with pytest.raises(ValueError, match="no family 'fish'"):
        hl.warmup("fish")


def test_import_stays_light():
    code = "import sys, hotloops; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert not {"hotloops.cli", "hotloops.bench", "hotloops._config", "rich", "numba"} & set(done.stdout.split())


def test_lazy_attributes():
    assert hl.bench.workloads and "warmup" in dir(hl)
    with pytest.raises(AttributeError, match="fish"):
        hl.fish  # noqa: B018 - asking for it is the test
