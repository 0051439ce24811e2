"""What a release holds: a wheel with all that its code reads and no tests, an sdist that builds it again, extras that
exist, and one version.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import yaml

import ghoststore
from ghoststore.lazy import PACKAGES
from tests.test_docs import PAGES
from tests.test_house import SOURCES, name_of, words_of

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def extras_named() -> Iterator[tuple[str, str]]:
    """(where, extras between the brackets) of every message and page that says how to install."""
    texts = [(f"{name_of(path)}:{line}", text) for path in SOURCES for line, text in words_of(path)]
    texts += [(page.name, page.read_text()) for page in PAGES]
    for where, text in texts:
        for extras in re.findall(r"(?:ghoststore|'\.)\[([\w, -]+)\]", text):
            yield from ((where, extra.strip()) for extra in extras.split(","))


def test_every_extra_that_is_named_exists() -> None:
    named = list(extras_named())
    assert {"peft", "ray", "bitsandbytes", "cpu", "gpu", "fast"} <= {extra for _, extra in named}
    assert not [(where, extra) for where, extra in named if extra not in PROJECT["optional-dependencies"]]


def test_every_package_that_a_message_installs_is_a_dependency() -> None:
    """What is named alone, as in ``pip install wandb``, comes with ghoststore or with one of its extras."""
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    known = {re.split(r"[<>=;!~ ]", package)[0] for packages in lists for package in packages}
    named = {
        package
        for path in SOURCES
        for _, text in words_of(path)
        for package in re.findall(r"pip install (?:--upgrade )?([a-z][\w-]*)", text)
    }
    assert {"wandb", "tensorboard", "duckdb"} <= named <= known


def test_every_package_has_one_least_version() -> None:
    """Those of `dev` are those of the extras: `make test-oldest` tries all of them at once."""
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    bounds: dict[str, set[str]] = {}
    for package in (package for packages in lists for package in packages):
        name, least = package.partition(";")[0].split(">=")
        bounds.setdefault(name.partition("[")[0], set()).add(least.strip())
    assert {name: least for name, least in bounds.items() if len(least) > 1} == {}


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the format requires
    assert str(citation["version"]) == ghoststore.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["keywords"] == PROJECT["keywords"]


def built(source: Path, out: Path, *kinds: str) -> dict[str, Path]:
    """Distributions of the tree ``source``, by their suffix. Nothing is downloaded."""
    words = [sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", str(out), *kinds, str(source)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.suffix: path for path in out.iterdir()}


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_the_wheel_and_the_sdist(tmp_path: Path) -> None:
    for tool in ("build", "hatchling"):
        pytest.importorskip(tool, reason=f"{tool} is not installed: pip install '.[dev]'")
    made = built(ROOT, tmp_path / "first", "--sdist", "--wheel")
    files, about = contents(made[".whl"]), f"ghoststore-{ghoststore.__version__}.dist-info/"
    ours = {
        path.relative_to(ROOT).as_posix()
        for package in ("ghoststore", *PACKAGES)
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"query/demo/corpus.jsonl.gz", "query/answer/report.html.jinja", "ghoststore/py.typed"} <= ours
    assert {name for name in files if not name.startswith(about)} == ours
    assert all(files[name] == (ROOT / name).read_bytes() for name in ours)
    assert b"ghoststore = ghoststore.cli:main" in files[f"{about}entry_points.txt"]
    assert files[f"{about}licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert f"\nVersion: {ghoststore.__version__}\n".encode() in files[f"{about}METADATA"]

    with tarfile.open(made[".gz"]) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    beside = {"pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "constraints.txt"}
    assert beside | {"CONTRIBUTING.md", "SECURITY.md", "tests", "docs"} <= {path.name for path in tree.iterdir()}
    assert contents(built(tree, tmp_path / "second", "--wheel")[".whl"]) == files
    shutil.rmtree(tmp_path / "unpacked")
