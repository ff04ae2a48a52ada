"""What goes into the source archive and the wheel, from a clone that other builds have used."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_toolchain import toolchain

from foldcp_kernels.core import extension

ROOT = Path(__file__).parents[2]
OURS = ("foldcp", "foldcp_kernels", "csrc", "tests", "bench", "examples")
MADE = ("__pycache__", "*.so", "_build_info.py")
PLANTED = "raise SystemExit('of another build')\n"
TOP = ["foldcp.pth", "foldcp_boot.py"]
INFO = "foldcp_kernels/_build_info.py"


def _build(folder: Path, hook: str, out: Path) -> Path:
    """Run one of the hooks that pip calls; without a compiler there is no extension to wait for."""
    code = f"import sys; from setuptools.build_meta import {hook}; {hook}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "CXX": "/no/compiler"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (made,) = out.iterdir()
    return made


def _python(folder: Path) -> list[str]:
    packages = [folder / "foldcp", folder / "foldcp_kernels"]
    files = [path for package in packages for path in package.rglob("*.py")]
    return sorted(str(path.relative_to(folder)) for path in files if path.name not in MADE)


def _wheel(path: Path) -> tuple[list[str], dict[str, str]]:
    """(files but for metadata, texts of those that are asked about below)."""
    with zipfile.ZipFile(path) as wheel:
        names = sorted(wheel.namelist())
        inside = [name for name in names if ".dist-info/" not in name]
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        texts = {"info": INFO, "metadata": metadata}
        return inside, {key: wheel.read(name).decode() for key, name in texts.items()}


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the clone, with what builds of other states have left in it."""
    folder = tmp_path_factory.mktemp("used") / "clone"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    for name in OURS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*MADE))
    stale = [INFO, "foldcp_kernels/_C.abi3.so", "foldcp_kernels/fused/old.o"]
    stale += [
        "build/lib/foldcp/gone.py",
        "build/lib/foldcp_kernels/_C.abi3.so",
        f"build/lib/{INFO}",
    ]
    for name in stale:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(PLANTED)
    return folder


def test_archive_and_wheels_are_whole_and_of_this_build(used: Path, tmp_path: Path) -> None:
    for name in ("archive", "wheel", "again"):
        (tmp_path / name).mkdir()
    archive = _build(used, "build_sdist", tmp_path / "archive")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    held = {str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    build = {"setup.py", "toolchain.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"}
    made = {"PKG-INFO", "setup.cfg", *(n for n in held if n.startswith("foldcp.egg-info/"))}
    assert held == {*_python(ROOT), *sources, *build, *TOP, *made}

    # Without a clone there are no benches, which is said before anything is loaded.
    code = "import sys; from foldcp.cli.main import main\n"
    code += "try: main(['bench', 'kernels'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=unpacked, capture_output=True, text=True
    )
    assert done.stderr.startswith("foldcp: foldcp bench needs a clone of the repository"), done

    files, texts = _wheel(_build(unpacked, "build_wheel", tmp_path / "wheel"))
    assert files == sorted([*_python(ROOT), *TOP, INFO])
    assert "CXX=/no/compiler was not found: install g++" in texts["info"]
    # As `pip install .` does in the clone: the same, and what is there stays as it is.
    assert _wheel(_build(used, "build_wheel", tmp_path / "again")) == (files, texts)
    assert (used / INFO).read_text() == PLANTED

    told = email.message_from_string(texts["metadata"])
    assert told["License-Expression"] == "MIT" and told["Requires-Python"] == ">=3.10"
    assert told.get_payload().startswith("# foldcp\n") and "markdown" in str(
        told["Description-Content-Type"]
    )
    assert len(told.get_all("Project-URL")) == 2 and len(told.get_all("Classifier")) > 5


def test_the_oldest_torch_is_the_same_everywhere() -> None:
    oldest = ".".join(map(str, extension.OLDEST_TORCH))
    assert toolchain.OLDEST_TORCH == extension.OLDEST_TORCH and toolchain.AGAIN == extension.AGAIN
    (asked,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    for name in ("README.md", "docs/install.md"):
        stated = re.findall(r"torch (2\.\d+) (?:and later|or newer)", (ROOT / name).read_text())
        assert [asked, *stated] == [oldest, oldest], name
    setup = (ROOT / "setup.py").read_text()
    assert set(re.findall(r"torch.* (2\.\d+) or newer", setup)) <= {oldest}
