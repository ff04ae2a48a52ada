"""What is wrong with a command is said before torch and Boltz are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from foldcp.boltz.command import declared, early
from foldcp.errors import UserError
from foldcp.runtime import launch

PROTEIN = "version: 1\nsequences:\n  - protein: {id: A, sequence: MQIFVKT, msa: empty}\n"
CASES: dict[str, tuple[list[str], dict[str, str], int, str]] = {
    "path": (["nowhere.yaml"], {}, 2, "'nowhere.yaml' does not exist. (see `boltz"),
    "checkpoint": (["one.yaml", "--checkpoint", "x.ckpt"], {}, 2, "'x.ckpt' does not exist"),
    "option": (["one.yaml", "--samplingsteps", "9"], {}, 2, "--sampling_steps"),
    "number": (["one.yaml", "--sampling_steps", "1"], {}, 1, "must be at least 2, got 1"),
    "devices": (["one.yaml", "--devices", "2"], {}, 1, "start 2 processes instead"),
    "accelerator": (["one.yaml", "--accelerator", "tpu"], {}, 1, "use gpu or cpu"),
    "variable": (["one.yaml"], {"FOLDCP_NPRC": "2"}, 1, "did you mean FOLDCP_NPROC?"),
    "value": (["one.yaml"], {"FOLDCP_MESH": "2by2"}, 1, "FOLDCP_MESH must be auto or ROWSxCOLUMNS"),
    "mesh": (["one.yaml"], {"FOLDCP_NPROC": "4", "FOLDCP_MESH": "3x1"}, 1, "3x1 needs 3 ranks"),
    "groups": (["one.yaml"], {"FOLDCP_NPROC": "4", "FOLDCP_DP": "3"}, 1, "a multiple of 3 ranks"),
    "folder": (["mixed"], {}, 1, "mixed/notes.txt is no input: inputs are .yaml and .fasta files"),
    "nested": (["nested"], {}, 1, "nested/inner is a folder among the inputs"),
    "nothing": (["nothing"], {}, 1, "there is no input: give a .yaml or .fasta file"),
    "out": (["one.yaml", "--out_dir", "one.yaml"], {}, 1, "(Not a directory): pass --out_dir with"),
    "cache": (["one.yaml", "--cache", "one.yaml/x"], {}, 1, "(Not a directory): pass --cache with"),
    "report": (["one.yaml"], {"FOLDCP_REPORT": "no/r.json"}, 1, "no/r.json cannot be"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and a torch and a Lightning that end whoever imports them."""
    folder = tmp_path_factory.mktemp("early")
    for name in ("poison/torch", "poison/pytorch_lightning", "mixed", "nested/inner", "nothing"):
        (folder / name).mkdir(parents=True)
    for name in ("torch", "pytorch_lightning"):
        (folder / "poison" / name / "__init__.py").write_text(f"raise SystemExit('{name} ran')")
    for name in ("one.yaml", "mixed/one.yaml", "nested/one.yaml"):
        (folder / name).write_text(PROTEIN)
    (folder / "mixed" / "notes.txt").touch()
    return folder


def run(folder: Path, command: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FOLDCP")}
    env |= {"FOLDCP": "1", "PYTHONPATH": str(folder / "poison"), **variables}
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder, timeout=60)


@pytest.mark.parametrize("name", CASES)
def test_said_at_once(name: str, folder: Path) -> None:
    arguments, variables, code, said = CASES[name]
    boltz = [str(Path(sys.executable).with_name("boltz")), "predict", *arguments]
    ended = run(folder, boltz, variables)
    assert ended.returncode == code and ended.stdout == "", ended
    (line,) = ended.stderr.splitlines()
    assert line.startswith("foldcp: ") and said in line


def test_what_is_right_goes_on(folder: Path) -> None:
    """To torch, which is the poisoned one here; and `foldcp predict` refuses before it, too."""
    boltz = [str(Path(sys.executable).with_name("boltz")), "predict", "one.yaml"]
    assert "ran" in run(folder, boltz, {}).stderr
    assert "ran" in run(folder, [*boltz, "--help"], {}).stderr
    starter = [sys.executable, str(launch.STARTER), "predict", "--nproc", "2"]
    assert "does not exist" in run(folder, [*starter, "nowhere.yaml"], {}).stderr
    begun = run(folder, [*starter, "one.yaml"], {})
    assert begun.stdout == "foldcp: starting 2 ranks\n" and "torch ran" in begun.stderr


def test_the_declaration_is_that_of_boltz(folder: Path) -> None:
    import boltz.main

    source = launch.source_of_boltz()
    assert source == Path(boltz.main.__file__)
    ours, theirs = declared.command(source), boltz.main.predict
    assert ours is not None and len(ours.params) > 30

    def told(command: click.Command) -> list[dict]:
        said = [param.to_info_dict() for param in command.params]
        for param in said:
            if callable(param["default"]):  # once from here and once from there
                param["default"] = param["default"]()
        return said

    assert told(ours) == told(theirs)
    arguments = [str(folder / "one.yaml"), "--seed", "3", "--use_potentials"]
    with theirs.make_context("predict", list(arguments)) as context:
        assert declared.options(ours, arguments) == context.params
    with pytest.raises(click.BadParameter):
        declared.options(ours, ["nowhere.yaml"])


@pytest.mark.parametrize(
    "text", ["", "def predict(", "x = 1", "@nothing.command()\ndef predict():\n  ..."]
)
def test_another_declaration_is_left_to_boltz(text: str, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(text)
    assert declared.command(tmp_path / "main.py") is None


def test_inputs_that_boltz_takes_are_let_through(tmp_path: Path) -> None:
    for name in ("a.fa", "b.FAS", "c.fasta", "d.yml", "e.YAML"):
        (tmp_path / name).touch()
    early.check_inputs(tmp_path)
    early.check_inputs(tmp_path / "a.fa")
    (tmp_path / ".DS_Store").touch()
    with pytest.raises(UserError, match="DS_Store is no input"):
        early.check_inputs(tmp_path)
