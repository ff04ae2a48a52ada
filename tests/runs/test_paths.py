"""Names and files at the start, answers of the MSA server, and a review of every path there is."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boltz
import pytest
from alone import prediction
from boltz.data.msa import mmseqs2
from path_scan import scan

from foldcp.boltz.command import early
from foldcp.boltz.inputs import answers, processing
from foldcp.errors import UserError
from foldcp.output.folders import move_into
from foldcp.output.folders import replace as finish
from foldcp.runtime.files.names import Unsafe


def test_inputs_and_folders_are_refused_at_the_start(tmp_path: Path) -> None:
    bad = tmp_path / "...yaml"
    long = tmp_path / f"{221 * 'x'}.yaml"
    for path in (bad, long, tmp_path / "a\nb.yaml"):
        path.write_text("version: 1")
        with pytest.raises(UserError, match=r"the input's name .* is not used: it .*: rename"):
            early.check_names([path])
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="pipe.yaml is not used: it is a pipe"):
        early.check_names([pipe])
    early.check_names([tmp_path / f"{220 * 'x'}.yaml"])
    elsewhere, results = tmp_path / "elsewhere", tmp_path / "results"
    elsewhere.mkdir()
    processing.check_folders(results)
    for name in ("msa", "predictions", "processed", "processed/records", "processed/mols"):
        link = results / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(elsewhere)
        with pytest.raises(UserError, match=f"{link} is not used: it leads to {elsewhere}"):
            processing.check_folders(results)
        link.unlink()
    (results / "predictions").mkdir()
    (results / "predictions" / "one").symlink_to(elsewhere)
    made = tmp_path / "made"
    made.mkdir()
    (made / "x").write_text("x")
    with pytest.raises(Unsafe):
        move_into(made, results / "predictions" / "one")
    finish(made, results / "predictions" / "one")
    assert not list(elsewhere.iterdir()) and (results / "predictions" / "one" / "x").is_file()


def test_an_answer_of_the_server_stays_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmseqs2, "tarfile", mmseqs2.tarfile)
    answers.install()

    def archive(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Path:
        path = tmp_path / "out.tar.gz"
        with tarfile.open(path, "w:gz") as file:
            for each in ("./uniref.a3m", name):
                member = tarfile.TarInfo(each)
                member.size, member.linkname = 4, link
                if each == name:
                    member.type = kind
                file.addfile(member, io.BytesIO(b">101"))
        return path

    inside, outside = tmp_path / "answer", tmp_path / "victim"
    inside.mkdir()
    outside.write_text("as it was")
    with prediction():
        with mmseqs2.tarfile.open(archive("msa.sh")) as file:
            file.extractall(str(inside))
        assert {path.name: path.read_text() for path in inside.iterdir()} == {
            "uniref.a3m": ">101", "msa.sh": ">101",
        }  # fmt: skip
        hostile: list[tuple[Any, ...]] = [
            ("../victim",), (str(outside),), ("a/../../victim",), ("..",), ("deep/x",),
            ("uniref.a3m", tarfile.SYMTYPE, "../victim"), ("x", tarfile.LNKTYPE, "../victim"),
            ("x", tarfile.FIFOTYPE), ("x", tarfile.CHRTYPE), ("x", tarfile.DIRTYPE),
        ]  # fmt: skip
        for case in hostile:
            with (
                mmseqs2.tarfile.open(archive(*case)) as file,
                pytest.raises(Unsafe, match="the MSA server's answer"),
            ):
                file.extractall(str(inside))
        assert not any(path.is_symlink() for path in inside.iterdir())
    assert outside.read_text() == "as it was"
    assert {p.name for p in tmp_path.iterdir()} == {"answer", "victim", "out.tar.gz"}
    _refuse_kept_answers(tmp_path, [archive(*case).read_bytes() for case in hostile])


def _refuse_kept_answers(folder: Path, archives: list[bytes]) -> None:
    """A kept answer that is not what foldcp kept is dropped, and the server is asked again."""
    asked: list[str] = []
    keep, fresh = folder / "msa", folder / "fresh"
    known = keep / "one_env"

    def ask(x: Any, prefix: Path, **options: Any) -> Any:
        if Path(prefix).parent == keep:
            return mmseqs2.run_mmseqs2(x, str(prefix), **options)
        (fresh / "one_env").mkdir()
        asked.append("asked")
        return asked[-1]

    options = {"use_env": True, "use_pairing": False, "pairing_strategy": "greedy"}
    keep.mkdir()
    fresh.mkdir()
    spoil: list[Callable[[], Any]] = [
        lambda: known.symlink_to(folder / "answer"),
        lambda: (known.mkdir(), os.mkfifo(known / "uniref.a3m")),
        lambda: (known.mkdir(), (known / "uniref.a3m").symlink_to(folder / "victim")),
    ]
    spoil += [lambda a=a: (known.mkdir(), (known / "out.tar.gz").write_bytes(a)) for a in archives]
    with prediction() as run:
        run.alignments.answers = keep
        for make in spoil:
            make()
            assert answers.keeping(ask)(["MQ"], fresh / "one", **options) == "asked"
            known.rmdir()  # what was asked for anew is empty
    assert len(asked) == len(spoil) and (folder / "victim").read_text() == "as it was"


def test_every_place_that_joins_a_name_or_opens_a_file_was_reviewed() -> None:
    """A new place must be looked at, and written into reviewed_paths.txt with why it is safe."""
    lines = (Path(__file__).parent / "reviewed_paths.txt").read_text().splitlines()
    rows = [line.split(" | ", 2) for line in lines if line and not line.startswith("#")]
    reasons = {line.split(": ")[0][2:] for line in lines if line.startswith("# ") and ": " in line}
    assert all(len(row) == 3 and row[0] in reasons for row in rows)
    reviewed = {(row[1], row[2]) for row in rows}
    root = Path(__file__).parents[2]
    found = scan(root, "foldcp/**/*.py") | scan(root, "foldcp_kernels/**/*.py")
    stock = scan(Path(boltz.__file__).parent.parent, "boltz/main.py")
    stock |= scan(Path(boltz.__file__).parent.parent, "boltz/data/**/*.py")
    found |= {p for p in stock if "/training" not in p[0] and "/filter/" not in p[0]}
    new = "\n".join(f"REASON | {file} | {text}" for file, text in sorted(found - reviewed))
    assert not new, f"not in tests/runs/reviewed_paths.txt; is the name checked?\n{new}"
    assert not reviewed - found, "no longer there: remove them from tests/runs/reviewed_paths.txt"
