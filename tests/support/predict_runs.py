"""Runs of `boltz predict`, stock Boltz's and foldcp's, in float64: `predict_runs.py < cases.json`.

Boltz is imported once; each command then forks its processes. Stock and foldcp get the same three
changes, none of them in what is under test: float64 in place of float32, a trunk of few blocks, and
one bug of stock worked around.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from logged import fork, free_ports, place

LIMIT = 200  # seconds that a command may take
BLOCKS = 2  # of the trunk; `boltz predict` gives it 64
SLOTS = 2  # processes at a time, or one command of more


@dataclass(frozen=True)
class Case:
    """Commands that run one after the other.

    Args:
        commands: arguments of `boltz`, each, or "remove FILE".
        ranks: 0 for stock Boltz, else the number of foldcp's ranks.
        environ: variables of every process.
    """

    commands: list[list[str]]
    ranks: int = 0
    environ: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a case ended.

    Args:
        codes: exit codes of all processes of all commands.
        output: their text.
        seconds: of all commands.
    """

    codes: list[int]
    output: str
    seconds: float


def run_cases(cases: dict[str, Case], folder: Path) -> dict[str, Ended]:
    """Run cases in one new process; returns how each ended, by name.

    Args:
        cases: by name.
        folder: for the processes' output.
    """
    asked = {name: asdict(case) for name, case in cases.items()}
    result = subprocess.run(
        [sys.executable, __file__, str(folder)],
        input=json.dumps(asked),
        env={**os.environ, "FOLDCP": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return {name: Ended(**end) for name, end in json.loads(result.stdout).items()}


def _main(folder: Path) -> None:
    root = str(Path(__file__).parents[2])
    sys.path.insert(0, root)
    import boltz.main  # noqa: F401
    import parity  # noqa: F401

    cases = {name: Case(**case) for name, case in json.load(sys.stdin).items()}
    ports = free_ports()
    waiting = [
        _Running(name, case, ports, folder / f"log_{i}")
        for i, (name, case) in enumerate(cases.items())
    ]
    running: list[_Running] = []
    ends: dict[str, dict[str, Any]] = {}
    while waiting or running:
        busy = sum(job.slots for job in running)
        if waiting and (not running or busy + waiting[0].slots <= SLOTS):
            running.append(waiting.pop(0))
            running[-1].start()
        for job in [job for job in running if job.step()]:
            running.remove(job)
            ends[job.name] = asdict(job.ended())
        time.sleep(0.02)
    json.dump(ends, sys.stdout)


class _Running:
    """A case under way."""

    def __init__(self, name: str, case: Case, ports: Iterator[int], log: Path) -> None:
        self.name, self.case, self.ports, self.log = name, case, ports, log
        self.slots = max(1, case.ranks)
        self._left = list(case.commands)
        self._children: dict[int, int] = {}
        self._codes: list[int] = []

    def start(self) -> None:
        """Begin with the first command."""
        self._begun = time.monotonic()
        self._next()

    def _next(self) -> None:
        arguments, self._since = self._left.pop(0), time.monotonic()
        if arguments[0] == "remove":
            Path(arguments[1]).unlink(missing_ok=True)
            return
        port = next(self.ports)
        for rank in range(self.slots):
            log = Path(f"{self.log}_{rank}")
            self._children[fork(log, _child, self.case, arguments, rank, port)] = rank

    def step(self) -> bool:
        """Look after the processes; returns whether the case has ended."""
        for pid in list(self._children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del self._children[pid]
                self._codes.append(os.waitstatus_to_exitcode(status))
            elif time.monotonic() - self._since > LIMIT:
                os.kill(pid, signal.SIGKILL)
        if self._children:
            return False
        if self._left:
            self._next()
            return False
        return True

    def ended(self) -> Ended:
        """How it ended."""
        logs = sorted(self.log.parent.glob(f"{self.log.name}_*"))
        output = "\n".join(f"[{log.name}]\n{log.read_text(errors='replace')}" for log in logs)
        return Ended(self._codes, output, round(time.monotonic() - self._begun, 1))


def _child(case: Case, arguments: list[str], rank: int, port: int) -> None:
    import boltz.main

    os.environ.update(case.environ)
    sys.argv = ["boltz", *arguments]
    # Without --seed every rank begins elsewhere; they must do as the root, which is rank 0.
    torch.manual_seed(100 + rank)
    np.random.seed(100 + rank)
    random.seed(100 + rank)
    _rig(case)
    if case.ranks:
        os.environ.update({"FOLDCP": "1", **place(rank, case.ranks, port)})
    boltz.main.cli.main()


def _rig(case: Case) -> None:
    """Make the three changes, and switch Boltz over if foldcp is asked for."""
    import boltz.main as main
    from pytorch_lightning.strategies import Strategy

    from bench.stock import with_precision_32

    stock_filter, record_class = main.filter_inputs_affinity, main.Manifest
    # With several inputs stock hands those without an affinity request to that pass, and ends.
    main.filter_inputs_affinity = lambda **options: record_class(
        [r for r in stock_filter(**options).records if r.affinity]
    )
    main.Trainer = with_precision_32(main.Trainer) if not case.ranks else main.Trainer
    main.PairformerArgsV2 = partial(main.PairformerArgsV2, num_blocks=BLOCKS)
    main.PairformerArgs = partial(main.PairformerArgs, num_blocks=BLOCKS)
    for model in (main.Boltz2, main.Boltz1):
        model.load_from_checkpoint = _loads_doubles(model.load_from_checkpoint)
    Strategy.predict_step = _in_float64(Strategy.predict_step)
    if case.ranks:
        from foldcp.boltz import switch

        switch.patch(main)


def _loads_doubles(load: Callable[..., Any]) -> Callable[..., Any]:
    # The checkpoint has the blocks of the trunk that are left out.
    return lambda *args, **options: load(*args, **{**options, "strict": False}).double()


def _in_float64(step: Callable[..., Any]) -> Callable[..., Any]:
    def predict_step(self: Any, batch: dict[str, Any], *args: Any, **options: Any) -> Any:
        import parity

        with parity.everything_float64():
            # The loader of another rank than the root gives the number of the input.
            known = parity.double_features(batch) if isinstance(batch, dict) else batch
            return step(self, known, *args, **options)

    return predict_step


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
