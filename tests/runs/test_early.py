"""What is wrong with a command is said before torch and Boltz are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from foldcp.boltz.command import declared, early
from foldcp.config import Config
from foldcp.errors import UserError
from foldcp.runtime import launch
from foldcp.runtime.place import Place

PROTEIN = "version: 1\nsequences:\n  - protein: {id: A, sequence: MQIFVKT, msa: empty}\n"
SRUN = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "7", "SLURM_NODELIST": "n1"}  # fmt: skip
CASES: dict[str, tuple[list[str], dict[str, str], int, str]] = {
    "spelt": (["one.yaml"], {"Foldcp_n_proc": "2"}, 1, "did you mean FOLDCP_NPROC?"),
    "run together": (["one.yaml"], {"FOLDCPMESH": "1x1"}, 1, "did you mean FOLDCP_MESH?"),
    "ours": (["one.yaml", "--nprocs", "2"], {}, 2, "`foldcp predict ... --nproc VALUE`"),
    "kernels": (["one.yaml"], {"FOLDCP_KERNELS": "triton"}, 1, "needs a GPU, but this run is on"),
    "graphs": (["one.yaml"], {"FOLDCP_GRAPHS": "1"}, 1, "use FOLDCP_GRAPHS=auto"),
    "boltz1": (["one.yaml", "--model", "boltz1"], {"FOLDCP_PRECISION": "bf16"}, 1, "auto or fp32"),
    "tf32": (["one.yaml"], {"FOLDCP_PRECISION": "tf32"}, 1, "use auto, fp32 or bf16"),
    "group": (["one.yaml"], {"FOLDCP_PRECISION": "bf16,token=tf32"}, 1, "groups are pair, contra"),
    "no gpu": (["one.yaml", "--accelerator", "gpu"], {"CUDA_VISIBLE_DEVICES": ""}, 1,
               "no GPU is visible here: pass --accelerator cpu"),
    "names": (["names"], {}, 1, "one.fasta and one.yaml would both be called one: rename one of"),
    "path": (["nowhere.yaml"], {}, 2, "'nowhere.yaml' does not exist. (see `boltz"),
    "checkpoint": (["one.yaml", "--checkpoint", "x.ckpt"], {}, 2, "'x.ckpt' does not exist"),
    "option": (["one.yaml", "--samplingsteps", "9"], {}, 2, "--sampling_steps"),
    "number": (["one.yaml", "--sampling_steps", "1"], {}, 1, "must be at least 2, got 1"),
    "devices": (["one.yaml", "--devices", "2"], {}, 1, "start 2 processes instead"),
    "no devices": (["one.yaml", "--devices", "0"], {}, 1, "one process per GPU"),
    "secret": (["one.yaml"], {"FOLDCP_SECRET": "guess"}, 1, "at least 16 characters, got 5"),
    "larger mesh": (["one.yaml"], {"FOLDCP_NPROC": "4", "FOLDCP_MESH": "2x1"}, 1, "or FOLDCP_DP=2"),
    "accelerator": (["one.yaml", "--accelerator", "tpu"], {}, 1, "use gpu or cpu"),
    "variable": (["one.yaml"], {"FOLDCP_NPRC": "2"}, 1, "did you mean FOLDCP_NPROC?"),
    "value": (["one.yaml"], {"FOLDCP_MESH": "2by2"}, 1, "FOLDCP_MESH must be auto or ROWSxCOLUMNS"),
    "mesh": (["one.yaml"], {"FOLDCP_NPROC": "4", "FOLDCP_MESH": "3x1"}, 1, "3x1 needs 3 ranks"),
    "groups": (["one.yaml"], {"FOLDCP_NPROC": "4", "FOLDCP_DP": "3"}, 1, "a multiple of 3 ranks"),
    "folder": (["mixed"], {}, 1, "mixed/notes.txt is not an input: inputs are .yaml and .fasta"),
    "nested": (["nested"], {}, 1, "nested/inner is a folder among the inputs"),
    "nothing": (["nothing"], {}, 1, "there is no input: give a .yaml or .fasta file"),
    "out": (["one.yaml", "--out_dir", "one.yaml"], {}, 1, "(Not a directory): pass --out_dir with"),
    "cache": (["one.yaml", "--cache", "one.yaml/x"], {}, 1, "(Not a directory): pass --cache with"),
    "launcher": (["one.yaml"], {"RANK": "x", "WORLD_SIZE": "2"}, 1, "(RANK is 'x', not a number)"),
    "step": (["one.yaml"], {**SRUN, "SLURM_NTASKS": "2", "SLURM_LOCALID": ""}, 1,
             "(SLURM_LOCALID is '', not a number)"),
    "report": (["one.yaml"], {"FOLDCP_REPORT": "no/r.json"}, 1, "no/r.json cannot be"),
}  # fmt: skip


ONE = "boltz predict one.yaml --accelerator cpu "
# Case -> of its message, what to do, and a command and variables that do so and nothing else.
REMEDIES: list[tuple[str, str, str, dict[str, str]]] = [
    ("spelt", "did you mean FOLDCP_NPROC?", ONE, {"FOLDCP_NPROC": "2"}),
    ("spelt", "Otherwise unset it", ONE, {}),
    ("run together", "did you mean FOLDCP_MESH?", ONE, {"FOLDCP_MESH": "1x1"}),
    ("ours", "type `foldcp predict ... --nproc VALUE`",
     "foldcp predict one.yaml --accelerator cpu --nproc 2", {}),
    ("ours", "or set FOLDCP_NPROC", ONE, {"FOLDCP_NPROC": "2"}),
    ("kernels", "use auto", ONE, {"FOLDCP_KERNELS": "auto"}),
    ("graphs", "use FOLDCP_GRAPHS=auto", ONE, {"FOLDCP_GRAPHS": "auto"}),
    ("boltz1", "use auto", ONE + "--model boltz1", {"FOLDCP_PRECISION": "auto"}),
    ("boltz1", "or fp32", ONE + "--model boltz1", {"FOLDCP_PRECISION": "fp32"}),
    ("tf32", "use auto", ONE, {"FOLDCP_PRECISION": "auto"}),
    ("tf32", "fp32 or bf16", ONE, {"FOLDCP_PRECISION": "bf16"}),
    ("no gpu", "pass --accelerator cpu", ONE, {"CUDA_VISIBLE_DEVICES": ""}),
    ("option", "--sampling_steps", ONE + "--sampling_steps 9", {}),
    ("number", "at least 2", ONE + "--sampling_steps 2", {}),
    ("devices", "FOLDCP_NPROC=2 boltz predict", ONE, {"FOLDCP_NPROC": "2"}),
    ("no devices", "FOLDCP_NPROC=auto boltz predict", ONE, {"FOLDCP_NPROC": "auto"}),
    ("accelerator", "use gpu or cpu", ONE, {}),
    ("variable", "did you mean FOLDCP_NPROC?", ONE, {"FOLDCP_NPROC": "2"}),
    ("value", "must be auto", ONE, {"FOLDCP_MESH": "auto"}),
    ("value", "example 2x4", "foldcp predict one.yaml --accelerator cpu", {"FOLDCP_MESH": "2x4"}),
    ("mesh", "`foldcp run --nproc 3 predict ...`", "foldcp run --nproc 3 predict one.yaml "
     "--accelerator cpu", {"FOLDCP_NPROC": "4", "FOLDCP_MESH": "3x1"}),
    ("mesh", "or set FOLDCP_MESH=auto", ONE, {"FOLDCP_NPROC": "4", "FOLDCP_MESH": "auto"}),
    ("larger mesh", "or FOLDCP_DP=2", ONE,
     {"FOLDCP_NPROC": "4", "FOLDCP_MESH": "2x1", "FOLDCP_DP": "2"}),
    ("groups", "start 3 ranks", ONE, {"FOLDCP_NPROC": "3", "FOLDCP_DP": "3"}),
    ("groups", "FOLDCP_DP to a divisor of 4", ONE, {"FOLDCP_NPROC": "4", "FOLDCP_DP": "2"}),
    ("out", "pass --out_dir with a folder", ONE + "--out_dir new/out", {}),
    ("cache", "pass --cache with a folder", ONE + "--cache new", {}),
    ("report", "in a folder that exists", ONE, {"FOLDCP_REPORT": "r.json"}),
    ("launcher", "unset RANK, and", ONE, {"WORLD_SIZE": "2"}),
    ("launcher", "start with `foldcp run --nproc N predict ...`",
     "foldcp run --nproc 2 predict one.yaml --accelerator cpu", {"WORLD_SIZE": "2"}),
    ("launcher", "torchrun or srun", ONE, SRUN),
    ("step", "unset SLURM_PROCID, and", ONE, {k: x for k, x in SRUN.items() if x != "0"}),
    ("secret", "openssl rand -hex 16", ONE, {"FOLDCP_SECRET": "0123456789abcdef" * 2}),
]  # fmt: skip


# Of the commands of foldcp: what is refused, what is advised, and what then is typed.
CORRECTIONS = (
    ("foldcp predic one.yaml", "did you mean predict?", "foldcp predict one.yaml"),
    ("foldcp run one.yaml", "type `foldcp predict INPUT ...`", "foldcp predict one.yaml"),
    ("foldcp predict --nproc= one.yaml", "example --nproc 4", "foldcp predict --nproc 4 one.yaml"),
    ("foldcp predict --mesh 3 one.yaml", "example 2x4", "foldcp predict --mesh 2x4 one.yaml"),
    ("foldcp predict one.yaml", "`-m boltz.main predict ...` (torchrun) with FOLDCP=1",
     "python -m boltz.main predict one.yaml"),
    ("foldcp predict one.yaml", "`boltz predict ...` (srun)", "boltz predict one.yaml"),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and a torch and a Lightning that end whoever imports them."""
    folder = tmp_path_factory.mktemp("early")
    for name in (
        "poison/torch",
        "poison/pytorch_lightning",
        "mixed",
        "nested/inner",
        "nothing",
        "names",
    ):
        (folder / name).mkdir(parents=True)
    for name in ("torch", "pytorch_lightning"):
        (folder / "poison" / name / "__init__.py").write_text(f"raise SystemExit('{name} ran')")
    for name in ("one.yaml", "mixed/one.yaml", "nested/one.yaml", "names/one.yaml"):
        (folder / name).write_text(PROTEIN)
    for name in ("mixed/notes.txt", "names/one.fasta"):
        (folder / name).touch()
    return folder


def run(folder: Path, command: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FOLDCP")}
    env |= {"FOLDCP": "1", "PYTHONPATH": str(folder / "poison"), **variables}
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder, timeout=60)


@pytest.mark.parametrize("name", CASES)
def test_said_at_once(name: str, folder: Path) -> None:
    arguments, variables, code, said = CASES[name]
    if "--accelerator" not in arguments:
        arguments = [*arguments, "--accelerator", "cpu"]
    boltz = [str(Path(sys.executable).with_name("boltz")), "predict", *arguments]
    ended = run(folder, boltz, variables)
    assert ended.returncode == code and ended.stdout == "", ended
    (line,) = ended.stderr.splitlines()
    assert line.startswith("foldcp: ") and said in line


@pytest.mark.parametrize("row", REMEDIES, ids=lambda row: f"{row[0]}: {row[1]}")
def test_doing_what_it_says_helps(row: tuple[str, str, str, dict], folder: Path) -> None:
    """Then the run comes to torch, which is the poisoned one here."""
    name, advice, command, variables = row
    arguments, wrong, _, _ = CASES[name]
    boltz = str(Path(sys.executable).with_name("boltz"))
    accelerator = [] if "--accelerator" in arguments else ["--accelerator", "cpu"]
    refused = run(folder, [boltz, "predict", *arguments, *accelerator], wrong).stderr
    assert advice in refused
    begin = {"boltz": [boltz], "foldcp": [sys.executable, str(launch.STARTER)]}
    first, *rest = command.split()
    ended = run(folder, [*begin[first], *rest], variables)
    lines = ended.stderr.splitlines()
    assert lines.pop().endswith(" ran"), ended
    assert all(line.startswith("foldcp: auto starts one process") for line in lines), ended


@pytest.mark.parametrize("row", CORRECTIONS, ids=lambda row: f"{row[0]}: {row[1]}")
def test_typing_what_it_says_helps(row: tuple[str, str, str], folder: Path) -> None:
    """The last two under a launcher, of which no other rank comes."""
    wrong, advice, right = row
    boltz = str(Path(sys.executable).with_name("boltz"))
    begin = {
        "boltz": [boltz],
        "foldcp": [sys.executable, str(launch.STARTER)],
        "python": [sys.executable],
    }
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29999", "TORCHELASTIC_RUN_ID": "x"}  # fmt: skip
    variables = rank if "(srun)" in advice or "(torchrun)" in advice else {}

    def typed(command: str) -> str:
        first, *rest = command.split()
        return run(folder, [*begin[first], *rest, "--accelerator", "cpu"], variables).stderr

    assert advice in typed(wrong)
    assert typed(right).splitlines()[-1].endswith(" ran")


def test_what_is_right_goes_on(folder: Path) -> None:
    """To torch, which is the poisoned one here; and `foldcp predict` refuses before it, too."""
    on_cpu = ["one.yaml", "--accelerator", "cpu"]
    boltz = [str(Path(sys.executable).with_name("boltz")), "predict", *on_cpu]
    assert "ran" in run(folder, boltz, {}).stderr
    assert "ran" in run(folder, [*boltz, "--help"], {}).stderr
    starter = [sys.executable, str(launch.STARTER), "predict", "--nproc", "2"]
    assert "does not exist" in run(folder, [*starter, "nowhere.yaml"], {}).stderr
    begun = run(folder, [*starter, *on_cpu], {})
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
    with pytest.raises(UserError, match="DS_Store is not an input"):
        early.check_inputs(tmp_path)


def test_a_program_is_not_left_on_one_rank_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/fold.py", "predict"])
    for asked, number in ((2, 2), ("auto", "gpu")):
        remedy = f"FOLDCP_NPROC={asked} starts .* `torchrun --nproc-per-node {number} fold.py`"
        with pytest.raises(UserError, match=remedy):
            early.check_launch(Config(nproc=asked), Place())
    early.check_launch(Config(nproc=1), Place())
    early.check_launch(Config(nproc=2), Place(world=2))
    monkeypatch.setattr(sys, "argv", ["/env/bin/boltz", "predict"])
    early.check_launch(Config(nproc=2), Place())
