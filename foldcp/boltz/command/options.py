"""Derive refusals, and the folder for results, from the options of `boltz predict` alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from foldcp.errors import UserError

# Option -> (least value, what happens in Boltz below it).
_LEAST = {
    "recycling_steps": (0, "the trunk would not run at all"),
    "sampling_steps": (2, "noise levels go from a first step to a last one"),
    "sampling_steps_affinity": (2, "noise levels go from a first step to a last one"),
    "diffusion_samples": (1, "there would be no structure"),
    "diffusion_samples_affinity": (1, "there would be no structure to score"),
    "max_parallel_samples": (1, "no sample would ever be computed"),
    "num_workers": (0, "0 reads inputs in the process itself"),
}


def results_folder(options: dict[str, Any]) -> Path:
    """Return the folder for the results of a prediction, named as Boltz names it.

    Args:
        options: the arguments of Boltz's `predict`.
    """
    name = f"boltz_results_{Path(options['data']).expanduser().stem}"
    return Path(options["out_dir"]).expanduser() / name


def check_numbers(options: dict[str, Any]) -> None:
    """Refuse values that Boltz fails on once the model is loaded, or folds noise with.

    Args:
        options: the arguments of Boltz's `predict`.

    Raises:
        UserError: names every such option and what it may be.
    """
    wrong = []
    for name, (least, why) in _LEAST.items():
        value = options.get(name)
        if value is not None and value < least:
            wrong.append(f"--{name} must be at least {least}, got {value} ({why})")
    scale = options.get("step_scale")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        wrong.append(
            f"--step_scale must be above 0, got {scale} (atoms would not move; 1 to 2 is usual)"
        )
    rows = options.get("num_subsampled_msa")
    if options.get("subsample_msa") and rows is not None and rows < 1:
        wrong.append(
            f"--num_subsampled_msa must be at least 1, got {rows} (an MSA keeps no fewer rows)"
        )
    if wrong:
        raise UserError("; ".join(wrong))


def check_devices(options: dict[str, Any]) -> None:
    """Refuse devices that cannot be combined with ranks.

    Args:
        options: the arguments of Boltz's `predict`.

    Raises:
        UserError: says how to start ranks instead.
    """
    devices, accelerator = options.get("devices", 1), options.get("accelerator", "gpu")
    if devices < 1:
        raise UserError(
            f"--devices {devices} is not a number of devices, and with FOLDCP=1 every process "
            "drives one: drop --devices, and start one process per GPU (FOLDCP_NPROC=auto boltz "
            "predict ...)"
        )
    if devices != 1:
        raise UserError(
            f"--devices {devices} cannot be combined with FOLDCP=1, where every process drives one "
            f"device: drop --devices and start {devices} processes instead (FOLDCP_NPROC={devices} "
            f"boltz predict ..., or torchrun --nproc-per-node {devices} -m boltz.main predict ...)"
        )
    if accelerator not in ("cpu", "gpu"):
        raise UserError(
            f"--accelerator {accelerator} is not supported with FOLDCP=1: use gpu or cpu"
        )
