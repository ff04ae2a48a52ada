"""Peak memory of Boltz-1 on one of four fake GPUs (see bench/live_memory.py): only tiles exist."""

from __future__ import annotations

import torch

from bench.live_memory import TOKENS
from foldcp.boltz.families.dry_run.measure import measure
from foldcp_kernels.core.chunking import chunk_bytes

N = TOKENS // 4
CHUNK = chunk_bytes(torch.device("cuda")) // 16  # the same multiple of N^2 as at full size
# Bytes x N^2 of a rank of 2x2 in float32: a tile of z takes 128, one whole pair tensor 512.
MOST = 800


def test_no_rank_holds_a_whole_pair_tensor() -> None:
    found = measure(N, 2, 2, 1, chunk=CHUNK, recycles=0, kind="boltz1")
    part = {s.stage: s.per_pair for s in found}
    assert {"msa", "conditioning", "sampling", "confidence"} <= part.keys()
    # The tile of z, a copy and what is computed from them are there: the count sees them.
    assert all(part[stage] > 256 for stage in ("msa", "pairformer", "confidence"))
    assert part["overall"] <= MOST, part
