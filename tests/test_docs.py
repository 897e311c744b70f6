"""The README runs, every docstring's examples hold, and every public function says what a caller must know."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import io
import pathlib
import pkgutil
import re

import pytest

import hotloops as hl
from hotloops.kernels import reference

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
FAMILIES = {f"hotloops.{module.name}" for module in pkgutil.iter_modules(reference.__path__)}
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(hl.__path__, "hotloops.")
    if not re.search(r"_ckernels|\.kernels\.(cpu|cuda)|\.__main__", m.name)
)
PUBLIC = {name: getattr(hl, name) for name in dir(hl) if not name.startswith("_") and not inspect.ismodule(getattr(hl, name))}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
OPS = sorted(name for name, value in FUNCTIONS.items() if value.__module__ in FAMILIES)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} needs an extra: {error}")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert not failed, output.getvalue()


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_has_a_docstring(name):
    text = inspect.getdoc(PUBLIC[name]) or ""
    if isinstance(PUBLIC[name], str | dict):
        return
    assert re.match(r"[^\n]{10,130}[.:]", text), f"{name}: the first line must say what the result is"


def sections(text):
    """The numpydoc sections of a docstring by title."""
    parts = re.split(r"^(\w+)\n-{3,}\n", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", OPS)
def test_op_is_documented(name):
    """Parameters may be those of another op that their section names."""
    text = inspect.getdoc(FUNCTIONS[name])
    found = sections(text)
    absent = {"Parameters", "Returns", "Raises", "Examples"} - set(found)
    assert not absent, f"{name}: no section {', '.join(sorted(absent))}"
    assert ">>> " in found["Examples"]
    described = set(re.findall(r"\w+", " ".join(re.findall(r"^(\*{0,2}\w[^:\n]*?) :", found["Parameters"], flags=re.M))))
    missing = set(inspect.signature(FUNCTIONS[name]).parameters) - described
    assert not missing or set(re.findall(r"`(\w+)`", found["Parameters"])) & set(OPS) - {name}, (
        f"{name}: {', '.join(sorted(missing))} not described"
    )


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_readme_runs():
    """The code of the first sections, top to bottom, as a reader would paste it."""
    names, output = {}, io.StringIO()
    with contextlib.redirect_stdout(output):
        for block in blocks("python"):
            exec(block, names)
    assert output.getvalue().startswith("(8, 16, 32, 32) (16, 3, 3, 3)")
    assert "backend" in output.getvalue()


def test_readme_example_has_ten_lines():
    assert len(blocks("python")[0].strip().splitlines()) <= 10


def test_readme_order():
    titles = re.findall(r"^#+ (.*)", README, flags=re.M)
    assert titles == [
        "hotloops",
        "Two commands",
        "Example",
        "Which backend did I get?",
        "How to add a kernel in five steps",
        "How fast?",
    ]


def test_readme_commands_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for block in [*blocks("sh"), *re.findall(r"`(make [^`]*)`", README)]:
        for line in block.splitlines():
            words = [word for word in line.partition("#")[0].partition("ARGS")[0].split() if word != "make"]
            assert words and set(words) <= targets


@pytest.mark.parametrize("path", re.findall(r"`((?:kernels|csrc|python|tests)/[\w/.]*)`", README))
def test_readme_paths_exist(path):
    assert (ROOT / path).exists(), path
