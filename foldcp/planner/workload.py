"""Describe a prediction to the planner: how large an input is, and how a mesh would fold it."""

from __future__ import annotations

from dataclasses import dataclass

# Of a prediction, in their order.
STAGES = (
    "input_embedder",
    "recycling",
    "templates",
    "msa",
    "pairformer",
    "distogram",
    "conditioning",
    "sampling",
    "confidence",
)


@dataclass(frozen=True)
class Workload:
    """One input and what is asked of it.

    Args:
        tokens: N.
        atoms: A.
        sequences: rows of the alignment that the model reads.
        templates: structures that it reads.
        samples: diffusion samples.
        parallel_samples: samples that are computed at once, None for all.
        recycling_steps: passes of the trunk after the first.
        sampling_steps: of the sampler.
        model: "boltz2" or "boltz1".
    """

    tokens: int
    atoms: int
    sequences: int = 1
    templates: int = 0
    samples: int = 1
    parallel_samples: int | None = None
    recycling_steps: int = 3
    sampling_steps: int = 200
    model: str = "boltz2"

    @property
    def together(self) -> int:
        """Return the number of samples that are computed at once."""
        return min(self.samples, self.parallel_samples or self.samples)


@dataclass(frozen=True)
class Setup:
    """Choices of how a mesh folds an input.

    Args:
        rows: R of the mesh.
        cols: Q of the mesh.
        memory: "fast" or "lean".
        multiplication: strategy of triangle multiplication, none of them "auto".
        attention: strategy of triangle attention, none of them "auto".
        wire: "raw" or "fp8".
        z_itemsize: bytes of an element of z.
        itemsize: bytes of an element of what the pair and MSA tracks compute in.
        chunk_bytes: largest temporary of a chunk (FOLDCP_CHUNK_MB).
    """

    rows: int
    cols: int
    memory: str = "fast"
    multiplication: str = "panel-direct"
    attention: str = "panel-direct"
    wire: str = "raw"
    z_itemsize: int = 4
    itemsize: int = 2
    chunk_bytes: int = 256_000_000

    @property
    def size(self) -> int:
        """Return P, the number of ranks."""
        return self.rows * self.cols
