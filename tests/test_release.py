"""What is released: one version, an sdist that holds all, and a wheel that runs by itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import lora_fx

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What is released of the tree; not its environments, caches and outputs.
PARTS = ("lora_fx", "passes", "export", "docs", "examples", "tests", "benchmarks")


def run(*command: object, at: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [*map(str, command)], cwd=at, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a copy of the tree, and the wheel that is built of it."""
    tree = tmp_path_factory.mktemp("tree")
    for part in PARTS:
        ignored = shutil.ignore_patterns("__pycache__", "out", "_build")
        shutil.copytree(ROOT / part, tree / part, ignore=ignored)
    for file in [*ROOT.glob("*.*"), ROOT / "Makefile", ROOT / "LICENSE"]:
        if file.is_file():
            shutil.copy(file, tree)
    said = run(sys.executable, "-m", "build", "--no-isolation", at=tree)
    assert "warning" not in said.lower()
    return tree / "dist"


def test_there_is_one_version() -> None:
    assert lora_fx.__version__ == metadata.version("lora-fx") == PROJECT["version"]
    (latest, *_) = re.findall(
        r"^## (\d\S*?)[, ]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert latest == PROJECT["version"]


def test_the_sdist_holds_what_the_readme_names(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    readme = (ROOT / "README.md").read_text()
    linked = set(re.findall(r"\]\((?!http)([^)#]+)", readme))
    assert linked
    assert {target.rstrip("/") for target in linked} <= names
    assert {"Makefile", "CHANGELOG.md", "docs/conf.py", "tests/conftest.py"} <= names
    assert not [name for name in names if name.endswith((".pyc", ".onnx"))]


def test_the_wheel_runs_in_an_environment_of_its_own(dist: Path, tmp_path: Path) -> None:
    """It finds torch and the rest in ours by a path; the package itself is the wheel's alone."""
    (wheel,) = dist.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", at=tmp_path)
    (home,) = (tmp_path / "env").glob("lib/python*/site-packages")
    ours = [entry for entry in sys.path if entry.endswith("site-packages")]
    (home / "dependencies.pth").write_text("\n".join(ours))
    python = tmp_path / "env" / "bin" / "python"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    run(python, *install, wheel, at=tmp_path)
    where = run(python, "-c", "import lora_fx.passes as p; print(p.__file__)", at=tmp_path)
    assert Path(where.strip()).is_relative_to(home)
    program = python.with_name("lora-fx")
    assert run(program, "--version", at=tmp_path) == f"lora-fx {PROJECT['version']}\n"
    assert "Train two adapters" in run(program, "demo", "--help", at=tmp_path)


def test_the_pythons_that_are_promised() -> None:
    prefix = "Programming Language :: Python :: 3."
    minors = [int(c.removeprefix(prefix)) for c in PROJECT["classifiers"] if c.startswith(prefix)]
    assert PROJECT["requires-python"] == f">=3.{minors[0]}"
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert f"3.{sys.version_info.minor}" in {f"3.{minor}" for minor in minors}
    wanted = re.search(r"^PYTHONS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert wanted is not None
    assert wanted[1].split() == [f"python3.{minor}" for minor in minors]
    assert sysconfig.get_python_version() in wanted[1]


def test_every_extra_is_described() -> None:
    told = (ROOT / "CHANGELOG.md").read_text()
    assert [extra for extra in PROJECT["optional-dependencies"] if f"`{extra}`" not in told] == []


def test_what_is_released_examines_itself() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\nrelease-check:")[2].partition("\n\n")[0]
    assert "lora-fx doctor" in recipe
