"""Runs of `boltz predict` that fail on cue, many in one process: `forked.py < cases.json`.

Boltz is imported once, switched over; each case then forks its ranks, so that a case costs its own
work and not the import. With the rigs "raise" and "kill" the model is stock Boltz on every rank:
what fails there is everything around the model. With those of rigs.py it is the tiled one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from logged import fork, free_ports, place

BLOCKS = 4  # of the trunk: loading 64 of them is most of a run's time
LIMIT = 60  # seconds that a case may take


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        arguments: of `boltz`.
        world: number of ranks.
        environ: variables of all ranks.
        rank_arguments: arguments that one rank has in addition.
        rank_environ: variables that one rank has in addition.
        rank_folder: working folder of a rank.
        rig: "raise R I" or "kill R I": rank R does so in place of predicting its I-th input; or one
            of rigs.py; "real" is the tiled model without a fault; "files N START" leaves room
            for N more files and folders whose paths begin with START.
        slurm: start the ranks as srun does.
        program: Python code that runs in the place of `boltz`.
    """

    arguments: list[str]
    world: int = 1
    environ: dict[str, str] = field(default_factory=dict)
    rank_arguments: dict[int, list[str]] = field(default_factory=dict)
    rank_environ: dict[int, dict[str, str]] = field(default_factory=dict)
    rank_folder: dict[int, str] = field(default_factory=dict)
    rig: str = ""
    slurm: bool = False
    program: str = ""


@dataclass(frozen=True)
class Ended:
    """How a case ended: exit code and output of each rank.

    Args:
        codes: exit codes, negative for a signal.
        stderr: text of standard error.
        stdout: text of standard output.
        seconds: from the start to the end of the last rank.
        spread: seconds from the end of the first to the end of the last rank.
    """

    codes: list[int]
    stderr: list[str]
    stdout: list[str]
    seconds: float
    spread: float

    def messages(self) -> list[str]:
        """Every line of foldcp on any rank's standard error."""
        lines = [line for text in self.stderr for line in text.splitlines()]
        # A progress bar may stand in front of it.
        return [line.partition("foldcp: ")[2] for line in lines if "foldcp: " in line]


def run_cases(cases: dict[str, Case]) -> dict[str, Ended]:
    """Run cases in one new process; returns how each ended, by name."""
    result = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps({name: asdict(case) for name, case in cases.items()}),
        env={**os.environ, "FOLDCP": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return {name: Ended(**end) for name, end in json.loads(result.stdout).items()}


def _main() -> None:
    import boltz.main  # the hook of foldcp.pth patches it

    if not getattr(boltz.main, "foldcp_switched", False):
        sys.exit("the import hook is not installed here: pip install -e . --no-build-isolation")
    cases = json.load(sys.stdin)
    ports = free_ports()
    ends = {name: asdict(_run(case, next(ports))) for name, case in cases.items()}
    json.dump(ends, sys.stdout)


def _run(case: dict[str, Any], port: int) -> Ended:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        children = {}
        for rank in range(case["world"]):
            stdout = Path(folder, f"stdout{rank}")
            pid = fork(Path(folder, f"stderr{rank}"), _child, case, rank, port, stdout=stdout)
            children[pid] = rank
        codes, times = [0] * len(children), []
        rig = case["rig"].split()
        stopped = {int(rig[3])} if rig[2:3] == ["stop"] else set()
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
                times.append(time.monotonic())
                if stopped and set(children.values()) == stopped:  # nobody is left who could end it
                    os.kill(next(iter(children)), signal.SIGKILL)
            elif time.monotonic() - start > LIMIT:
                for child in children:
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        ranks = range(case["world"])
        stderr, stdout = (
            [Path(folder, f"{stream}{rank}").read_text(errors="replace") for rank in ranks]
            for stream in ("stderr", "stdout")
        )
    return Ended(codes, stderr, stdout, times[-1] - start, times[-1] - times[0])


def _child(case: dict[str, Any], rank: int, port: int) -> None:
    import boltz.main

    os.environ.update(_place(case, rank, port))
    os.environ.update(case["environ"])
    os.environ.update(case["rank_environ"].get(str(rank), {}))
    os.chdir(case["rank_folder"].get(str(rank), "."))
    arguments = [*case["arguments"], *case["rank_arguments"].get(str(rank), [])]
    sys.argv = ["boltz", *arguments]
    boltz.main.PairformerArgsV2 = partial(boltz.main.PairformerArgsV2, num_blocks=BLOCKS)
    _rig(case["rig"])
    if case["program"]:
        sys.argv = ["program.py", *arguments]
        exec(compile(case["program"], "program.py", "exec"), {"__name__": "__main__"})
    else:
        boltz.main.cli()


def _place(case: dict[str, Any], rank: int, port: int) -> dict[str, str]:
    if case["slurm"]:
        return {
            "SLURM_PROCID": str(rank),
            "SLURM_NTASKS": str(case["world"]),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODELIST": "localhost",
            "SLURM_JOB_ID": str(port),
        }
    return place(rank, case["world"], port)


def _rig(what: str) -> None:
    """Replace the swap: stock's own prediction on every rank, up to the failure."""
    import rigs

    from foldcp.boltz.families import swap
    from foldcp.boltz.families.predict_step import PredictStep
    from foldcp.boltz.features.boltz2 import dense_view
    from foldcp.modules.hooks import Folded, Hooks

    if what.startswith("files "):
        _, left, start = what.split(" ", 2)
        rigs.allow_files(int(left), start)
        return
    if what.startswith(("at ", "real")):
        if what != "real":
            rigs.install(what)
        return
    verb, rank, index = (what or "run -1 -1").split()

    class Stock:
        """Stands for `FoldOnMesh`."""

        def __init__(self, model: Any, mesh: Any) -> None:
            self.model, self.mesh, self.count = model, mesh, 0
            self.parts, self.predict = swap.family_of(model).parts(model), model.predict_step

        def __call__(self, batch: Any, settings: Any, hooks: Hooks) -> Any:
            feats = hooks.features(batch)
            if (self.mesh.rank, self.count) == (int(rank), int(index)):
                if verb == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("rigged to fail")
            self.count += 1
            self.mesh.ranks.barrier()
            return hooks.hand_over(Folded(feats, self.predict(dense_view(feats), 0)))

    def apply(model: Any, mesh: Any, precision: str) -> SimpleNamespace:
        step = PredictStep(swap.family_of(model), Stock(model, mesh))
        step.prediction = lambda folded: folded.outputs  # stock's own
        model.predict_step = step
        return SimpleNamespace(summary=lambda: "swapped nothing")

    swap.apply = apply


if __name__ == "__main__":
    _main()
