"""Say what the FOLDCP_* variables ask for and this machine cannot run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from foldcp.cli.doctor.finding import Finding
from foldcp.config import Config
from foldcp.layout import mesh_shape

_ON_GPUS = ("nccl", "copy-engine", "torch-nccl")


@dataclass(frozen=True)
class Machine:
    """Hold what a run would find.

    Args:
        gpus: that torch sees.
        triton: why Triton's kernels do not run, None where they do.
        cuequivariance: why cuEquivariance does not run, None where it does.
        extension: why the compiled extension carries no tiles, None where it does.
        nccl: why the NCCL library does not open, None where it does.
        torch_nccl: torch has NCCL.
        gloo: torch has gloo.
        shared_gpus: NCCL was asked to take several ranks on one GPU.
        hooked: the hook that switches Boltz over has run.
    """

    gpus: int
    triton: str | None
    cuequivariance: str | None
    extension: str | None
    nccl: str | None
    torch_nccl: bool
    gloo: bool
    shared_gpus: bool
    hooked: bool


def impossible(config: Config, machine: Machine) -> Iterator[Finding]:
    """Find what cannot run.

    Args:
        config: the variables.
        machine: this one.

    Yields:
        One fatal finding for each variable.
    """
    checks = {
        "FOLDCP_KERNELS": (config.kernels, _kernels(config, machine)),
        "FOLDCP_TRANSPORT": (config.transport, _transport(config, machine)),
        "FOLDCP_NCCL_LIB": (config.nccl_library, machine.nccl if config.nccl_library else None),
        "FOLDCP_GRAPHS": (config.graphs, _graphs(config, machine)),
        "FOLDCP_NPROC": (str(config.nproc), _ranks(config, machine)),
        "FOLDCP": ("1", _hook(config, machine)),
    }
    for name, (value, why) in checks.items():
        if why:
            text, colon, remedy = why.rpartition(": ")
            text = text if colon else remedy
            yield Finding(f"{name}={value}", text, remedy or "unset it", True)


def _kernels(config: Config, machine: Machine) -> str | None:
    if config.kernels not in ("triton", "cuequivariance"):
        return None
    if not machine.gpus:
        return "no GPU is visible: use auto"
    return machine.triton if config.kernels == "triton" else machine.cuequivariance


def _transport(config: Config, machine: Machine) -> str | None:
    name = config.transport
    stand_in = name == "nccl" and bool(config.nccl_library)
    if name in _ON_GPUS and not machine.gpus and not stand_in:
        return "no GPU is visible: use auto"
    if name in ("host", "nccl", "copy-engine") and machine.extension:
        return machine.extension
    if name == "nccl":
        return machine.nccl
    if name == "torch-nccl" and not machine.torch_nccl:
        return "this torch has no NCCL: install a build of torch for CUDA"
    if name == "gloo" and not machine.gloo:
        return "this torch has no gloo: use auto"
    return None


def _graphs(config: Config, machine: Machine) -> str | None:
    if config.graphs == "1" and not machine.gpus:
        return "CUDA graphs need a GPU, and none is visible: use auto"
    return None


def _ranks(config: Config, machine: Machine) -> str | None:
    """Say why the ranks that are asked for do not fit this machine or their mesh."""
    count = config.nproc if isinstance(config.nproc, int) else 0
    if not count:
        return None
    if machine.gpus and count > machine.gpus and not machine.shared_gpus:
        return (
            f"{count} ranks need as many GPUs, and {machine.gpus} are visible: start at most "
            f"{machine.gpus}, or pass --accelerator cpu"
        )
    try:
        mesh_shape.choose(mesh_shape.group_size(count, config.dp, config.mesh), config.mesh)
    except ValueError as error:
        return str(error)
    return None


def _hook(config: Config, machine: Machine) -> str | None:
    if config.enabled and not machine.hooked:
        return (
            "the hook has not run, and `boltz predict` would be stock: install foldcp with pip, "
            "or use `foldcp predict`"
        )
    return None
