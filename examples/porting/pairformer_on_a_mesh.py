"""The pairformer of another AlphaFold 3-like model on a mesh, from its `state_dict`; no Boltz.

    torchrun --nproc-per-node 4 examples/porting/pairformer_on_a_mesh.py [ROWSxCOLS]

The model is the small Protenix of miniature.py. Four processes hold a quarter of its pair tensor
each; the result is gathered and compared with the model's own, in float64. Look at: `block_weights`
is all that is written for an architecture; N is no multiple of the mesh, and some pairs are masked.
docs/porting.md goes through it step by step.
"""

import sys
from collections.abc import Mapping

import torch
import torch.distributed as dist
from miniature import PairformerStack
from torch import Tensor

import foldcp

TOKENS = 19
SIZES = dict(blocks=2, c_s=24, c_z=16, heads=3, hidden=20, width=4, pair_heads=5, factor=2)
State = Mapping[str, Tensor]


def multiplication_weights(state: State, name: str) -> foldcp.TriangleMultiplicationWeights:
    """Algorithms 12 and 13: the projections of a, then those of b."""
    p_in, g_in = (
        torch.cat([state[f"{name}.linear_{side}_{kind}.weight"] for side in "ab"]) for kind in "pg"
    )
    return foldcp.TriangleMultiplicationWeights(
        norm_in_weight=state[f"{name}.layer_norm_in.weight"],
        norm_in_bias=state[f"{name}.layer_norm_in.bias"],
        p_in=p_in,
        g_in=g_in,
        norm_out_weight=state[f"{name}.layer_norm_out.weight"],
        norm_out_bias=state[f"{name}.layer_norm_out.bias"],
        p_out=state[f"{name}.linear_z.weight"],
        g_out=state[f"{name}.linear_g.weight"],
    )


def attention_weights(state: State, name: str) -> foldcp.TriangleAttentionWeights:
    """Algorithms 14 and 15; the number of heads is that of their biases."""
    bias = state[f"{name}.linear.weight"]
    return foldcp.TriangleAttentionWeights(
        norm_weight=state[f"{name}.layer_norm.weight"],
        norm_bias=state[f"{name}.layer_norm.bias"],
        bias=bias,
        **{kind: state[f"{name}.mha.linear_{kind}.weight"] for kind in "qkvgo"},
        heads=len(bias),
    )


def transition_weights(state: State, name: str) -> foldcp.TransitionWeights:
    """Algorithm 11: the swish goes through fc1."""
    return foldcp.TransitionWeights(
        norm_weight=state[f"{name}.layernorm1.weight"],
        norm_bias=state[f"{name}.layernorm1.bias"],
        fc1=state[f"{name}.linear_no_bias_a.weight"],
        fc2=state[f"{name}.linear_no_bias_b.weight"],
        fc3=state[f"{name}.linear_no_bias.weight"],
    )


def block_weights(state: State, name: str) -> foldcp.PairformerBlockWeights:
    """Algorithm 17, one block."""
    single, bias = f"{name}.attention_pair_bias", "attention_pair_bias.linear_nobias_z.weight"
    attention = foldcp.AttentionPairBiasWeights(
        norm_weight=state[f"{single}.layernorm_a.weight"],
        norm_bias=state[f"{single}.layernorm_a.bias"],
        pair_norm_weight=state[f"{single}.layernorm_z.weight"],
        pair_norm_bias=state[f"{single}.layernorm_z.bias"],
        pair=state[f"{name}.{bias}"],
        **{kind: state[f"{single}.attention.linear_{kind}.weight"] for kind in "qkvgo"},
        heads=len(state[f"{name}.{bias}"]),
        q_bias=state[f"{single}.attention.linear_q.bias"],
    )
    return foldcp.PairformerBlockWeights(
        pair=foldcp.PairWeights(
            tri_mul_out=multiplication_weights(state, f"{name}.tri_mul_out"),
            tri_mul_in=multiplication_weights(state, f"{name}.tri_mul_in"),
            tri_att_start=attention_weights(state, f"{name}.tri_att_start"),
            tri_att_end=attention_weights(state, f"{name}.tri_att_end"),
            transition=transition_weights(state, f"{name}.pair_transition"),
        ),
        single=foldcp.SingleWeights(
            attention, transition_weights(state, f"{name}.single_transition")
        ),
    )


def tiled(state: State, mesh: foldcp.Mesh) -> foldcp.TiledPairformer:
    """The stack with all blocks of a `state_dict`."""
    count = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return foldcp.TiledPairformer([block_weights(state, f"blocks.{i}") for i in range(count)], mesh)


def inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(s, z, pair mask) of n tokens, the same on every rank: some pairs are masked."""
    made = torch.Generator().manual_seed(n)
    s = torch.randn(n, SIZES["c_s"], generator=made, dtype=torch.float64)
    z = torch.randn(n, n, SIZES["c_z"], generator=made, dtype=torch.float64)
    mask = (torch.rand(n, n, generator=made) < 0.8).double()
    return s, z, mask.fill_diagonal_(1)


def model() -> PairformerStack:
    """The other architecture with random weights, norms and biases included."""
    torch.manual_seed(0)
    stack = PairformerStack(**SIZES).double().eval()
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return stack


@torch.no_grad()
def run(mesh: foldcp.Mesh, state: State, s: Tensor, z: Tensor, mask: Tensor) -> tuple:
    """(s, z) of the stack over the mesh: s on every rank, z on rank 0 and None elsewhere."""
    layout = mesh.layout(len(s))
    shard, tile = foldcp.cut_shard(s[None], layout), foldcp.cut_tile(z[None], layout)
    pair_mask = foldcp.cut_tile(mask[None], layout)
    shard, tile = tiled(state, mesh)(shard, tile, layout, pair_mask=pair_mask)
    whole = foldcp.gather_pairs(tile, layout, mesh)
    return foldcp.gather_tokens(shard, layout, mesh)[0], None if whole is None else whole[0]


if __name__ == "__main__":
    rows, cols = map(int, (sys.argv[1] if len(sys.argv) > 1 else "2x2").split("x"))
    dist.init_process_group("gloo")
    mesh = foldcp.Mesh.create(rows, cols, "cpu")
    stack, given = model(), inputs(TOKENS)
    s, z = run(mesh, stack.state_dict(), *given)
    if z is not None:
        with torch.no_grad():
            alone = stack(*given)
        off = [
            float((a - b).abs().max() / b.abs().max()) for a, b in zip((s, z), alone, strict=True)
        ]
        held = mesh.layout(TOKENS)
        print(f"{rows}x{cols} mesh, {TOKENS} tokens, tiles of {held.tile_rows}x{held.tile_cols}")
        print(f"largest relative error: single {off[0]:.0e}, pair {off[1]:.0e}")
    mesh.close()
    dist.destroy_process_group()
