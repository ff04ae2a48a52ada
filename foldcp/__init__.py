"""Context-parallel folding with stock Boltz: one complex over a mesh of GPUs or CPU processes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from foldcp._version import __version__

# Where what is public lives; loaded on use: `import foldcp` needs neither Boltz nor a second.
_PUBLIC = {
    "AttentionPairBiasWeights": "foldcp.modules.trunk.block_weights",
    "Mesh": "foldcp.fabric.mesh",
    "Model": "foldcp.boltz.api.session",
    "PairWeights": "foldcp.modules.trunk.block_weights",
    "PairformerBlockWeights": "foldcp.modules.trunk.block_weights",
    "Prediction": "foldcp.boltz.api.predictions",
    "SingleWeights": "foldcp.modules.trunk.block_weights",
    "TiledPairformer": "foldcp.modules.trunk.stack",
    "TransitionWeights": "foldcp_kernels.transition",
    "TriangleAttentionWeights": "foldcp_kernels.triangle_attention",
    "TriangleMultiplicationWeights": "foldcp_kernels.triangle_multiplication",
    "UserError": "foldcp.errors",
    "apply": "foldcp.boltz.families.swap",
    "cut_shard": "foldcp.modules.trunk.whole",
    "cut_tile": "foldcp.modules.trunk.whole",
    "gather_pairs": "foldcp.modules.trunk.whole",
    "gather_tokens": "foldcp.modules.trunk.whole",
    "load": "foldcp.boltz.api.session",
}
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'foldcp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
