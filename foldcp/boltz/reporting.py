"""Report a run: what became of its inputs beside what it cost, in the results folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from foldcp import __version__
from foldcp.boltz.run import Run
from foldcp.fabric.policy import STRATEGIES
from foldcp.output.report.writing import NUMBERS, write_numbers, write_page
from foldcp.planner.choice import strategy
from foldcp.planner.plan import Plan
from foldcp_kernels.core.dispatch import described


def write(
    run: Run, folder: Path, costs: Mapping[str, Any], failed: Mapping[str, str],
    tokens: Mapping[str, int],
) -> None:  # fmt: skip
    """Write the report on the root rank; what goes wrong is printed and costs no prediction.

    Args:
        run: that is over.
        folder: of its results.
        costs: see `foldcp.runtime.report.costs`.
        failed: inputs that could not be folded and why.
        tokens: N of each input that was begun.
    """
    if run.config.report == "0":
        return
    path = Path(run.config.report_path or folder / NUMBERS)
    try:
        if run.seal is not None:
            run.seal.check()
        numbers = {**costs, **_facts(run, costs["seconds"]), "inputs": _inputs(run, failed, tokens)}
        write_numbers(numbers, path)
        write_page(folder, numbers, [name for name in run.asked if name not in failed])
    except Exception as error:  # whatever it is, the predictions are there
        why = getattr(error, "strerror", None) or error or type(error).__name__
        where = f"FOLDCP_REPORT={path}" if run.config.report_path else f"the report in {folder}"
        print(f"foldcp: {where} is not written: {why}", file=sys.stderr)


def _facts(run: Run, seconds: float) -> dict[str, Any]:
    began = datetime.now(UTC) - timedelta(seconds=seconds)
    return {
        "version": __version__,
        "began": began.strftime("%Y-%m-%d %H:%M:%S UTC"),
        "groups": run.session.groups,
        "transport": run.mesh.transport if run.mesh.size > 1 else "",
        "precision": run.precision.described() if run.precision else "",
        "formats": run.precision.table() if run.precision else {},
        "kernels": described(run.mesh.device),
    }


# Stages of a run by the words that they are shown in, of the planner's stages.
_STAGES = {
    "input": ("input_embedder",),
    "trunk": ("recycling", "templates", "msa", "pairformer"),
    "distogram": ("distogram",),
    "conditioning": ("conditioning",),
    "sampling": ("sampling",),
    "confidence": ("confidence",),
}


def _planned(plan: Plan) -> dict[str, Any]:
    """Return what the planner expects, modelled: memory of the worst rank, seconds on a GPU."""
    stages = {
        name: {"peak_bytes": plan.weights + max(plan.stages[part] for part in parts)}
        | ({"seconds": sum(plan.seconds[part] for part in parts)} if plan.seconds else {})
        for name, parts in _STAGES.items()
    }
    return {"memory": plan.setup.memory, "hidden": plan.hidden, "stages": stages}


def _inputs(run: Run, failed: Mapping[str, str], tokens: Mapping[str, int]) -> dict[str, Any]:
    """Return the status of each input; tokens and strategies of those that were begun."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys((*run.known, *run.asked, *run.scored, *failed)):
        begun = name in run.asked or name in run.scored
        one: dict[str, Any] = {"status": "folded" if begun else "done before"}
        if name in failed:
            one = {"status": "failed", "reason": failed[name]}
        if name in tokens:
            one["tokens"] = tokens[name]
        if name in run.plans:
            one["planned"] = _planned(run.plans[name])
        if name in tokens and run.mesh.size > 1 and run.precision:
            layout, itemsize = (
                run.mesh.layout(tokens[name]),
                2 if run.precision.pair == "bf16" else 4,
            )
            one["strategies"] = {
                op: strategy(op, layout, run.mesh, 4, itemsize) for op in STRATEGIES
            }
        found[name] = one
    return found
