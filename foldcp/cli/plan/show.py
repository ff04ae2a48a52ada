"""Show plans as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from foldcp.boltz.inputs.sizes import InputSizes
from foldcp.planner.plan import Plan, Remedy

Shown = tuple[InputSizes, Plan, list[Remedy]]
GB = 1e9


def as_text(sizes: InputSizes, plan: Plan, advice: list[Remedy]) -> str:
    """Describe a plan in lines.

    Args:
        sizes: of the input.
        plan: for it.
        advice: what would make it fit, if it does not.
    """
    work, setup, cluster = plan.workload, plan.setup, plan.cluster
    lines = [
        f"{sizes.name}: {work.tokens} tokens, {work.atoms} atoms, {work.sequences} MSA rows, "
        f"{work.samples} sample{'s' * (work.samples > 1)}, {work.model}"
    ]
    lines += [f"  note: {note}" for note in sizes.notes]
    fits = "fits" if plan.fits else "DOES NOT FIT"
    lines += [
        f"  {fits} {cluster}: {plan.needed / GB:.1f} GB of {cluster.memory / GB:.1f} GB on the "
        "worst rank",
        f"  mesh {setup.rows}x{setup.cols}, memory {setup.memory}, multiplication "
        f"{setup.multiplication}, attention {setup.attention}",
    ]
    if plan.fits:
        lines.append(f"  to run it: {command(plan)}")
    head = "  stage               memory of the worst rank"
    lines.append(head + ("   time, modelled" if plan.seconds else ""))
    for name, held in plan.stages.items():
        taken = f"{plan.seconds[name]:14.2f} s" if plan.seconds else ""
        lines.append(f"  {name:17} {(held + plan.weights + plan.beside) / GB:24.2f} GB{taken}")
    if plan.seconds:
        lines.append(f"  {'all stages':44} {plan.total_s:15.2f} s, modelled, not measured")
    lines.append(
        f"  of the memory of each stage {plan.weights / GB:.2f} GB are weights, and "
        f"{plan.beside / GB:.2f} GB assumed for CUDA and its allocator"
    )
    if plan.seconds:
        lines += ["  times follow from:", *(f"    {line}" for line in plan.assumptions)]
    if not plan.fits:
        lines.append("  " + told(advice))
    return "\n".join(lines)


def told(advice: list[Remedy]) -> str:
    """Name in a sentence what would make an input fit.

    Args:
        advice: of `foldcp.planner.plan.remedies`.
    """
    if not advice:
        return "nothing that was tried makes it fit: neither fewer samples nor more or larger GPUs"
    each = [f"{one.change} ({one.plan.needed / GB:.1f} GB a GPU)" for one in advice]
    return "it would fit with " + "; or ".join(each)


def command(plan: Plan) -> str:
    """Return the command that takes a plan on one machine.

    Args:
        plan: that fits.
    """
    setup = plan.setup
    return (
        f"FOLDCP_MEMORY={setup.memory} foldcp predict INPUT --nproc {setup.size} "
        f"--mesh {setup.rows}x{setup.cols}"
    )


def as_json(found: list[Shown]) -> dict[str, Any]:
    """Describe plans with the keys of docs/running.md.

    Args:
        found: inputs with plan and advice.
    """
    cluster = found[0][1].cluster
    chip = cluster.gpu.chip
    return {
        "fits": all(plan.fits for _, plan, _ in found),
        "gpus": {
            "name": cluster.gpu.label,
            "count": cluster.count,
            "per_node": cluster.node,
            "memory_bytes": cluster.memory,
            "source": chip.source,
        },
        "inputs": [_input(*one) for one in found],
    }


def _input(sizes: InputSizes, plan: Plan, advice: list[Remedy]) -> dict[str, Any]:
    work = plan.workload
    return {
        "name": sizes.name,
        "tokens": work.tokens,
        "atoms": work.atoms,
        "msa_rows": work.sequences,
        "templates": work.templates,
        "samples": work.samples,
        "model": work.model,
        "notes": list(sizes.notes),
        "fits": plan.fits,
        **_setup(plan),
        "needed_bytes": plan.needed,
        "weights_bytes": plan.weights,
        "assumed_bytes": plan.beside,
        "stage_bytes": dict(plan.stages),
        "modelled_seconds": dict(plan.seconds),
        "assumptions": list(plan.assumptions),
        "would_fit": [
            {
                "change": one.change,
                "gpus": str(one.plan.cluster),
                **_setup(one.plan),
                "needed_bytes": one.plan.needed,
            }
            for one in advice
        ],
    }


def _setup(plan: Plan) -> dict[str, Any]:
    kept = asdict(plan.setup)
    strategies = {name: kept[name] for name in ("multiplication", "attention")}
    return {
        "mesh": f"{plan.setup.rows}x{plan.setup.cols}",
        "memory": plan.setup.memory,
        "strategies": strategies,
    }
