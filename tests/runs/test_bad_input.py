"""What a user gets wrong ends every rank soon, with one message that names the remedy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import Case, Ended, run_cases

from foldcp import __version__
from foldcp.runtime.files.holder import Holder
from foldcp.runtime.files.lock import NAME

PROTEIN = "version: 1\nsequences:\n  - protein: {id: A, sequence: MQIFVKT, msa: empty}\n"
WITH_ION = PROTEIN + "  - ligand: {id: B, ccd: MG}\n"
BROKEN = "sequences:\n  - protein: [oops\n"
NO_NETWORK = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}

# Case -> what its one message must say. The exit code is 1 on every rank, 2 where click speaks.
EXPECTED = {
    "mesh": ("mesh 3x1 needs 3 ranks but 2 were started", "FOLDCP_MESH=auto"),
    "variable": ("FOLDCP_ROUTE must be direct or ring, got 'detour'",),
    "nproc": ("FOLDCP_NPROC is 4 but a job operator started 2 ranks",),
    "devices": ("--devices 2 cannot be combined with FOLDCP=1", "torchrun --nproc-per-node 2"),
    "numbers": ("--diffusion_samples must be at least 1, got 0", "--num_workers must be at least"),
    "report": ("nowhere/r.json cannot be written", "in a folder that exists"),
    "interface": ("GLOO_SOCKET_IFNAME is mlx7", "or unset it"),
    "gpu": ("no GPU is visible here: pass --accelerator cpu",),
    "arguments": ("argument --step_scale is 2.0 on rank 1 and None on rank 0", "same command"),
    "content": ("content of other.yaml", "same command, input files"),
    "settings": ("setting chunk_mb is 7 on rank 1 and None on rank 0",),
    "kernels": ("FOLDCP_KERNELS=triton needs a GPU, but this run is on cpu",),
    "other kernels": ("setting kernels is 'torch' on rank 1 and 'auto' on rank 0",),
    "lonely": ("could not meet rank 0 at 127.0.0.1:9 within 2 s", "check that all ranks"),
    "missing input": ("does not exist", "boltz predict --help"),
    "missing checkpoint": ("'--checkpoint'", "does not exist"),
    "nan weights": ("nan.ckpt is damaged: pairformer_module", "holds 1 NaN", "--checkpoint"),
    "other weights": ("loaded other weights than rank", "give every rank the same checkpoint"),
    "folders": ("Found directory", "instead of .fasta or .yaml"),
    "same name": ("a.fasta and a.yaml would both be called a: rename one of them",),
    "no input": ("there is no input: give a .yaml or .fasta file",),
    "graphs": ("FOLDCP_GRAPHS=1 records", "2 ranks exchange tiles in it: use FOLDCP_GRAPHS=auto"),
    "groups": ("FOLDCP_DP=3 groups need a multiple of 3 ranks, but 2 were started",),
    "broken checkpoint": ("cannot be loaded", "pass --checkpoint"),
    "download": ("are not complete in", "--cache"),
    "unwritable": ("--out_dir folder", "pass --out_dir with a folder that you may write to"),
    "taken": ("another run is at work in", f"process {os.getpid()} on", "or pass another --out"),
    "broken": ("1 input(s) could not be folded: broken.yaml (line 2: it is no", "Correct them"),
    "some broken": ("1 input(s) could not be folded: broken.yaml (line 2: it is", "Correct them"),
    "no features": ("could not be folded: first (its features", "finished predictions are kept"),
    "raise": ("rank 1 failed in ", "(RuntimeError: rigged to fail)", "predictions are kept"),
    "kill": ("rank 1 (in ", "is gone: its process was killed", "memory"),
}  # fmt: skip


def _cases(folder: Path, cache: Path) -> dict[str, Case]:
    inputs = {"one": PROTEIN, "other": WITH_ION, "broken": BROKEN}
    for name, text in inputs.items():
        (folder / f"{name}.yaml").write_text(text)
    for name, files in {"mixed": "good broken", "pair": "first second"}.items():
        (folder / name).mkdir()
        for file in files.split():
            text = {"broken": BROKEN, "first": WITH_ION}.get(file, PROTEIN)
            (folder / name / f"{file}.yaml").write_text(text)
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "other.yaml").write_text(PROTEIN)
    (folder / "broken.ckpt").write_bytes(b"not a checkpoint")
    (folder / "nested" / "inner").mkdir(parents=True)
    (folder / "nothing").mkdir()
    (folder / "taken" / "boltz_results_one").mkdir(parents=True)
    (folder / "taken" / "boltz_results_one" / NAME).write_bytes(Holder.own().written())
    (folder / "twins").mkdir()
    for suffix in ("yaml", "fasta"):
        (folder / "twins" / f"a.{suffix}").write_text(PROTEIN)
    _spoil(cache, folder)
    without_ion = folder / "without_ion"
    shutil.copytree(cache, without_ion, symlinks=True, ignore=shutil.ignore_patterns("MG.pkl"))
    fast = "--accelerator cpu --num_workers 0 --sampling_steps 2 --recycling_steps 0 --seed 1"

    def predict(data: str, *more: str, out: str = "out", at: Path = cache) -> list[str]:
        places = ["--out_dir", str(folder / out), "--cache", str(at)]
        return ["predict", str(folder / data), *fast.split(), *places, *more]

    one = predict("one.yaml")
    return {
        "mesh": Case(one, 2, {"FOLDCP_MESH": "3x1"}),
        "variable": Case(one, 2, {"FOLDCP_ROUTE": "detour"}),
        "nproc": Case(one, 2, {"FOLDCP_NPROC": "4"}),
        "devices": Case([*one, "--devices", "2"], 2),
        "numbers": Case([*one, "--diffusion_samples", "0", "--num_workers", "-1"], 2),
        "report": Case(one, 2, {"FOLDCP_REPORT": str(folder / "nowhere" / "r.json")}),
        "interface": Case(one, 2, {"GLOO_SOCKET_IFNAME": "mlx7"}),
        "gpu": Case([*one, "--accelerator", "gpu"], environ={"CUDA_VISIBLE_DEVICES": ""}),
        "arguments": Case(one, 2, rank_arguments={1: ["--step_scale", "2"]}),
        "content": Case(["predict", "other.yaml", *one[2:]], 2, rank_folder={
            0: str(folder), 1: str(folder / "elsewhere")}),
        "settings": Case(one, 2, rank_environ={1: {"FOLDCP_CHUNK_MB": "7"}}),
        "kernels": Case(one, 2, {"FOLDCP_KERNELS": "triton"}),
        "other kernels": Case(one, 2, rank_environ={1: {"FOLDCP_KERNELS": "torch"}}),
        "lonely": Case(one, 1, {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                                "MASTER_PORT": "9", "FOLDCP_TIMEOUT": "2"}),
        "missing input": Case(predict("nowhere.yaml"), 2),
        "missing checkpoint": Case([*one, "--checkpoint", "nowhere.ckpt"], 2),
        "nan weights": Case([*one, "--checkpoint", str(folder / "nan.ckpt")], 2),
        "other weights": Case([*one, "--checkpoint", "w.ckpt"], 2, rank_folder={
            0: str(folder), 1: str(folder / "elsewhere")}),
        "folders": Case(predict("nested"), 2),
        "same name": Case(predict("twins"), 2),
        "no input": Case(predict("nothing"), 2),
        "graphs": Case(one, 2, {"FOLDCP_GRAPHS": "1"}),
        "groups": Case(one, 2, {"FOLDCP_DP": "3"}),
        "broken checkpoint": Case([*one, "--checkpoint", str(folder / "broken.ckpt")], 2),
        "download": Case(predict("one.yaml", at=folder / "empty"), 2, NO_NETWORK),
        "unwritable": Case(predict("one.yaml", out="one.yaml"), 2),
        "taken": Case(predict("one.yaml", out="taken"), 2),
        "broken": Case(predict("broken.yaml"), 2),
        "some broken": Case(predict("mixed"), 2),
        "folded": Case(predict("pair")),
        "no features": Case(predict("pair", "--override", at=without_ion), 2),
        "raise": Case(predict("pair", out="raise"), 2, rig="raise 1 1"),
        "kill": Case(predict("pair", out="kill"), 2, rig="kill 1 1"),
        "srun": Case(predict("one.yaml", out="srun"), 2, slurm=True),
    }  # fmt: skip


def _spoil(cache: Path, folder: Path) -> None:
    """Checkpoints with a NaN, and with a weight that one rank has otherwise."""
    data = torch.load(cache / "boltz2_conf.ckpt", weights_only=False)
    torch.save(data, folder / "w.ckpt")
    name = next(k for k in data["state_dict"] if k.startswith("pairformer_module"))
    data["state_dict"][name].view(-1)[0] += 1
    torch.save(data, folder / "elsewhere" / "w.ckpt")
    data["state_dict"][name].view(-1)[0] = float("nan")
    torch.save(data, folder / "nan.ckpt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad_input")


@pytest.fixture(scope="module")
def ends(folder: Path, small_cache: Path) -> dict[str, Ended]:
    return run_cases(_cases(folder, small_cache))


@pytest.mark.parametrize("name", EXPECTED)
def test_one_message_and_every_rank_ends(name: str, ends: dict[str, Ended]) -> None:
    end = ends[name]
    code = 2 if name.startswith("missing") else 1
    expected = [code] * len(end.codes)
    if name == "kill":
        expected[1] = -9
    # A rank that hears of another's failure ends with 1 whatever the first one's code is.
    assert all(c in (e, 1) for c, e in zip(end.codes, expected, strict=True)), end
    assert end.spread < 10 and end.seconds < 30, end
    messages = end.messages()
    assert len(messages) == 1, end.stderr
    for part in EXPECTED[name]:
        assert part in messages[0]
    assert name != "lonely" or "frame #" not in end.stderr[0]  # of torch's C++ calls


def test_finished_predictions_stay(folder: Path, ends: dict[str, Ended]) -> None:
    assert ends["folded"].codes == [0] and ends["srun"].codes == [0, 0], ends["srun"]
    for out, names in {"raise": 1, "kill": 1, "srun": 1, "out": 3}.items():
        written = list((folder / out).glob("boltz_results_*/predictions/*/*_model_0.cif"))
        assert len(written) == names, (out, written)
    assert not list(folder.glob("*/boltz_results_*/.partial_*"))
    log = (folder / "out" / "boltz_results_pair" / "foldcp.log").read_text()
    assert "failed: first: its features" in log and "Molecule loading failed for first" in log
    assert not list((folder / "empty").glob("*.ckpt"))


def test_srun_prints_one_start_line(ends: dict[str, Ended]) -> None:
    root, other = ends["srun"].stdout
    lines = [line for line in root.splitlines() if line.startswith(f"foldcp {__version__}: ")]
    assert len(lines) == 1 and other == ""
    assert "1x2 mesh, 2 CPU ranks (srun), fp32, host transport, 7 tokens" in lines[0]
    assert "1 folded in " in root and "memory, not time: for 7 tokens one process is" in root


@pytest.mark.parametrize(
    ("hide", "message"),
    [
        ("machinery.PathFinder.find_spec = lambda n, *a: None if n == 'boltz' else find(n, *a)",
         "boltz is not installed for"),
        ("metadata.version = lambda name: '2.1.1'", "boltz 2.1.1 is not supported"),
    ],
)  # fmt: skip
def test_boltz_missing_or_of_another_version(hide: str, message: str) -> None:
    code = (
        "import sys; from importlib import machinery, metadata; import foldcp_boot\n"
        f"find = machinery.PathFinder.find_spec; {hide}\n"
        "foldcp_boot.install(); sys.argv = ['boltz', 'predict', 'x.yaml']; import boltz.main"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert message in line and "pip install" in line
