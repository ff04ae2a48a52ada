"""Refuse formats of products that the model, the device or the kernels of a run do not have."""

from __future__ import annotations

from typing import Any

from foldcp.config import Config
from foldcp.errors import UserError


def check_formats(options: dict[str, Any], config: Config) -> None:
    """Refuse a FOLDCP_PRECISION that cannot run.

    Args:
        options: the arguments of Boltz's `predict`.
        config: of this run.

    Raises:
        UserError: names what runs instead.
    """
    on_cpu = options.get("accelerator") == "cpu"
    if config.precision not in ("auto", "fp32") and options.get("model") == "boltz1":
        raise UserError(
            f"FOLDCP_PRECISION={config.precision} is set, but Boltz-1 runs in float32 everywhere: "
            "use auto or fp32"
        )
    table = config.precision_on("cpu" if on_cpu else "cuda")
    if on_cpu and table.needs_gpu:
        raise UserError(
            f"FOLDCP_PRECISION={config.precision} computes {', '.join(table.needs_gpu)} in TF32, "
            "which GPUs have, but this run is on cpu: use auto, fp32 or bf16"
        )
    if table.contraction == "fp8" and config.kernels == "cuequivariance":
        raise UserError(
            f"FOLDCP_PRECISION={config.precision} contracts FP8 planes, which cuEquivariance does "
            "not: use FOLDCP_KERNELS=auto"
        )
