"""Choose how tiles travel, the strategies of the triangle ops, and what is recorded."""

from __future__ import annotations

from dataclasses import dataclass, fields

from foldcp.config import ATTENTION, CONTRACTIONS, GRAPHS, MEMORY, MULTIPLICATION, ROUTES, WIRES
from foldcp.config.precision import FORMATS

# Of each triangle op, "auto" first.
STRATEGIES = {"triangle_multiplication": MULTIPLICATION, "triangle_attention": ATTENTION}
_NAMES = {"route": ROUTES, "wire": WIRES, "multiplication": MULTIPLICATION, "attention": ATTENTION}
_NAMES |= {"graphs": GRAPHS, "memory": MEMORY, "contraction": CONTRACTIONS}
_NAMES |= {group: FORMATS[group] for group in ("single", "tokens", "atoms")}


@dataclass(frozen=True)
class Policy:
    """Choices of how the ranks of a mesh work, alike on all of them.

    Args:
        route: "direct" or "ring", where tiles are fetched from.
        wire: "raw" or "fp8", how panels travel.
        multiplication: strategy of triangle multiplication, "auto" or a name of `STRATEGIES`.
        attention: strategy of triangle attention, "auto" or a name of `STRATEGIES`.
        graphs: whether blocks and steps are recorded as CUDA graphs: "auto" where it is possible
            and pays, "0" never, "1" always, or else an error (FOLDCP_GRAPHS).
        memory: "fast", "lean", or "auto": lean where fast would not fit (FOLDCP_MEMORY).
        contraction: planes of triangle multiplication, which travel and are contracted: in what
            the projections are computed in ("same") or as FP8 ("fp8", without gradients).

        single: format of products of the single track, see `foldcp.config.precision`.
        tokens: of the sampler's token transformer.
        atoms: of the sampler's atom transformers.

    Raises:
        ValueError: an unknown name.
    """

    route: str = "direct"
    wire: str = "raw"
    multiplication: str = "auto"
    attention: str = "auto"
    graphs: str = "auto"
    memory: str = "auto"
    contraction: str = "same"
    single: str = "fp32"
    tokens: str = "fp32"
    atoms: str = "fp32"

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if value not in _NAMES[name]:
                raise ValueError(f"{name} must be one of {_NAMES[name]}, got {value!r}")
