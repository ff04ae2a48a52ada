"""Ask what is installed: Boltz, kernels, the extension, transports, NCCL and the import hook."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import foldcp_boot
from foldcp.cli.doctor.finding import Finding
from foldcp.config import Config, order_nccl
from foldcp.runtime import launch


def boltz() -> Finding:
    """Say which Boltz is installed, and whether foldcp knows its functions."""
    from importlib import metadata, util

    from foldcp.boltz.seams import check

    try:
        version = metadata.version("boltz")
        main = util.find_spec(foldcp_boot.TARGET)
    except (metadata.PackageNotFoundError, ModuleNotFoundError):
        main = None
    if main is None:
        return Finding("boltz", "not installed", "pip install 'foldcp[boltz]'", True)
    if not version.startswith(launch.SUPPORTED):
        return Finding("boltz", f"{version}: not supported", f"use {launch.SUPPORTED}x", True)
    differ = check.differing(check.reader(main))
    if not differ:
        return Finding("boltz", version)
    text, _, remedy = check.refusal(version, differ).removeprefix("boltz ").rpartition(": ")
    return Finding("boltz", text, remedy, True)


def kernels(gpus: int) -> str:
    """Report which kernels run the local ops, and whether they were tuned on this chip."""
    import torch

    from foldcp_kernels.core import trial
    from foldcp_kernels.core.dispatch import triton_fault

    if not gpus:
        return "torch (the fused Triton kernels need a GPU)"
    for index in range(gpus):
        if why := triton_fault(torch.device("cuda", index)):
            return f"torch (Triton does not run on GPU {index}: {why})"

    from foldcp_kernels.core import triton_configs as configs
    from foldcp_kernels.core.triton_launch import capability

    chip = capability(torch.device("cuda"))
    found = [configs.pick(kernel, 2, chip).source for kernel, size in configs.TABLE if size == 2]
    untuned = sum(source in configs.UNMEASURED for source in found)
    return (
        f"triton {trial.version()}, its trial kernel ran; {len(found) - untuned} of "
        f"{len(found)} kernels measured on {configs.family(chip)} (foldcp bench tune measures here)"
    )


def transport(gpus: int) -> str:
    """Report which transport would join several ranks of this machine, and the NCCL found."""
    import torch

    from foldcp.fabric.connect import described_version
    from foldcp_kernels.core.extension import load

    extension = load()
    if not gpus:
        return "host (shared memory)" if extension.ops else "gloo (torch.distributed)"
    devices = [torch.device("cuda", index) for index in range(gpus)]
    missing = [why for why in map(extension.missing, devices) if why]
    if missing:
        there = torch.distributed.is_nccl_available()
        version = ".".join(map(str, torch.cuda.nccl.version())) if there else "not in this torch"
        # What was left out at installation is on the line above already.
        why = f": the extension cannot be used, {missing[0]}" if extension.cuda else ""
        return f"torch-nccl (torch.distributed; NCCL {version}){why}"
    library = Config.from_env(os.environ).nccl_library
    try:
        version = extension.ops.nccl_version(library)
    except RuntimeError as error:
        return f"copy-engine or torch-nccl; {str(error).splitlines()[0]}"
    order = order_nccl(os.environ)
    return f"nccl {described_version(version)} (launch order: {order}), copy-engine"


def extension(gpus: int) -> Finding:
    """Say what was compiled, and why it carries no tiles of these GPUs.

    Args:
        gpus: how many there are.
    """
    import torch

    from foldcp_kernels.core.extension import load

    devices = [torch.device("cuda", index) for index in range(gpus)] or [torch.device("cpu")]
    missing = next(filter(None, map(load().missing, devices)), "")
    remedy = f"it is not used here: {missing}" if missing else ""
    return Finding("extension", load().described(), remedy)


def packages(gpus: int) -> Iterator[Finding]:
    """Say which optional packages with kernels there are.

    Args:
        gpus: how many there are.
    """
    from foldcp_kernels.core import trial
    from foldcp_kernels.core.trial import cuequivariance

    fault = trial.package_fault()
    text, _, remedy = (fault or "").rpartition(": ")
    found = "" if fault else _compiler()
    yield Finding("triton", text or f"{trial.version()}, {found}", remedy if gpus else "")
    torch_part = version("cuequivariance-torch")
    parts = [f"cuequivariance-torch {torch_part}"] if torch_part else []
    parts += [f"{name} {found}" for name, found in _operators().items()]
    fault = cuequivariance.fault() if parts and gpus else None
    yield Finding("cuEquivariance", ", ".join(parts) or "not installed (optional)", fault or "")
    engine = version("transformer_engine") or version("transformer-engine")
    yield Finding("TransformerEngine", engine or "not installed (optional, foldcp does not use it)")


def _operators() -> dict[str, str]:
    names = [f"cuequivariance-ops-torch-cu{cuda}" for cuda in (12, 13)]
    return {name: found for name in names if (found := version(name))}


def version(package: str) -> str:
    """Return the version of an installed package, "" where it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _compiler() -> str:
    """Name the C compiler that Triton builds its launchers with, as Triton looks for it."""
    named = os.environ.get("CC")
    found = named or next(filter(None, map(shutil.which, ("clang", "gcc", "cc"))), "")
    header = Path(sysconfig.get_path("include"), "Python.h")
    lacks = [] if found else ["no C compiler"]
    lacks += [] if header.is_file() else [f"no {header}"]
    return ", ".join(lacks) or f"C compiler {found}"


def meshes(count: int, what: str) -> str:
    """List the meshes that up to so many ranks make.

    Args:
        count: of what the ranks run on.
        what: they run on.
    """
    from foldcp.layout.mesh_shape import choose

    sizes = sorted({n for n in (1, 2, 4, 6, 8, 16) if n < count} | {count})
    shapes = ", ".join(f"{rows}x{cols}" for rows, cols in map(choose, sizes))
    return f"{shapes} ({count} {what})"


def hook() -> str:
    """Say where the import hook lies that switches Boltz over."""
    for folder in map(Path, sys.path):
        if (folder / "foldcp.pth").is_file() and folder.name.endswith("-packages"):
            return f"installed, {folder / 'foldcp.pth'}"
    return "foldcp.pth is not in site-packages: install with pip, or use `foldcp run`"
