"""Print what this machine can do: versions, GPUs, kernels, extension, transport and meshes."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import foldcp_boot
from foldcp import __version__
from foldcp.config import Config, order_nccl
from foldcp.errors import UserError
from foldcp.runtime import launch


def main(arguments: list[str]) -> int:
    """Print what this machine can do.

    Args:
        arguments: there may be none.

    Returns:
        Exit code, not 0 when Boltz cannot be run.
    """
    if arguments:
        raise UserError(f"foldcp doctor takes no arguments, got {' '.join(arguments)}: drop them")
    import torch

    from foldcp_kernels.core.extension import load

    lines = [("foldcp", f"{__version__} in {Path(__file__).parents[1]}")]
    lines += [("python", f"{platform.python_version()} at {sys.executable}")]
    lines += [("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")]
    boltz, usable = _boltz()
    lines += [("boltz", boltz)]
    gpus = torch.cuda.device_count()
    for index in range(gpus):
        gpu = torch.cuda.get_device_properties(index)
        size = f"{gpu.total_memory / 1e9:.0f} GB, sm_{gpu.major}{gpu.minor}"
        lines += [(f"GPU {index}", f"{gpu.name}, {size}")]
    if not gpus:
        lines += [("GPU", "none visible: pass --accelerator cpu to boltz predict")]
    lines += [("kernels", _kernels(gpus)), ("extension", load().described())]
    lines += [("transport", _transport(gpus))]
    lines += [("meshes", _meshes(gpus or os.cpu_count() or 1, "GPUs" if gpus else "CPU cores"))]
    state = "FOLDCP is not 1: Boltz is stock"
    if Config.from_env(os.environ).enabled:
        state = "on" if foldcp_boot.installed() else "FOLDCP=1, but the hook has not run"
    lines += [("switch", state), ("import hook", _hook())]
    for name, text in lines:
        print(f"{name:12} {text}")
    return 0 if usable else 1


def _boltz() -> tuple[str, bool]:
    """Report the version of Boltz, and whether foldcp knows its functions."""
    from importlib import metadata, util

    from foldcp.boltz.seams import check

    try:
        version = metadata.version("boltz")
        main = util.find_spec(foldcp_boot.TARGET)
    except (metadata.PackageNotFoundError, ModuleNotFoundError):
        main = None
    if main is None:
        return "not installed: pip install 'foldcp[boltz]'", False
    if not version.startswith(launch.SUPPORTED):
        return f"{version}: not supported, use {launch.SUPPORTED}x", False
    differ = check.differing(check.reader(main))
    text = check.refusal(version, differ).removeprefix("boltz ") if differ else version
    return text, not differ


def _kernels(gpus: int) -> str:
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


def _transport(gpus: int) -> str:
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


def _meshes(count: int, what: str) -> str:
    from foldcp.layout.mesh_shape import choose

    sizes = sorted({n for n in (1, 2, 4, 6, 8, 16) if n < count} | {count})
    shapes = ", ".join(f"{rows}x{cols}" for rows, cols in map(choose, sizes))
    return f"{shapes} ({count} {what})"


def _hook() -> str:
    for folder in map(Path, sys.path):
        if (folder / "foldcp.pth").is_file() and folder.name.endswith("-packages"):
            return f"installed, {folder / 'foldcp.pth'}"
    return "foldcp.pth is not in site-packages: install with pip, or use `foldcp run`"
