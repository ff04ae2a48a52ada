"""Tables of bench/results: one schema, each named in their README, each made at a commit."""

from __future__ import annotations

import csv
import re
import subprocess
from pathlib import Path

import pytest

from bench import machine

RESULTS = machine.ROOT / "bench" / "results"
README = (RESULTS / "README.md").read_text()
TABLES = sorted(path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.csv"))
# Rows from before `write_csv` refused. Take one out when its table is made again; add none.
DIRTY = {
    "aot.csv": {"d7aea79+", "eb1e67c+"},
    "cpu/engine.csv": {"e6983af+"},
    "cpu/outputs.csv": {"40fe3d6+"},
    "cpu/steering.csv": {"40fe3d6+"},
    "memory/tiles.csv": {"a4285f0+"},
    "roofline.csv": {"1fac484+"},
}


def rows(name: str, heading: str) -> dict[str, str]:
    """First two cells of the table under a heading of the README."""
    assert heading in README, name
    part = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `([\w/.-]+\.csv)` \| ([^|]+?) \|", part, re.MULTILINE))


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_the_schema(name: str) -> None:
    with (RESULTS / name).open(newline="") as file:
        table = csv.DictReader(file)
        found, columns = list(table), table.fieldnames or []
    meta = machine.GPU_META if name.startswith("gpu-") else machine.META
    own = columns[: -len(meta)]
    assert own and tuple(columns[-len(meta) :]) == meta and not set(own) & set(meta)
    assert found and all(None not in row and row["machine"] for row in found)
    commits = {row["commit"] for row in found}
    assert all(re.fullmatch(r"[0-9a-f]{7,}\+?", commit) for commit in commits), commits
    assert {c for c in commits if c.endswith("+")} == DIRTY.get(name, set())


def test_the_readme_names_every_table_its_script_and_what_is_dirty() -> None:
    files = rows("files", "Files")
    assert sorted(files) == [name for name in TABLES if not name.startswith("gpu-")]
    for name, script in files.items():
        module = re.match(r"`python -m (bench[\w.]+)", script)
        assert module, f"{name}: {script}"
        assert (machine.ROOT / f"{module[1].replace('.', '/')}.py").is_file(), module[1]
    listed = rows("dirty", "Tables from trees with changes")
    assert {name: set(commits.split(", ")) for name, commits in listed.items()} == DIRTY


@pytest.mark.process
def test_tables_of_the_repository_are_refused_while_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*args: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *who, *args], cwd=root, check=True, capture_output=True)

    root, elsewhere = tmp_path / "tree", tmp_path / "elsewhere" / "x.csv"
    for folder in ("foldcp", "csrc", "bench/results/cpu"):
        (root / folder).mkdir(parents=True)
    tracked, source = root / "bench/results/cpu/x.csv", root / "csrc/engine.cpp"
    source.write_text("1")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "a")
    monkeypatch.setattr(machine, "ROOT", root)
    monkeypatch.chdir(tmp_path)
    wanted = [{"a": "1", "commit": "mine", "b": "2"}]

    def write(path: Path) -> dict[str, str]:
        machine.describe.cache_clear()
        try:
            machine.write_csv(path, wanted)
        finally:
            machine.describe.cache_clear()
        return read(path)

    def read(path: Path) -> dict[str, str]:
        with path.open(newline="") as file:
            return next(csv.DictReader(file))

    clean = write(tracked)
    assert list(clean)[:3] == ["a", "b", "machine"]
    assert re.fullmatch(r"[0-9a-f]{7,}", clean["commit"])
    for change in (source, root / "foldcp" / "new.py"):
        before = source.read_text()
        change.write_text("2")
        with pytest.raises(SystemExit) as refusal:
            write(tracked)
        message = str(refusal.value)  # a message: Python exits with 1
        name = change.relative_to(root).as_posix()
        assert name in message or "foldcp/ " in message, message
        assert "Commit first, or pass another --out" in message
        assert read(tracked) == clean
        kept = read(Path("foldcp_bench/cpu/x.csv"))
        assert kept["commit"] == write(elsewhere)["commit"] == clean["commit"] + "+"
        source.write_text(before)
        (root / "foldcp" / "new.py").unlink(missing_ok=True)
    (root / "bench" / "new.py").write_text("not a source of the product")
    assert write(tracked) == clean
