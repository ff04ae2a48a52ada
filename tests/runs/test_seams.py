"""foldcp runs with the functions of Boltz that it was made for, and refuses others by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
import zipimport
from collections.abc import Callable
from importlib import util
from importlib.metadata import version
from pathlib import Path

import pytest

from bench.machine import ROOT
from foldcp.boltz.seams import check, known, table
from foldcp.boltz.seams.fingerprint import of_bodies
from foldcp.cli.doctor import command as doctor

BOLTZ = Path(util.find_spec("boltz").origin).parent
PREDICT = ["-m", "boltz.main", "predict", "missing.yaml"]
ATOMS = "data/feature/featurizerv2.py"


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of Boltz in a folder that comes first on the path."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(BOLTZ, folder / "boltz", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def _edited(file: Path, old: str, new: str) -> Callable[[], None]:
    """Edit a file; returns what puts it back."""
    before = file.read_text()
    assert before.count(old) >= 1
    file.write_text(before.replace(old, new, 1))
    return lambda: file.write_text(before) and None


def _predict(site: Path, folder: Path, launcher: list[str]) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FOLDCP")}
    env |= {"FOLDCP": "1", "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *PREDICT]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_another_body_is_refused_by_name(ranks: int, copied: Path, tmp_path: Path) -> None:
    put_back = _edited(copied / "boltz" / ATOMS, "random.integers", "random.permutation")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if ranks == 2 else []
    ended = _predict(copied, tmp_path, launcher)
    put_back()
    said = [line for line in ended.stderr.splitlines() if line.startswith("foldcp: ")]
    assert ended.returncode == 1 and len(said) == 1, ended
    name = "boltz.data.feature.featurizerv2.process_ensemble_features"
    assert said[0].startswith(f"foldcp: boltz {version('boltz')}: {name} differs from what ")
    assert "(version 2.2.1): `pip install" in said[0] and "or unset FOLDCP" in said[0]


def test_other_changes_are_not_refused(copied: Path, tmp_path: Path) -> None:
    """What a fork changes for training, comments and docstrings, and new functions are its own."""
    folder = copied / "boltz"
    put_back = [
        _edited(folder / ATOMS, "def process_atom_features(", "def mine():\n    pass\n\n\n"
                "def process_atom_features(  # mine\n"),
        _edited(folder / "data/types.py", '"""Load the object from an NPZ file.', '"""Load.'),
        _edited(folder / "model/models/boltz2.py", "return [EMA(self.ema_decay)]", "return []"),
        _edited(folder / "main.py", 'help="The path where to save the predictions.",',
                'help="Where to.",'),
    ]  # fmt: skip
    ended = _predict(copied, tmp_path, [])
    for one in put_back:
        one()
    assert ended.returncode == 2 and "missing.yaml" in ended.stderr, ended
    assert "differs" not in ended.stderr


@pytest.mark.parametrize(("text", "why"), [("", ""), ("from elsewhere import *", ""),
                                           ("def broken(:", " (no Python)")])  # fmt: skip
def test_a_file_without_the_functions_is_refused(text: str, why: str) -> None:
    def read(path: str) -> bytes:
        return text.encode() if path == "data/mol.py" else (BOLTZ / path).read_bytes()

    names = sorted(name for name in known.BODIES["data/mol.py"] if name)
    assert check.differing(read) == [f"boltz.data.mol.{name}{why}" for name in names]


def test_doctor_names_another_body(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_back = _edited(copied / "boltz" / ATOMS, "random.integers", "random.permutation")
    spec = util.spec_from_file_location("boltz.main", copied / "boltz/main.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(util, "find_spec", lambda name: spec)
        assert doctor.main([]) == 1
    put_back()
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("boltz "))
    assert "process_ensemble_features differs from what foldcp replaces" in line, line


def test_sources_are_read_from_a_zip_and_missed_where_there_are_none(tmp_path: Path) -> None:
    archive = tmp_path / "boltz.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in known.BODIES:
            if path != "main.py":
                file.write(BOLTZ / path, f"boltz/{path}")
    differ = check.differing(_of_zip(archive))
    assert differ and all(x.startswith("boltz.main.") for x in differ)
    assert all(x.endswith(" (no source)") for x in differ), differ
    with zipfile.ZipFile(archive, "a") as file:
        file.write(BOLTZ / "main.py", "boltz/main.py")
    zipimport._zip_directory_cache.clear()
    assert check.differing(_of_zip(archive)) == []


def _of_zip(archive: Path) -> Callable[[str], bytes]:
    loader = zipimport.zipimporter(str(archive))
    origin = str(archive / "boltz/main.py")
    return check.reader(util.spec_from_loader("boltz.main", loader, origin=origin))


def test_the_table_and_the_fingerprints_are_of_the_same_functions() -> None:
    listed = {path: set(names) for path, names in table.bodies().items()}
    assert listed == {path: {*names} - {""} for path, names in known.BODIES.items()}
    assert check.versions() == ["2.2.1"]
    for seam in table.SEAMS:
        assert (ROOT / "foldcp" / seam.ours).is_file(), seam
        how = (table.REPLACES, table.WRAPS, table.REBINDS, table.IMITATES, table.READS)
        assert seam.how in how


def test_a_fingerprint_is_of_what_the_code_does() -> None:
    def one(text: str) -> str:
        return of_bodies(text.encode())["f"]

    plain = one("def f(a, b=1):\n    return a + b")
    same = ['def f(a: int, b: int = 1) -> int:\n    """Add."""\n    # both\n    return (a + b)',
            "@click.option('--a')\ndef f(a, b=1):\n\n    return a+b"]  # fmt: skip
    assert {one(text) for text in same} == {plain}
    other = ["def f(a, b=2):\n    return a + b", "def f(a, b=1):\n    return a - b",
             "def f(a, c=1):\n    return a + c", "@cache\ndef f(a, b=1):\n    return a + b",
             "def f(a, *, b=1):\n    return a + b", "class f(a, b):\n    pass"]  # fmt: skip
    other += ["def f(a, b=1):\n    return a + b\nf = cache(f)"]
    assert len({plain, *map(one, other)}) == 1 + len(other)
    constants = of_bodies(b"a = [1]\nb = 2"), of_bodies(b"a = [1]\na.x = 1\na = [2]\nb = 2")
    assert constants[0]["a"] != constants[1]["a"] and constants[0]["b"] == constants[1]["b"]
    assert of_bodies(b"d = {}\nd[1] = 2")["d"] != of_bodies(b"d = {}")["d"]
    whole = [
        of_bodies(b"class F:\n    def g(self):\n        pass" + x) for x in (b"", b"\nF.g = 1")
    ]
    assert whole[0]["F"] != whole[1]["F"]
    replaced = of_bodies(b"class F:\n    def g(self):\n        pass\nF.g = None")
    assert replaced["F.g"] != of_bodies(b"class F:\n    def g(self):\n        pass")["F.g"]


def test_looking_at_boltz_takes_no_time() -> None:
    """No file is parsed where all are known as a whole."""
    reads = []

    def read(path: str) -> bytes:
        reads.append(path)
        return (BOLTZ / path).read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "of_bodies", None)
        assert check.differing(read) == []
    assert len(reads) == len(known.BODIES)
