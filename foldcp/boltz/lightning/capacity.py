"""Leave an input out at once where no rank could hold it, with what would make it fit.

The planner's bytes are of tensors alone and of fused kernels, so what runs today is not refused:
they must exceed all of a GPU's memory by more than a tenth, or a CPU rank's part of the host's
memory by three tenths.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from foldcp.boltz.run import Run
from foldcp.fabric import memory
from foldcp.fabric.mesh import Mesh
from foldcp.layout.strategies import ATTENTION, MULTIPLICATION
from foldcp.planner import choice, gpus
from foldcp.planner.dims import dims_of
from foldcp.planner.gpus import Cluster
from foldcp.planner.plan import Plan, Remedy, of_setup, remedies
from foldcp.planner.workload import Setup, Workload
from foldcp.runtime.place import Place, on_one_machine
from foldcp_kernels.core.chunking import chunk_bytes

if TYPE_CHECKING:
    from foldcp.boltz.families.predict_step import PredictStep

GPU_MARGIN, CPU_MARGIN = 1.10, 1.30


def planned(run: Run, step: PredictStep, batch: dict[str, Any]) -> Plan | None:
    """Return what the planner expects of an input in this run; None where no memory is known.

    Args:
        run: the prediction under way.
        step: predicts the input.
        batch: its features.
    """
    (there, _), mesh, workload = _there(run), run.mesh, _workload(step, batch)
    if not there:
        return None
    on_gpu = mesh.device.type == "cuda"  # the seconds of CPUs are not known
    return of_setup(workload, _cluster(mesh, there), _setup(mesh, workload, run), timed=on_gpu)


def is_published(step: PredictStep, found: Plan) -> bool:
    """Tell whether a model has the sizes that the planner counts with.

    Args:
        step: predicts with the model.
        found: what the planner expects.
    """
    return _channels(step.fold.model) == dims_of(found.workload.model).token_z


def shortage(run: Run, step: PredictStep, found: Plan) -> str:
    """Return why an input cannot fit this rank's memory and what would make it fit, else "".

    Args:
        run: the prediction under way.
        step: predicts the input.
        found: what the planner expects of it.
    """
    if run.config.force:
        return ""
    (there, what), mesh, model = _there(run), run.mesh, step.fold.model
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    # A model smaller than the published ones holds less in proportion.
    part = min(1.0, _channels(model) / dims_of(found.workload.model).token_z)
    needed = round(part * max(found.stages.values())) + weights
    margin = GPU_MARGIN if mesh.device.type == "cuda" else CPU_MARGIN
    if needed <= margin * there:
        return ""
    return (
        f"{found.workload.tokens} tokens need about {_gb(needed)} on each of {mesh.size} "
        f"rank{'s' * (mesh.size > 1)} by the planner's count, {what} has {_gb(there)}: "
        f"{_advice(found, mesh)}; FOLDCP_FORCE=1 folds it nevertheless"
    )


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"


def _there(run: Run) -> tuple[int, str]:
    """Return the memory of this rank, 0 where it is not known, and its name."""
    if run.mesh.device.type == "cuda":
        if not torch.cuda.is_available():
            return 0, ""
        return torch.cuda.get_device_properties(run.mesh.device).total_memory, "a GPU"
    world = Place.find(os.environ).world
    sharing = world if world > 1 and on_one_machine(os.environ) else 1
    return memory.host_memory()[1] // sharing, "its part of this host's memory"


def _workload(step: PredictStep, batch: dict[str, Any]) -> Workload:
    settings = step.settings()
    return Workload(
        tokens=batch["token_index"].shape[1],
        atoms=batch["atom_pad_mask"].shape[1],
        sequences=max(1, batch["msa"].shape[1]),
        samples=settings.diffusion_samples,
        parallel_samples=settings.max_parallel_samples,
        recycling_steps=settings.recycling_steps,
        sampling_steps=settings.sampling_steps or 1,
        model="boltz2" if step.family.name == "Boltz-2" else "boltz1",
    )


def _setup(mesh: Mesh, workload: Workload, run: Run) -> Setup:
    """Return the setup that this run takes."""
    low = run.precision is not None and run.precision.pair == "bf16"
    layout, itemsize = mesh.layout(workload.tokens), 2 if low else 4
    return Setup(
        mesh.rows,
        mesh.cols,
        memory="lean" if choice.lean(layout, mesh) else "fast",
        multiplication=choice.strategy(MULTIPLICATION, layout, mesh, 4, itemsize),
        attention=choice.strategy(ATTENTION, layout, mesh, 4, itemsize),
        wire=mesh.policy.wire,
        itemsize=itemsize,
        chunk_bytes=chunk_bytes(mesh.device),
    )


def _channels(model: Any) -> int:
    return int(model.z_norm.weight.shape[0])


def _cluster(mesh: Mesh, there: int) -> Cluster:
    """Return the GPUs of a mesh; an unknown kind has the rates of an H100, and its own memory."""
    if mesh.device.type == "cuda":
        name = torch.cuda.get_device_name(mesh.device)
        found = gpus.named(name, mesh.size, there)
        if found is not None:
            return found
    return replace(gpus.parse(f"{mesh.size}xh100"), memory=there)


def _advice(found: Plan, mesh: Mesh) -> str:
    listed: list[Remedy] = remedies(found, mesh.policy.memory)
    if not listed:
        return "fold a smaller input"
    if mesh.device.type != "cuda":
        smaller = [one.change for one in listed if one.plan.cluster == found.cluster]
        return "; or ".join([*smaller, "run it on GPUs, which `foldcp plan INPUT --gpus` chooses"])
    return "use " + "; or ".join(one.change for one in listed)
