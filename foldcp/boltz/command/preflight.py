"""Checks before anything is loaded: each failure is one sentence that names the remedy."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foldcp import __version__
from foldcp.boltz.command.early import NO_GPU, not_writable
from foldcp.boltz.command.options import check_devices, results_folder
from foldcp.config import Config
from foldcp.errors import UserError
from foldcp.fabric.mesh import local_gpu
from foldcp.runtime.files.lock import Held, Lock
from foldcp.runtime.place import Place
from foldcp_kernels.core.dispatch import default_impl, set_impl, triton_fault

if TYPE_CHECKING:
    from foldcp.runtime.session import Session

_VERSIONS = ("boltz", "torch", "numpy", "rdkit", "pytorch-lightning")
_SECRETS = {"msa_server_username", "msa_server_password", "api_key_value"}
_INPUTS = (".fa", ".fas", ".fasta", ".yml", ".yaml")


def choose_kernels(options: dict[str, Any], config: Config) -> None:
    """Set the implementation of the local ops from FOLDCP_KERNELS and `--no_kernels`.

    Args:
        options: the arguments of Boltz's `predict`.
        config: of this run.

    Raises:
        UserError: the named implementation is not installed.
    """
    name = "torch" if options.get("no_kernels") else config.kernels
    try:
        set_impl(name)
    except ValueError as error:
        raise UserError(f"FOLDCP_KERNELS={name}: {error}") from error


def agree_on_kernels(config: Config, device: torch.device, session: Session) -> None:
    """Run torch on every rank where Triton's kernels do not run on one of them.

    Args:
        config: of this run.
        device: of this rank.
        session: the ranks, which all call it.

    Raises:
        UserError: FOLDCP_KERNELS=triton, and they do not run.
    """
    if device.type != "cuda" or default_impl() not in ("auto", "triton"):
        return
    for rank, why in enumerate(session.gather(triton_fault(device))):
        if why and config.kernels == "triton":
            raise UserError(f"FOLDCP_KERNELS=triton cannot run on rank {rank}: {why}; or use auto")
        if why:
            set_impl("torch")
            if session.is_root:
                print(f"foldcp: kernels torch, not triton: rank {rank}: {why}", file=sys.stderr)
            return


def choose_device(options: dict[str, Any], place: Place) -> torch.device:
    """Check `--devices` and `--accelerator` and pick this rank's device.

    Args:
        options: the arguments of Boltz's `predict`.
        place: this process among the ranks.

    Returns:
        The CPU or one CUDA device.

    Raises:
        UserError: the options cannot be combined with a mesh or do not fit this machine.
    """
    check_devices(options)
    if options.get("accelerator", "gpu") == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise UserError(NO_GPU)
    if place.launcher == "srun" and count == 1:
        return torch.device("cuda", 0)  # --gpus-per-task=1 shows each task its own GPU
    if place.local_rank >= count:
        raise UserError(
            f"rank {place.rank} is number {place.local_rank + 1} on its machine, where {count} "
            f"GPU(s) are visible: start at most {count} rank(s) per machine, one per GPU"
        )
    return local_gpu(place.local_rank)


def claim_folder(options: dict[str, Any], on_loss: Callable[[str], None]) -> Lock:
    """Create the cache and results folders on the root rank, and lock the latter for this run.

    Args:
        options: the arguments of Boltz's `predict`.
        on_loss: see `Lock`.

    Raises:
        UserError: a folder cannot be made or written, or another run is at work in it.
    """
    folder = results_folder(options)
    option, wanted = "--cache", Path(options["cache"]).expanduser()
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        option, wanted = "--out_dir", folder
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder, on_loss)
        lock.take()
        return lock
    except Held as error:
        raise UserError(
            f"another run is at work in {folder} ({error.who}): wait until it has ended, or pass "
            "another --out_dir"
        ) from error
    except OSError as error:
        raise not_writable(option, wanted, error.strerror or str(error)) from error


def check_interfaces(environ: Mapping[str, str], ranks: int) -> None:
    """Refuse network interfaces for gloo that this machine does not have.

    Args:
        environ: usually `os.environ`.
        ranks: of this run; one alone needs no network.

    Raises:
        UserError: GLOO_SOCKET_IFNAME names another.
    """
    here = [name for _, name in socket.if_nameindex()]
    asked = [name for name in environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    missing = [name for name in asked if name not in here]
    if missing and ranks > 1:
        raise UserError(
            f"GLOO_SOCKET_IFNAME is {','.join(asked)}, but this machine has no interface "
            f"{missing[0]}, only {', '.join(here)}: name one of these, or unset it"
        )


def check_same_everywhere(options: dict[str, Any], config: Config, session: Session) -> None:
    """Compare arguments, inputs, settings and versions of all ranks.

    Args:
        options: the arguments of Boltz's `predict`.
        config: the FOLDCP_* variables.
        session: the ranks.

    Raises:
        UserError: on every rank, naming the first rank that differs and in what.
    """
    everyone = session.gather(_fingerprint(options, config))
    for rank, other in enumerate(everyone):
        for key, value in everyone[0].items():
            if other.get(key) != value:
                raise UserError(
                    f"the ranks were not started alike: {key} is {other.get(key)} on rank {rank} "
                    f"and {value} on rank 0: give every rank the same command, input files, "
                    "FOLDCP_* variables and Python environment"
                )


def versions() -> dict[str, str]:
    """Return the versions of what a prediction follows from."""
    found = {name: metadata.version(name) for name in _VERSIONS}
    return found | {"foldcp": __version__, "python": platform.python_version()}


def _fingerprint(options: dict[str, Any], config: Config) -> dict[str, str]:
    # Its default is the number of cores, which may differ between machines.
    alike = {name: value for name, value in options.items() if name != "preprocessing_threads"}
    for name in _SECRETS & alike.keys():
        secret = repr(alike[name]).encode()
        alike[name] = alike[name] and "secret " + hashlib.sha256(secret).hexdigest()[:8]
    prints = {f"argument --{name}": repr(value) for name, value in sorted(alike.items())}
    prints |= {f"setting {name}": repr(value) for name, value in sorted(vars(config).items())}
    prints |= {f"version of {name}": version for name, version in versions().items()}
    data = Path(options["data"]).expanduser()
    files = sorted(data.iterdir()) if data.is_dir() else [data]
    for path in files:
        if path.suffix.lower() in _INPUTS and os.access(path, os.R_OK) and path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            prints[f"content of {path.name}"] = digest
    return prints | {"number of input files": str(len(files))}
