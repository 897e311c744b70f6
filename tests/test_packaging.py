"""The source archive and the wheels built from it: complete, small, and working with and without a C compiler."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.timeout(1200)  # the wheel is built for some minutes
WITHOUT_C = "hotloops was installed without its C kernels"


def run(*command, **environment):
    """The output of a command; its error text where it fails."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HOTLOOPS_", "LD_PRELOAD"))}
    kept["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), kept.get("PATH", "")])  # meson and ninja are there
    done = subprocess.run([str(part) for part in command], env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """The unpacked source archive of the files as they are now, committed or not."""
    pytest.importorskip("mesonpy", reason="meson-python builds the package")
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git checkout: the archive is made from one")
    copy = tmp_path_factory.mktemp("checkout") / "hotloops"
    run("git", "clone", "-q", ROOT, copy)
    for line in run("git", "-C", ROOT, "ls-files", "--modified", "--others", "--exclude-standard").splitlines():
        (copy / line).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / line).exists():
            shutil.copy(ROOT / line, copy / line)
        else:
            (copy / line).unlink(missing_ok=True)
    run("git", "-C", copy, "add", "--all")
    run("git", "-C", copy, "-c", "user.name=t", "-c", "user.email=t", "commit", "-q", "--allow-empty", "-m", "as it is")
    build = "import mesonpy, sys; mesonpy.build_sdist(sys.argv[1], {'setup-args': ['-Dckernels=disabled']})"
    run("env", "-C", copy, sys.executable, "-c", build, copy.parent)
    [archive] = copy.parent.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later
        tar.extractall(copy.parent)
    return copy.parent / archive.name.removesuffix(".tar.gz")


def build_wheel(source, folder, ckernels, **environment):
    run(
        *(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-cache-dir"),
        *("-w", folder, f"-Csetup-args=-Dckernels={ckernels}", source),
        **environment,
    )
    [wheel] = folder.glob("*.whl")
    return wheel


def install(wheel, folder):
    """The Python of a fresh environment with the wheel, NumPy, cffi, and what tests need."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    [packages] = folder.glob("lib/python*/site-packages")
    mine = [p for p in sys.path if p.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    (packages / "beside.pth").write_text("\n".join(mine))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory):
    """With its C kernels, which are compiled in a hurry: they are to work, not to be fast."""
    compiler = os.environ.get("CC", "cc")
    if os.environ.get("HOTLOOPS_REQUIRE_C") != "1" and shutil.which(compiler) is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("wheel")
    hurried = folder / "cc"
    hurried.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O1\n')
    hurried.chmod(0o755)
    return build_wheel(source, folder, "enabled", CC=str(hurried))


@pytest.fixture(scope="session")
def plain_wheel(source, tmp_path_factory):
    """Built where there is no C compiler that works."""
    return build_wheel(source, tmp_path_factory.mktemp("plain"), "auto", CC="/bin/false")


def test_the_archive_is_complete(source):
    tracked = set(run("git", "-C", source.parent / "hotloops", "ls-files").splitlines())
    there = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    assert there - {"PKG-INFO"} == tracked


def test_the_wheel_is_complete(source, wheel):
    assert wheel.stat().st_size < 3_000_000
    names = set(zipfile.ZipFile(wheel).namelist())
    python = {
        f"hotloops/{p.relative_to(source / 'python/hotloops')}" for p in (source / "python/hotloops").rglob("*") if p.is_file()
    }
    kernels = {f"hotloops/kernels/{p.relative_to(source / 'kernels')}" for p in (source / "kernels").rglob("*") if p.is_file()}
    assert "hotloops/py.typed" in names
    extra = {name for name in names - python - kernels if ".dist-info/" not in name}
    assert python | kernels <= names
    assert sorted(name.partition(".")[0] for name in extra) == ["hotloops/_calls", "hotloops/_ckernels"]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_version_is_one(source):
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    import hotloops

    assert project["version"] == hotloops.__version__
    assert f"version: '{project['version']}'" in (source / "meson.build").read_text()
    assert [d.partition(">")[0] for d in project["dependencies"]] == ["numpy", "cffi"]
    assert set(project["optional-dependencies"]) == {"numba", "cuda", "bench", "test", "dev"}


def test_the_wheel_needs_only_the_c_library(wheel, tmp_path):
    """No OpenMP, no BLAS, nothing that another machine may lack."""
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    for module in ("_calls", "_ckernels"):
        with zipfile.ZipFile(wheel) as archive:
            [name] = [name for name in archive.namelist() if f"/{module}." in name]
            library = archive.extract(name, tmp_path)
        needed = [line.split("[")[1].rstrip("]") for line in run("readelf", "-d", library).splitlines() if "(NEEDED)" in line]
        assert set(needed) <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
        exported = [
            line.split()[-1]
            for line in run("readelf", "-W", "--dyn-syms", library).splitlines()
            if " GLOBAL DEFAULT " in line and " UND " not in line
        ]
        assert exported == [f"PyInit_{module}"]


def test_the_wheel_works(source, wheel, tmp_path):
    python = install(wheel, tmp_path / "venv")
    assert str(tmp_path) in run(python, "-c", "import hotloops; print(hotloops.__file__)")
    report = run(
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "softmax and vectors_and_tail",
        source / "tests" / "test_kernels.py",
        HOTLOOPS_REQUIRE_C="1",
    )
    assert " passed" in report


def test_without_a_compiler(source, plain_wheel, tmp_path):
    python = install(plain_wheel, tmp_path / "venv")
    states = run(
        python, "-c", "import hotloops as hl; print(hl.backends()['c']); print(hl.explain(hl.softmax, [0.0, 1.0]).backend)"
    )
    assert states.splitlines()[0].startswith(f"unavailable: {WITHOUT_C}")
    assert states.splitlines()[1] in ("numba", "reference")
    report = run(
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "softmax and vectors_and_tail",
        source / "tests" / "test_kernels.py",
    )
    assert " passed" in report


def test_without_numba(plain_wheel, tmp_path):
    python = install(plain_wheel, tmp_path / "venv")
    program = (
        "import sys; sys.modules['numba'] = None\n"
        "import hotloops as hl; print(hl.backends()['numba']); print(hl.softmax([0.0, 0.0]))"
    )
    states = run(python, "-c", program).splitlines()
    assert states[0].startswith("unavailable: ") and "numba" in states[0]
    assert states[1] == "[0.5 0.5]"


def test_a_broken_extension_says_so(plain_wheel, tmp_path):
    """Present but broken: its own error is shown, the others still run, and asking for it is an error with the reason."""
    python = install(plain_wheel, tmp_path / "venv")
    [package] = (tmp_path / "venv").glob("lib/python*/site-packages/hotloops")
    (package / f"_ckernels{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    program = (
        "import hotloops as hl; print(hl.backends()['c']); print(hl.softmax([0.0, 0.0]))\n"
        "try: hl.backend('c').__enter__()\nexcept hl.BackendUnavailableError as error: print(error)"
    )
    states = run(python, "-c", program).splitlines()
    assert "invalid ELF header" in states[0] or "file too short" in states[0]
    assert states[1] == "[0.5 0.5]"
    assert "the C extension does not load" in states[2]


def test_a_broken_compiler_is_an_error_where_c_is_required(source, tmp_path):
    with pytest.raises(AssertionError, match=r"meson\.build:\d+:\d+: ERROR"):
        build_wheel(source, tmp_path, "enabled", CC="/bin/false")
