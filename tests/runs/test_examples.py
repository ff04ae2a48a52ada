"""Every example runs, and is named in examples/README.md; small untrained weights, few steps."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gemmi
import numpy as np
import pytest
from forked import BLOCKS, Case, Ended, run_cases

from bench.synthetic import make_cache

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
INPUTS = sorted((EXAMPLES / "inputs").iterdir())
FAST = "--accelerator cpu --num_workers 0 --sampling_steps 2 --recycling_steps 0 --seed 1"
FAST_AFFINITY = "--sampling_steps_affinity 2 --diffusion_samples_affinity 1"
RESIDUES = 24  # of the protein whose affinity is asked for: that pass is stock's, a minute for all
PROTEIN = "version: 1\nsequences:\n  - protein: {id: A, sequence: MQIFVKT, msa: empty}\n"
PROGRAMS = {  # name of a run -> (file, ranks, arguments)
    "python": ("predict_in_python.py", 1, ["--sampling-steps", "2", "--save", "insulin.cif"]),
    "exchange host": ("custom_exchange.py", 4, []),
    "exchange gloo": ("custom_exchange.py", 4, ["gloo"]),
    "kernels": ("kernels_alone.py", 1, ["--tokens", "17"]),
    "snippet": ("fold_cp_snippet.py", 4, []),
    "porting": ("porting/pairformer_on_a_mesh.py", 4, []),
}
IMPORTED = "porting/miniature.py"  # by a program
SCRIPTS = ("torchrun.sh", "slurm.sbatch")
NOTEBOOK = EXAMPLES / "who_holds_what.ipynb"
# What srun does with a command: as many tasks as the job has, each knows its number.
SRUN = """#!/bin/bash
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_ID=0 \\
        SLURM_STEP_NUM_TASKS=$SLURM_NTASKS SLURM_STEP_NUM_NODES=1 "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit; done
"""


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def ended(at: Path) -> dict[str, Ended]:
    """All inputs as a folder, on two groups of one rank, and all programs."""
    cache = make_cache(at / "cache", "tiny", ["boltz2", "boltz2_affinity"], blocks=BLOCKS)
    variables = {"BOLTZ_CACHE": str(cache)}
    folder = shutil.copytree(EXAMPLES / "inputs", at / "inputs")
    text = (folder / "affinity.yaml").read_text()
    shorter = re.sub(rf"(sequence: \w{{{RESIDUES}}})\w+", r"\1", text)
    assert shorter != text
    (folder / "affinity.yaml").write_text(shorter)
    arguments = ["predict", str(folder), "--out_dir", str(at), *FAST.split()]
    arguments += FAST_AFFINITY.split()
    cases = {"inputs": Case(arguments, 2, {**variables, "FOLDCP_DP": "2"}, rig="real")}
    for name, (file, ranks, words) in PROGRAMS.items():
        words = [str(at / word) if word.endswith(".cif") else word for word in words]
        text = (EXAMPLES / file).read_text()
        if "/" in file:  # as for a script, what lies beside it can be imported
            text = f"import sys; sys.path.append({str((EXAMPLES / file).parent)!r})\n" + text
        cases[name] = Case(words, ranks, variables, rig="real", program=text)
    return run_cases(cases)


def _printed(ended: dict[str, Ended], name: str) -> str:
    run = ended[name]
    assert set(run.codes) == {0}, "\n".join(run.stderr)[-4000:]
    return "\n".join(run.stdout)


def test_every_file_runs_and_is_named() -> None:
    files = {p.relative_to(EXAMPLES).as_posix() for p in EXAMPLES.rglob("*") if p.is_file()}
    read = set(re.findall(r"examples/(files/\w+\.\w+)", "".join(p.read_text() for p in INPUTS)))
    run = {file for file, _, _ in PROGRAMS.values()} | {*SCRIPTS, NOTEBOOK.name, IMPORTED}
    run |= {f"inputs/{path.name}" for path in INPUTS}
    assert files == run | read | {"README.md"}
    readme = (EXAMPLES / "README.md").read_text()
    named = set(re.findall(r"\]\(([\w./]+)\)", readme))
    assert named == files - {"README.md"} | {"inputs"}
    for row in re.findall(r"^\| \[(?:[\w./]+)\]\(([\w./]+)\) \| `(.*?)` \|", readme, re.MULTILINE):
        assert f"examples/{row[0]}" in row[1], "the command is that of another file"
    for path in EXAMPLES.iterdir():
        if path.is_file() and path.suffix in (".py", ".sh", ".sbatch"):
            assert "Look at:" in path.read_text().partition("\n\n\n")[0], path.name


def test_inputs(ended: dict[str, Ended], at: Path) -> None:
    first = _printed(ended, "inputs")
    assert "2 groups of 1x1 mesh, 2 CPU ranks (" in first
    assert f"fp32, {len(INPUTS)} inputs of 47 to 76 tokens" in first
    assert f"{len(INPUTS)} folded, 1 with affinity" in first
    results = at / "boltz_results_inputs"
    chains = {"ubiquitin": 1, "heterodimer": 2, "tetramer": 4, "affinity": 2, "template": 2,
              "constraints": 3}  # fmt: skip
    for name, count in chains.items():
        folder = results / "predictions" / name
        structure = gemmi.read_structure(str(folder / f"{name}_model_0.cif"))
        told = json.loads((folder / f"confidence_{name}_model_0.json").read_text())
        assert len(structure[0]) == len(told["pair_chains_iptm"]) == count
    affinity = json.loads((results / "predictions/affinity/affinity_affinity.json").read_text())
    assert 0 < affinity["affinity_probability_binary"] < 1 and affinity["affinity_pred_value"]
    records = {p.stem: json.loads(p.read_text()) for p in results.glob("processed/records/*.json")}
    assert [t["query_chain"] for t in records["template"]["templates"]] == ["A", "B"]
    held = records["constraints"]["inference_options"]
    assert held["pocket_constraints"] and held["contact_constraints"]
    bonded = np.load(results / "processed/structures/constraints.npz")["bonds"]
    assert len(bonded) == 3 + 7, "disulfide bonds, and those of phenol"


def test_the_helix_is_what_it_says() -> None:
    (chain,) = gemmi.read_structure(str(EXAMPLES / "files/helix.cif"))[0]
    angles = [
        np.degrees(gemmi.calculate_phi_psi(*residues))
        for residues in zip(chain, list(chain)[1:], list(chain)[2:], strict=False)
    ]
    assert len(angles) == 31 and np.abs(np.array(angles) - (-57, -47)).max() < 0.5


def test_predict_in_python(ended: dict[str, Ended], at: Path) -> None:
    text = _printed(ended, "python")
    assert "insulin: 51 tokens, " in text and "chain B: mean pLDDT 0." in text
    (count,) = re.findall(r"(\d+) CA atoms", text)
    (structure,) = gemmi.read_structure(str(at / "insulin.cif"))
    assert int(count) == sum(len(chain) for chain in structure) == 51


@pytest.mark.parametrize("transport", ["host", "gloo"])
def test_custom_exchange(transport: str, ended: dict[str, Ended]) -> None:
    text = _printed(ended, f"exchange {transport}")
    found = re.findall(r"rank (\d) \((\w+)\): off by (\S+), gradients by (\S+)", text)
    assert sorted(rank for rank, *_ in found) == list("0123")
    for _, name, off, gradients in found:
        assert name == transport and float(off) < 1e-12 and float(gradients) < 1e-11
    # The ring: from step 1 on rank 0 hears from rank 1 only, whoever owns the tokens.
    senders = re.findall(r"step (\d): tokens \((\d+), \d+\) from rank (\d)", text)
    assert senders == [("1", "5", "1"), ("2", "10", "1"), ("3", "15", "1")]


def test_kernels_alone(ended: dict[str, Ended]) -> None:
    found = re.findall(
        r"(\w+): 17 tokens on \w+, .* error (\S+), of gradients (\S+)", _printed(ended, "kernels")
    )
    assert [name for name, _, _ in found] == ["multiplication", "attention"]
    assert all(0 < float(error) < 1e-5 for _, *errors in found for error in errors), found


def test_porting(ended: dict[str, Ended]) -> None:
    text = _printed(ended, "porting")
    assert "2x2 mesh, 19 tokens, tiles of 10x10" in text
    ((single, pair),) = re.findall(r"error: single (\S+), pair (\S+)", text)
    assert 0 < float(single) < 1e-9 and 0 < float(pair) < 1e-9


def test_fold_cp_snippet(ended: dict[str, Ended]) -> None:
    found = re.findall(
        r"rank (\d) of 4 holds \[1, (\d), (\d), 128\]: error (\S+)", _printed(ended, "snippet")
    )
    shapes = {(rank, rows, cols) for rank, rows, cols, _ in found}
    assert shapes == {("0", "7", "7"), ("1", "7", "6"), ("2", "6", "7"), ("3", "6", "6")}
    assert all(float(error) < 1e-5 for *_, error in found), found


@pytest.mark.parametrize("script", SCRIPTS)
def test_launcher(script: str, at: Path, tiny_cache: Path) -> None:
    path = EXAMPLES / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    work = at / script.replace(".", "_")
    (work / "bin").mkdir(parents=True)
    (work / "bin" / "srun").write_text(SRUN)
    (work / "bin" / "srun").chmod(0o755)
    (work / "one.yaml").write_text(PROTEIN)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FOLDCP", "SLURM"))}
    found = os.pathsep.join([str(work / "bin"), str(Path(sys.executable).parent), clean["PATH"]])
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_NNODES": "1",
           "SLURM_JOB_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
           "ENVIRONMENT": "BATCH"}  # fmt: skip
    more = job if script == "slurm.sbatch" else {"RANKS": "2"}
    done = subprocess.run(
        ["bash", str(path), "one.yaml", "--cache", str(tiny_cache), *FAST.split()],
        env={**clean, **more, "PATH": found, "OMP_NUM_THREADS": "1"},
        cwd=work, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    by = "srun" if script == "slurm.sbatch" else "torchrun"
    assert f"1x2 mesh, 2 CPU ranks ({by}), fp32, host transport, 7 tokens" in done.stdout
    assert (work / "boltz_results_one/predictions/one/one_model_0.cif").is_file()


def test_sbatch_reads_its_options() -> None:
    lines = (EXAMPLES / "slurm.sbatch").read_text().splitlines()
    asked = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    # sbatch looks no further than the first command, and takes a misspelt directive for a comment.
    assert all(line.startswith("#") for line in lines[: asked[-1]])
    options = dict(line.removeprefix("#SBATCH --").split("=", 1) for line in
                   (lines[i] for i in asked))  # fmt: skip
    assert options["ntasks-per-node"] == options["gpus-per-node"], "one task per GPU"
    assert options.keys() == {"job-name", "nodes", "ntasks-per-node", "gpus-per-node",
                              "cpus-per-task", "time", "output"}  # fmt: skip


def test_notebook_prints_what_it_holds(tmp_path: Path) -> None:
    again = tmp_path / "again.ipynb"
    write = [sys.executable, str(ROOT / "tests" / "support" / "notebook.py"), str(NOTEBOOK)]
    subprocess.run([*write, str(again)], check=True, cwd=ROOT)
    remedy = "python tests/support/notebook.py FILE FILE"
    assert again.read_text() == NOTEBOOK.read_text(), f"its outputs are old: {remedy}"
    book = json.loads(NOTEBOOK.read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in book["cells"]]
    assert len({*ids}) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", x) for x in ids)
    for cell in book["cells"]:
        own = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | own
    printed = "".join(t for c in book["cells"] for o in c.get("outputs", []) for t in o["text"])
    assert "0 0 0 0 0 0 1 1 1 1 1 1 2 2 2 2 . ." in printed and "step 2" in printed
