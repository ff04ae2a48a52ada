"""Model atoms, the conditioning of the sampler, and its steps. All of it is in float32."""

from __future__ import annotations

from math import ceil

from foldcp.planner.stage_time.parts import FLOAT32, Case, Part
from foldcp.planner.stage_time.trunk import transition

# Products of C by C in a conditioned layer: q, k, v, gate, output; 4 + 2 + 2 of SwiGLU.
_WIDTHS = 13
_GATES = 6  # of a layer, from its conditioning
# Reads and writes of all activations beside products, per conditioned layer.
_PASSES = 20


def atoms_of(case: Case) -> tuple[int, int]:
    """Return the atoms of a rank's own windows, and with the halo around them."""
    d, size = case.dims, case.setup.size
    windows = ceil(case.workload.atoms / d.queries)
    own = ceil(windows / size) * d.queries
    halo = 2 * d.queries * d.atom_layers * min(2, size - 1) if size > 1 else 0
    return own, min(own + halo, windows * d.queries)


def products(case: Case, rows: float, channels: int, count: int, calls: int) -> Part:
    """Model products of rows with square weights.

    Args:
        case: the prediction.
        rows: of activations.
        channels: of a row, and of a product.
        count: of products.
        calls: of torch's operators that they are.
    """
    moved = count * channels * (2 * rows + channels) * FLOAT32
    return case.kernel("linear", 2 * count * rows * channels**2, moved, 0, FLOAT32, calls=calls)


def atom_layers(case: Case, samples: int) -> Part:
    """Model the window layers of one side, encoder or decoder.

    Args:
        case: the prediction.
        samples: at once.
    """
    d, (_, atoms) = case.dims, atoms_of(case)
    c, rows = d.atom_s, samples * atoms
    linear = products(case, rows, c, _WIDTHS, 9)
    pairs = atoms * d.keys
    window = case.kernel(
        "atom_attention",
        4 * samples * pairs * c,
        (pairs * d.atom_heads + 10 * rows * c) * FLOAT32,
        samples * pairs * d.atom_heads,
        FLOAT32,
        launches=1,
        calls=12,
    )
    passes = case.kernel("elementwise", 0, _PASSES * rows * c * FLOAT32, launches=4, calls=2)
    return d.atom_layers * (linear + window + passes)


def atom_gates(case: Case) -> Part:
    """Model the gates of the window layers of one side, computed once."""
    d, (_, atoms) = case.dims, atoms_of(case)
    return d.atom_layers * products(case, atoms, d.atom_s, _GATES, 14)


def atom_embedding(case: Case, layers: int) -> Part:
    """Model atoms and their pairs as far as the windows' biases.

    Args:
        case: the prediction.
        layers: whose biases are made.
    """
    d, (_, atoms) = case.dims, atoms_of(case)
    pairs = atoms * d.keys
    flops = 2 * pairs * d.atom_z * (3 * d.atom_z + layers * d.atom_heads)
    moved = pairs * (16 * d.atom_z + 2 * layers * d.atom_heads) * FLOAT32
    return case.kernel("elementwise", flops, moved, 0, FLOAT32, calls=60)


def input_embedder(case: Case) -> Part:
    """Model the input embedder."""
    d, (own, _) = case.dims, atoms_of(case)
    to_tokens = case.kernel("linear", 2 * own * d.atom_s * d.token_s, own * d.token_s * 4, 0, 4)
    return (
        atom_embedding(case, d.atom_layers)
        + atom_gates(case)
        + atom_layers(case, 1)
        + to_tokens
        + case.bytes_moved(case.layout.shard * d.token_s * FLOAT32, 2)
    )


def conditioning(case: Case) -> Part:
    """Model what the sampler takes from the pair, once."""
    d, pairs, c = case.dims, case.tile, case.dims.token_z
    heads, e = d.token_layers * d.token_heads, case.setup.itemsize
    joined = case.kernel("pair_rows", 4 * pairs * c * c, 8 * pairs * c * FLOAT32, calls=5)
    rows = transition(case, pairs, c, 2, e)
    biases = case.kernel(
        "pair_rows", 2 * pairs * c * (heads + d.atom_z), pairs * (2 * c * 4 + heads * e), launches=2
    )
    return (
        joined
        + d.conditioning_transitions * rows
        + biases
        + atom_embedding(case, 2 * d.atom_layers)
        + 2 * atom_gates(case)
    )


def token_layer(case: Case, samples: int) -> Part:
    """Model one layer of the token transformer.

    Args:
        case: the prediction.
        samples: at once.
    """
    d, lay, pairs = case.dims, case.layout, case.tile
    c, rows = 2 * d.token_s, samples * lay.shard
    linear = products(case, rows, c, _WIDTHS, 9)
    gates = products(case, lay.shard, c, _GATES, 9)
    attention = case.kernel(
        "attention_pair_bias",
        4 * samples * pairs * c,
        pairs * d.token_heads * case.setup.itemsize
        + 3 * samples * (lay.tile_rows + lay.tile_cols) * c * FLOAT32,
        samples * pairs * d.token_heads,
        FLOAT32,
        launches=1,
    )
    passes = case.kernel("elementwise", 0, _PASSES * rows * c * FLOAT32, launches=4, calls=4)
    each = samples * c * FLOAT32
    moved = case.exchange("tokens", ("rows", "cols", "cols"), [each] * 3, samples)
    statistics = 2 * samples * d.token_heads * FLOAT32
    partial = case.exchange("partials", ("o", "lse"), [each, statistics])
    return linear + gates + attention + passes + moved + partial


def score(case: Case, samples: int) -> Part:
    """Model one call of the score model.

    Args:
        case: the prediction.
        samples: of the call.
    """
    d, (own, atoms), shard = case.dims, atoms_of(case), case.layout.shard
    c = 2 * d.token_s
    ends = case.kernel(
        "linear",
        2 * samples * (own * d.atom_s * c + shard * c * (c + d.atom_s)),
        samples * (4 * own * c + 6 * shard * c + 6 * atoms * d.atom_s) * FLOAT32,
        0,
        FLOAT32,
        calls=30,
    )
    moved = (
        case.bytes_moved(samples * shard * c * FLOAT32, 2)
        + case.bytes_moved(samples * atoms * d.atom_s * FLOAT32, 2)
        + case.bytes_moved(samples * (case.workload.atoms - own) * 12, case.setup.size - 1)
    )
    layers = d.token_layers * token_layer(case, samples)
    return layers + 2 * atom_layers(case, samples) + ends + moved


def step(case: Case) -> Part:
    """Model one step of the sampler for all samples."""
    d, w, shard = case.dims, case.workload, case.layout.shard
    c = 2 * d.token_s
    single = case.kernel(
        "linear", 4 * 3 * 2 * shard * c * 2 * c, 20 * shard * c * FLOAT32, 0, FLOAT32, calls=14
    )
    around = case.kernel("elementwise", 0, 40 * w.samples * w.atoms * 12, calls=60)
    full, rest = divmod(w.samples, w.together)
    calls = full * score(case, w.together)
    return single + around + calls + (score(case, rest) if rest else Part())
