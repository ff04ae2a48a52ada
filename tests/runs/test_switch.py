"""Every way to switch Boltz over, for real; and that without FOLDCP nothing changes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import setuptools
import torch

import foldcp_boot
from foldcp import __version__
from foldcp.config import Config
from foldcp.errors import UserError
from foldcp.fabric.policy import STRATEGIES
from foldcp.runtime import allocator
from foldcp.runtime.launch import resolve_processes
from foldcp.runtime.place import Place
from foldcp.runtime.slurm import first_host
from foldcp_kernels._build_info import BUILD

ROOT = Path(__file__).parents[2]
BOLTZ = Path(sys.executable).with_name("boltz")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
PROTEIN = "version: 1\nsequences:\n  - protein: {id: A, sequence: MQIFVKT, msa: empty}\n"
FAST = "--accelerator cpu --num_workers 0 --sampling_steps 2 --recycling_steps 0 --seed 1"
# What a rank's environment says when it imports torch, which takes no GPU memory before that.
PROBE = """
import os, sys
def hear(event, given):
    if event == "import" and given[0] == "torch" and not seen:
        seen.append(0)
        names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
        conf = ",".join(os.environ.get(name, "-") for name in names)
        with open(os.environ["PROBED"], "a") as file:
            file.write(f"{os.environ.get('RANK', 'alone')} {conf}\\n")
seen = []
sys.addaudithook(hear)
"""
WAYS = {  # name -> (command in front of `predict`, variables, mesh of the start line)
    "console script": ([str(BOLTZ)], {"FOLDCP": "1"}, "1x1 mesh, 1 CPU rank"),
    "torchrun": ([*TORCHRUN, "-m", "boltz.main"],
                 {"FOLDCP": "1", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"},
                 "1x2 mesh, 2 CPU ranks (torchrun)"),
    # Replaces itself by `foldcp run --nproc 2 predict ...`, whose ranks are `foldcp boltz ...`;
    # whatever one-rank variables and torchrun's defaults of another run leak into it.
    "re-exec": ([str(BOLTZ)],
                {"FOLDCP": "1", "FOLDCP_NPROC": "2", "FOLDCP_MESH": "2x1", "RANK": "0",
                 "WORLD_SIZE": "1", "PET_MASTER_ADDR": "job-master-0", "PET_NNODES": "2",
                 "PET_MASTER_PORT": "23456", "PET_RDZV_BACKEND": "c10d", "PET_STANDALONE": "1"},
                "2x1 mesh, 2 CPU ranks (foldcp)"),
    "python -m boltz.main": ([sys.executable, "-m", "boltz.main"],
                             {"FOLDCP": "1", "FOLDCP_NPROC": "auto"}, "1x1 mesh, 1 CPU rank"),
}  # fmt: skip


def start(
    command: list[str],
    variables: dict[str, str] | None = None,
    folder: Path | None = None,
    nohup: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a command; with `nohup` the terminal that it is started from hangs up all the time."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FOLDCP")}
    env |= {"OMP_NUM_THREADS": "1", **(variables or {})}
    if not nohup:
        return subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=300, cwd=folder
        )
    command = ["nohup", *command]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        command, env=env, text=True, cwd=folder, start_new_session=True, **pipes
    ) as run:
        ended = threading.Event()

        def hang_up() -> None:
            while not ended.wait(1.0):
                with suppress(ProcessLookupError):
                    os.killpg(run.pid, signal.SIGHUP)

        threading.Thread(target=hang_up, daemon=True).start()
        try:
            out, err = run.communicate(timeout=300)
        finally:
            ended.set()
    return subprocess.CompletedProcess(command, run.returncode, out, err)


@pytest.mark.parametrize("way", WAYS)
def test_predicts(way: str, tmp_path: Path, tiny_cache: Path) -> None:
    command, variables, mesh = WAYS[way]
    (tmp_path / "one.yaml").write_text(PROTEIN)
    (tmp_path / "sitecustomize.py").write_text(PROBE)
    places = ["--out_dir", str(tmp_path), "--cache", str(tiny_cache)]
    folder, many = tmp_path / "work", "2 CPU ranks" in mesh
    folder.mkdir()
    hostile = ["boltz", "yaml", "gemmi", "foldcp", "foldcp_kernels"]  # where Python looks first
    hostile += [] if way == "torchrun" else ["torch"]  # of `python -m torch...` that is the way
    for name in hostile:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise SystemExit('the working folder ran')")
    ended = start(
        [*command, "predict", str(tmp_path / "one.yaml"), *FAST.split(), *places],
        {
            **variables,
            "FOLDCP_REPORT": str(tmp_path / "costs.json"),
            "PYTHONPATH": str(tmp_path),
            "PROBED": str(tmp_path / "probed"),
        },
        folder,
        nohup=way == "re-exec",  # the launcher of foldcp; torchrun heeds no nohup
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    chosen = variables.get("PYTORCH_CUDA_ALLOC_CONF")
    conf = f"-,{chosen}" if chosen else "expandable_segments:True,-"
    ranks = ("0", "1") if many else ("alone",)
    probed = (tmp_path / "probed").read_text().splitlines()
    assert {f"{rank} {conf}" for rank in ranks} <= set(probed), probed
    lines = ended.stdout.splitlines()
    start_line = next(line for line in lines if line.startswith(f"foldcp {__version__}: "))
    assert start_line.startswith(f"foldcp {__version__}: {mesh}, fp32, ") and len(start_line) <= 100
    assert start_line.endswith(", 7 tokens") and (", host transport, " in start_line) == many
    begun = {"torchrun": "starting, 2 ranks (torchrun)", "re-exec": "starting 2 ranks"}
    assert (lines[0] == f"foldcp: {begun.get(way)}") == many
    # All that is said is ours, in plain lines; what others said is in the log.
    own = ("foldcp: ", f"foldcp {__version__}: ")
    assert all(line.startswith(own) for line in lines + ended.stderr.splitlines()), ended
    assert not set("\r\x1b") & set(ended.stdout + ended.stderr)
    assert "foldcp: 1 folded in 0:" in ended.stdout and "one  confidence 0." in ended.stdout
    log = (tmp_path / "boltz_results_one" / "foldcp.log").read_text()
    assert "Number of failed examples: 0" in log and "TPU" in log and start_line in log
    folder = tmp_path / "boltz_results_one" / "predictions" / "one"
    assert {path.name for path in folder.iterdir()} == {
        "one_model_0.cif",
        "confidence_one_model_0.json",
        "plddt_one_model_0.npz",
        "pae_one_model_0.npz",
        "pde_one_model_0.npz",
    }
    page = (tmp_path / "boltz_results_one" / "foldcp_report.html").read_text()
    assert "<td>confidence</td>" in page and "<h3>one</h3>" in page
    if variables.get("FOLDCP_NPROC") == "2":
        numbers = json.loads((tmp_path / "costs.json").read_text())
        assert numbers["mesh"] == "2x1" and min(numbers["peak_rss_bytes"]) > 1e8
        assert len(numbers["sent_bytes"]) == 2 and min(numbers["sent_bytes"]) > 0
        assert all(stages["trunk"]["seconds"] > 0 for stages in numbers["stages"])
        assert set(numbers["inputs"]["one"]["strategies"]) == set(STRATEGIES)
    if variables.get("FOLDCP_NPROC") == "auto":
        assert "auto starts one process because --accelerator cpu was given" in ended.stderr


@pytest.mark.parametrize(("value", "loaded"), [(None, False), ("0", False), ("1", True)])
def test_hook_is_loaded_only_when_asked(value: str | None, loaded: bool) -> None:
    code = "import sys; print('foldcp_boot' in sys.modules, 'foldcp' in sys.modules)"
    ended = start([sys.executable, "-c", code], {} if value is None else {"FOLDCP": value})
    assert ended.stdout.split() == [str(loaded), "False"], (
        "is the hook installed? pip install -e . --no-build-isolation"
    )


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"FOLDCP_NPROC": "2"}, 1),
        ({"FOLDCP_NPROC": "2", "FOLDCP": ""}, 1),
        ({"FOLDCP_NPROC": "2", "FOLDCP": "0"}, 0),
        ({"FOLDCP_NPROC": "2", "RANK": "1"}, 0),
        ({"FOLDCP_NPROC": ""}, 0),
        ({"FOLDCP_SECRET": "x" * 16, "FOLDCP_BUILD_CUDA": "0"}, 0),
        ({"foldcp_nproc": "2"}, 1),
        ({"Foldcp": "1"}, 1),
    ],
)
def test_variables_without_foldcp_are_noticed(variables: dict[str, str], said: int) -> None:
    code = (
        "import sys; sys.argv = [sys.argv[1], 'predict']; from importlib import util\n"
        "assert util.find_spec('boltz.main') and util.find_spec('boltz.main')"
    )
    ended = start([sys.executable, "-c", code, "boltz"], variables)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count(" is set, but FOLDCP is not") == said, ended.stderr
    if said:  # the remedy works, and a program that only imports Boltz hears nothing
        assert "FOLDCP=0" in ended.stderr
        ended = start([sys.executable, "-c", code, "program"], variables)
        assert "is set" not in ended.stderr


def test_boltz_is_untouched_without_foldcp_and_patched_once_with_it() -> None:
    code = (
        "import boltz.main as m, foldcp_boot, sys\n"
        "print(hasattr(m, 'foldcp_switched'), m.Trainer.__module__, m.predict.callback.__code__"
        ".co_filename.endswith('boltz/main.py'), m.BoltzWriter.__module__, "
        "isinstance(m.Boltz2, type))"
    )
    stock = start([sys.executable, "-c", code], {"FOLDCP": "0"}).stdout.split()
    lightning = "pytorch_lightning.trainer.trainer"
    assert stock == ["False", lightning, "True", "boltz.data.write.writer", "True"]
    code = (
        "import foldcp_boot; foldcp_boot.install(); foldcp_boot.install()\n"
        "import sys; print(sum(type(f).__module__ == 'foldcp_boot' for f in sys.meta_path))\n"
        "import boltz.main as m; from foldcp.boltz import switch\n"
        "before = m.process_inputs; switch.patch(m); print(m.process_inputs is before)\n"
        "print(m.foldcp_switched, type(m.Boltz2).__name__)"
    )
    switched = start([sys.executable, "-c", code], {"FOLDCP": "1"})
    assert switched.stdout.split() == ["1", "True", "True", "Loader"], switched.stderr


def test_doctor_tells_what_this_machine_can_do() -> None:
    ended = start([sys.executable, "-m", "foldcp", "doctor"], {"FOLDCP": "1"})
    assert ended.returncode == 0, ended.stderr
    told = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in ended.stdout.splitlines())
    assert told["switch"] == "on" and told["import hook"].startswith("installed, ")
    assert told["boltz"].startswith("2.2.") and "1x1" in told["meshes"]
    assert told["kernels"].startswith(("torch", "triton"))
    assert told["extension"] == BUILD["line"]  # what the installation said


@pytest.mark.parametrize("options", [["-e"], []])
def test_pip_installs_and_removes_the_hook(options: list[str], tmp_path: Path) -> None:
    source, venv = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".pth", ".toml", ".md", ".in") or path.name == "LICENSE":
            shutil.copy(path, source)
    for name in ("foldcp", "foldcp_kernels", "csrc"):
        made = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py")
        shutil.copytree(ROOT / name, source / name, ignore=made)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", where], text=True).strip())
    # The build needs setuptools, which the new environment lacks; pip must not fetch it.
    (site / "builder.pth").write_text(str(Path(setuptools.__file__).parent.parent))
    pip = [sys.executable, "-m", "pip", "--python", python, "--quiet"]
    flags = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    only_cpu = {**os.environ, "FOLDCP_BUILD_CUDA": "0"}  # nvcc would take longer
    subprocess.run([*pip, "install", *flags, *options, str(source)], check=True, env=only_cpu)
    built = source if options else site
    assert (built / "foldcp_kernels" / "_C.abi3.so").is_file()
    code = "import sys, foldcp_boot; print(foldcp_boot.installed(), 'foldcp' in sys.modules)"
    assert start([python, "-c", code], {"FOLDCP": "1"}).stdout.split() == ["True", "False"]
    assert start([python, "-c", code]).stdout.split() == ["False", "False"]
    (record,) = site.glob("foldcp-*.dist-info/RECORD")
    assert any(line.startswith("foldcp.pth,") for line in record.read_text().splitlines())
    subprocess.run([*pip, "uninstall", "--yes", "foldcp"], check=True)
    assert not list(site.glob("*foldcp*"))


def test_config_reads_every_variable() -> None:
    assert Config.from_env({}) == Config()
    assert Config.from_env({"FOLDCP": "", "FOLDCP_MESH": ""}) == Config()
    got = Config.from_env(
        {
            "FOLDCP": "1",
            "FOLDCP_NPROC": "8",
            "FOLDCP_MESH": "2X4",
            "FOLDCP_ROUTE": "ring",
            "FOLDCP_TRANSPORT": "nccl",
            "FOLDCP_WIRE": "fp8",
            "FOLDCP_MULTIPLICATION": "channel",
            "FOLDCP_ATTENTION": "rows",
            "FOLDCP_NCCL_LIB": "libnccl.so.2",
            "FOLDCP_NCCL_CTAS": "4",
            "FOLDCP_PRECISION": "bf16",
            "FOLDCP_KERNELS": "torch",
            "FOLDCP_GRAPHS": "0",
            "FOLDCP_MEMORY": "lean",
            "FOLDCP_CHUNK_MB": "128",
            "FOLDCP_TIMEOUT": "60",
            "FOLDCP_DP": "2",
            "FOLDCP_RESUME": "kept",
            "FOLDCP_REPORT": "costs.json",
        }
    )
    carried = ("ring", "nccl", "fp8", "channel", "rows", "libnccl.so.2", 4)
    rest = ("0", "lean", 128, 60, 2, "kept", "costs.json")
    assert got == Config(True, 8, "2x4", *carried, "bf16", "torch", *rest)
    assert Config().precision_on("cuda").pair == "bf16"
    assert Config().precision_on("cpu").pair == "fp32"
    assert Config(precision="fp32").precision_on("cuda").described() == "fp32"


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("FOLDCP", "yes", "0 or 1"),
        ("FOLDCP_NPROC", "0", "auto or a whole number"),
        ("FOLDCP_MESH", "2by4", "auto or ROWSxCOLUMNS"),
        ("FOLDCP_MESH", "0x4", "auto or ROWSxCOLUMNS"),
        ("FOLDCP_ROUTE", "best", "direct or ring"),
        ("FOLDCP_PRECISION", "fp64", "auto or a precision"),
        ("FOLDCP_KERNELS", "cuda", "auto or torch or triton or cuequivariance"),
        ("FOLDCP_CHUNK_MB", "-1", "a whole number of at least 1"),
        ("FOLDCP_TIMEOUT", "1.5", "a whole number of at least 1"),
        ("FOLDCP_DP", "0", "a whole number of at least 1"),
        ("FOLDCP_GRAPHS", "yes", "auto or 0 or 1"),
        ("FOLDCP_MEMORY", "little", "auto or fast or lean"),
    ],
)
def test_config_names_what_is_wrong(variable: str, value: str, allowed: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{variable} must be {allowed}")) as caught:
        Config.from_env({variable: value})
    assert repr(value.lower()) in str(caught.value)


def test_a_variable_that_does_not_exist_is_refused() -> None:
    for wrong, near in (
        ("FOLDCP_NPRC", "FOLDCP_NPROC"), ("FOLDCP_MESHES", "FOLDCP_MESH"),
        ("FOLDCP_nproc", "FOLDCP_NPROC"), ("foldcp_dp", "FOLDCP_DP"),
        ("FOLD_CP_WIRE", "FOLDCP_WIRE"), ("FOLDCPNCCL_CTAS", "FOLDCP_NCCL_CTAS"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"no variable {wrong}: did you mean {near}"):
            Config.from_env({wrong: "2", "FOLDCP": "1"})
    with pytest.raises(ValueError, match="no variable FOLDCP_XYZZY: unset it"):
        Config.from_env({"FOLDCP_XYZZY": ""})
    of_others = {"foldcp": "/src/foldcp", "foldcp_src": "x", "MESH": "y", "NPROC": "4"}
    assert Config.from_env(of_others) == Config()


def test_place_reads_torchrun_and_srun() -> None:
    assert Place.find({}) == Place()
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n1",
                "MASTER_PORT": "500", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    assert Place.find(torchrun) == Place(3, 4, 1, "torchrun", "n1", 500, True, "foldcp/0")
    with pytest.raises(UserError, match="MASTER_ADDR"):
        Place.find({"RANK": "0", "WORLD_SIZE": "2"})
    srun = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1",
            "SLURM_NODELIST": "gpu[03-04,9],cpu1", "SLURM_JOB_ID": "12"}  # fmt: skip
    place = Place.find(srun)
    assert (place.rank, place.world, place.local_rank) == (5, 8, 1)
    assert (place.launcher, place.host) == ("srun", "gpu03") and 20000 <= place.port < 40000
    assert Place.find({**srun, **torchrun}).launcher == "torchrun"
    # The batch script has the job's variables too, but is one process.
    assert Place.find({**srun, "ENVIRONMENT": "BATCH"}).world == 1
    assert Place.find({**srun, "ENVIRONMENT": "BATCH", "SLURM_STEP_ID": "0"}).world == 8


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a1", "a1"), ("a1,b2", "a1"), ("n[7,9]", "n7"), ("n[001-128]-ib,m1", "n001-ib")],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_auto_is_one_process_without_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve_processes(3, []) == 3
    assert resolve_processes("auto", ["predict", "x", "--accelerator", "cpu"]) == 1
    assert "auto starts one process" in capsys.readouterr().err


def test_only_the_boltz_command_starts_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/env/bin/boltz", "predict", "x.yaml"])
    assert foldcp_boot.runs_boltz()
    monkeypatch.setattr(sys, "argv", ["my_boltz_script.py", "predict"])
    assert not foldcp_boot.runs_boltz()


def test_segments_grow_where_the_gpu_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for given in ({}, {"PYTORCH_CUDA_ALLOC_CONF": ""}):
        environ = dict(given)
        allocator.grow_segments(environ)
        assert environ == given | ours
    for name in allocator.NAMES:
        environ = {name: "max_split_size_mb:512"}
        allocator.grow_segments(environ)
        assert environ == {name: "max_split_size_mb:512"}

    settings = [ours["PYTORCH_ALLOC_CONF"]]
    problem = "CUDA driver error: operation not supported"

    def empty(*_: object, **__: object) -> None:
        if settings[-1] != "expandable_segments:False":
            raise RuntimeError(problem)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    allocator.check_growth(torch.device("cuda"))  # the variable is not set: nothing is tried
    monkeypatch.setenv(*next(iter(ours.items())))
    allocator.check_growth(torch.device("cpu"))
    assert len(settings) == 1
    with caplog.at_level("WARNING"):
        allocator.check_growth(torch.device("cuda"))
    assert settings[-1] == "expandable_segments:False" and problem in caplog.text


def test_help_is_quick_and_wrong_commands_are_named() -> None:
    """Without torch and without Boltz: what is asked before anything runs costs no second."""
    code = (
        "import sys; from foldcp.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code if isinstance(end.code, str) else '')\n"
        "assert not {'torch', 'boltz', 'importlib.metadata'} & set(sys.modules)"
    )

    def said(*arguments: str) -> str:
        ended = start([sys.executable, "-c", code, *arguments])
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert said("--version").startswith("foldcp ") and "foldcp predict INPUT" in said()
    assert "FOLDCP_MESH" in said("predict", "x.yaml", "--help") == said("run", "-h")
    assert "--help`" in said("boltz", "--help") + said("bench", "-h")
    assert "versions, GPUs" in said("doctor", "--help")
    assert "no command 'fold': use predict" in said("fold", "x.yaml")
    assert "no command 'predcit': did you mean predict?" in said("predcit", "x.yaml")
    asked = said("predict", "--help")
    for other in (("help", "predict"), ("--nproc", "2", "--help"), ("--mesh=2x1", "predict", "-h")):
        assert said(*other) == asked, other
    for valueless in (["--mesh"], ["--mesh="], ["--mesh", "--nproc", "2"]):
        assert "--mesh needs a value, for example" in said("predict", "x.yaml", *valueless)
    assert "--nproc must be auto or a whole" in said("predict", "x.yaml", "--nproc", "two")
    assert "--mesh must be auto or ROWSxCOLUMNS" in said("--mesh", "2", "predict", "x.yaml")
    assert "doctor takes no arguments but --json, got x" in said("doctor", "x")
    assert "--only NAME" in said("report", "--help")
    assert "no/such does not exist: name a folder" in said("report", "no/such")
    assert "expects `predict`" in said("--nproc", "2", "x.yaml")
