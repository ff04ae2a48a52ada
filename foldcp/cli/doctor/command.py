"""`foldcp doctor`: print what this machine can do, what it lacks, and what to do about it."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import foldcp_boot
from foldcp import __version__
from foldcp.cli.doctor import asked, gpus, installed, limits
from foldcp.cli.doctor.finding import Finding
from foldcp.config import Config, shares_gpus
from foldcp.errors import UserError


def main(arguments: list[str]) -> int:
    """Print what this machine can do.

    Args:
        arguments: none, or --json.

    Returns:
        1 when Boltz or something that a variable asks for cannot run, else 0.
    """
    if arguments not in ([], ["--json"]):
        wrong = " ".join(arguments)
        raise UserError(f"foldcp doctor takes no arguments but --json, got {wrong}: drop them")
    found = list(findings())
    healthy = not any(one.fatal for one in found)
    if arguments:
        listed = [vars(one) for one in found]
        print(json.dumps({"healthy": healthy, "findings": listed}, indent=2))
        return 0 if healthy else 1
    width = max(len(one.name) for one in found)
    for one in found:
        print(f"{one.name:{width}}  {one.text}")
        if one.remedy:
            print(f"{'':{width}}  {'PROBLEM' if one.fatal else 'note'}: {one.remedy}")
    return 0 if healthy else 1


def findings() -> Iterator[Finding]:
    """Ask for everything; takes seconds, and on GPUs launches a kernel on each."""
    import torch

    from foldcp_kernels.core.extension import driver_version

    yield Finding("foldcp", f"{__version__} in {Path(__file__).parents[2]}")
    yield Finding("python", f"{platform.python_version()} at {sys.executable}")
    yield Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    yield installed.boltz()
    count, built_for = torch.cuda.device_count(), torch.version.cuda
    for index in range(count):
        one = torch.cuda.get_device_properties(index)
        yield gpus.described(index, one.name, one.total_memory, (one.major, one.minor))
    if count:
        version = gpus.ask("--query-gpu=driver_version", "--format=csv,noheader")
        yield gpus.driver(version, driver_version(), built_for)
    else:
        yield gpus.unseen(gpus.ask("-L"), built_for, os.environ)
    if count > 1:
        yield gpus.links(gpus.ask("topo", "-m"), count)
        yield gpus.peers(count, torch.cuda.can_device_access_peer)
    yield Finding("kernels", installed.kernels(count))
    yield from installed.packages(count)
    yield installed.extension(count)
    yield from _variables(count)
    cores = os.cpu_count() or 1
    yield Finding("meshes", installed.meshes(count or cores, "GPUs" if count else "CPU cores"))
    yield limits.shared_memory(count, limits.shared_memory_size())
    yield limits.open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield limits.locked_memory(count, resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    yield Finding("import hook", installed.hook())


def _variables(gpus: int) -> Iterator[Finding]:
    """Ask for what depends on FOLDCP_* variables."""
    try:
        config = Config.from_env(os.environ)
    except ValueError as error:
        text, _, remedy = str(error).rpartition(": ")
        yield Finding("variables", text or remedy, remedy, True)
        return
    yield Finding("transport", installed.transport(gpus))
    state = "FOLDCP is not 1: Boltz is stock"
    if config.enabled:
        state = "on" if foldcp_boot.installed() else "FOLDCP=1, but the hook has not run"
    yield Finding("switch", state)
    yield from asked.impossible(config, _machine(gpus, config))


def _machine(gpus: int, config: Config) -> asked.Machine:
    """Look for what variables may ask for."""
    import torch

    from foldcp_kernels.core.dispatch import triton_fault
    from foldcp_kernels.core.extension import load
    from foldcp_kernels.core.trial import cuequivariance

    extension = load()
    devices = [torch.device("cuda", i) for i in range(gpus)] or [torch.device("cpu")]
    nccl = None
    try:
        if extension.ops is not None:
            extension.ops.nccl_version(config.nccl_library)
    except RuntimeError as error:
        nccl = str(error).splitlines()[0]
    return asked.Machine(
        gpus=gpus,
        triton=next(filter(None, map(triton_fault, devices)), None),
        cuequivariance=cuequivariance.fault(),
        extension=next(filter(None, map(extension.missing, devices)), None),
        nccl=nccl,
        torch_nccl=torch.distributed.is_nccl_available(),
        gloo=torch.distributed.is_gloo_available(),
        shared_gpus=shares_gpus(os.environ),
        hooked=foldcp_boot.installed(),
    )
