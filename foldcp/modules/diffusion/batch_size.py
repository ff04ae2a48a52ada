"""Choose how many samples the score model takes at once: as many as fit, alike on all ranks."""

from __future__ import annotations

from foldcp.fabric.memory import free_bytes
from foldcp.fabric.mesh import Mesh
from foldcp.modules.diffusion.score_model import Prepared

# Of the free memory; the rest is for what kernels and the allocator take besides.
_SHARE = 0.8


def samples_at_once(count: int, at_most: int | None, bytes_each: int, mesh: Mesh) -> int:
    """Return the largest number of samples whose activations fit in free memory, at least 1.

    Every rank must call it; they agree on the smallest answer.

    Args:
        count: samples in all.
        at_most: more are not wanted at once; None for no limit.
        bytes_each: memory that one sample takes on this rank.
        mesh: the mesh.
    """
    most = min(count, at_most or count)
    if most == 1:
        return 1
    free = free_bytes(mesh)
    fitting = most if free is None else int(free * _SHARE) // max(1, bytes_each)
    return max(1, min(most, *mesh.ranks.all_gather_object(fitting)))


def sample_bytes(prepared: Prepared, atoms: int) -> int:
    """Estimate, from above, the bytes that a sample adds to the peak of a sampling step.

    Biases and conditioning are shared by all samples; what grows with them are activations, in the
    largest of three places: a layer over atom windows, the mean over the atoms of tokens, a token
    layer with what it fetches. Coordinates of all atoms are on every rank.

    Args:
        prepared: what the steps share.
        atoms: A, of the whole input.
    """
    layout, shard = prepared.layout, prepared.shard
    token, atom = prepared.single.shape[-1], prepared.q.shape[-1]
    lo, hi = layout.shard_span()
    buffer, own = shard.span[1] - shard.span[0], shard.own[1] - shard.own[0]
    fetched = layout.tile_rows + 2 * layout.tile_cols
    # Tensors alive at once, rounded up (tests/modules/test_sampler.py measures what a step takes).
    window_layer = 18 * buffer * atom
    means = 4 * buffer * atom + 2 * own * token
    token_layer = (14 * (hi - lo) + 3 * fetched) * token
    numbers = max(window_layer, means, token_layer) + 16 * 3 * atoms
    return numbers * prepared.q.element_size()
