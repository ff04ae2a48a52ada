"""Diffusion conditioning, score model and sampler against stock Boltz, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import ranks
import torch
from boltz.model.modules import diffusionv2
from boltz.model.modules.diffusion_conditioning import (
    DiffusionConditioning as StockDiffusionConditioning,
)
from boltz.model.modules.diffusionv2 import AtomDiffusion as StockAtomDiffusion
from parity import everything_float64
from test_atoms import (
    TOKENS,
    _shard,
    assert_close,
    dense,
    layouts,
    random_sample,
    randomise,
)
from torch import Tensor, nn

from foldcp.boltz.families import boltz2_options
from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import AtomLayout, PairLayout
from foldcp.modules.atoms.encoder import MASKED
from foldcp.modules.atoms.windows import atom_shard
from foldcp.modules.diffusion.conditioning import Conditioning, DiffusionConditioning
from foldcp.modules.diffusion.noise import noise_schedule
from foldcp.modules.diffusion.sampler import AtomDiffusion
from foldcp_kernels.core.chunking import set_chunk_bytes

TOKEN_S, TOKEN_Z, ATOM_S, ATOM_Z, DEPTH, HEADS, LAYERS = 12, 10, 16, 6, 3, 4, 2
WINDOWS = dict(atoms_per_window_queries=32, atoms_per_window_keys=128)
UNSTEERED = dict(fk_steering=False, physical_guidance_update=False, contact_guidance_update=False)
MESHES = [(1, 1), (1, 2), (2, 2)]  # 3x3: tests/modules/test_model.py
STEPS, SAMPLES, SEED = 5, 2, 7


def stock_conditioning() -> nn.Module:
    return randomise(
        StockDiffusionConditioning(
            token_s=TOKEN_S,
            token_z=TOKEN_Z,
            atom_s=ATOM_S,
            atom_z=ATOM_Z,
            **WINDOWS,
            atom_encoder_depth=DEPTH,
            atom_encoder_heads=HEADS,
            token_transformer_depth=LAYERS,
            token_transformer_heads=HEADS,
            atom_decoder_depth=DEPTH,
            atom_decoder_heads=HEADS,
            atom_feature_dim=388,
        )
    )


def stock_sampler(**options: Any) -> nn.Module:
    score = dict(
        token_s=TOKEN_S,
        atom_s=ATOM_S,
        **WINDOWS,
        sigma_data=16,
        dim_fourier=20,
        atom_encoder_depth=DEPTH,
        atom_encoder_heads=HEADS,
        token_transformer_depth=LAYERS,
        token_transformer_heads=HEADS,
        atom_decoder_depth=DEPTH,
        atom_decoder_heads=HEADS,
    )
    options = dict(sigma_min=0.0001, alignment_reverse_diff=True) | options
    return randomise(StockAtomDiffusion(score, num_sampling_steps=STEPS, **options), seed=1)


@dataclass(frozen=True)
class Trunk:
    """Random outputs of a trunk over all tokens."""

    s_inputs: Tensor
    s: Tensor
    z: Tensor
    relpos: Tensor


def random_trunk(n: int) -> Trunk:
    g = torch.Generator().manual_seed(n)
    shapes = ((1, n, TOKEN_S), (1, n, TOKEN_S), (1, n, n, TOKEN_Z), (1, n, n, TOKEN_Z))
    return Trunk(*(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes))


def tile(x: Tensor, layout: PairLayout) -> Tensor:
    """This rank's tile of [1, N, N, C]; padding is NaN, which no valid result may depend on."""
    out = x.new_full((1, layout.padded, layout.padded, x.shape[3]), torch.nan)
    out[:, : layout.n, : layout.n] = x
    (r0, r1), (c0, c1) = layout.tile_box()
    return out[:, r0:r1, c0:c1]


@dataclass(frozen=True)
class Case:
    """One sample with stock's and our conditioning of it."""

    feats: dict[str, Tensor]
    trunk: Trunk
    layout: PairLayout
    atom_layout: AtomLayout
    theirs: dict[str, Any]
    ours: Conditioning


def make_case(mesh: Mesh, n: int, masked: int = 0, dtype: torch.dtype = torch.float64) -> Case:
    """`masked` tokens at the end are padding tokens of stock."""
    feats = {
        k: x.to(dtype) if x.is_floating_point() else x for k, x in random_sample(n, seed=n).items()
    }
    feats["token_pad_mask"][:, n - masked :] = 0
    trunk = Trunk(*(x.to(dtype) for x in vars(random_trunk(n)).values()))
    layout, atom_layout = layouts(feats, mesh)
    twin = stock_conditioning().to(dtype)
    stock = twin(trunk.s, trunk.z, trunk.relpos, dense(feats))
    names = ("q", "c", "to_keys", "atom_enc_bias", "atom_dec_bias", "token_trans_bias")
    relpos = tile(trunk.relpos, layout)
    ours = DiffusionConditioning(twin, mesh, boltz2_options.diffusion_conditioning(twin))(
        _shard(trunk.s, layout),
        tile(trunk.z, layout),
        lambda lo, hi: relpos[:, lo:hi],
        feats,
        layout,
        atom_layout,
    )
    theirs = dict(zip(names, stock, strict=True))
    return Case(feats, trunk, layout, atom_layout, theirs, ours)


def sample_both(
    mesh: Mesh, case: Case, twin: nn.Module, steering: Any = None, stock_args: Any = None, **options
) -> tuple[Tensor, Tensor]:
    """(ours, stock's) coordinates; both must leave the generator at the same place."""
    shards = (_shard(case.trunk.s_inputs, case.layout), _shard(case.trunk.s, case.layout))
    torch.manual_seed(SEED)
    ours = AtomDiffusion(twin, mesh, boltz2_options.sampler(twin)).sample(
        case.ours,
        *shards,
        case.feats,
        case.layout,
        case.atom_layout,
        multiplicity=SAMPLES,
        steering=steering,
        **options,
    )
    state = torch.get_rng_state()
    torch.manual_seed(SEED)
    theirs = twin.sample(
        atom_mask=case.feats["atom_pad_mask"],
        multiplicity=SAMPLES,
        steering_args=dict(stock_args or UNSTEERED),
        s_inputs=case.trunk.s_inputs,
        s_trunk=case.trunk.s,
        feats=dense(case.feats),
        diffusion_conditioning=case.theirs,
    )["sample_atom_coords"]
    assert torch.equal(state, torch.get_rng_state()), "the generators differ after sampling"
    return ours, theirs


def check_conditioning(mesh: Mesh, case: Case) -> None:
    block = atom_shard(case.feats, case.layout, case.atom_layout, mesh, DEPTH)
    own = slice(*block.own)
    for name in ("q", "c"):
        assert_close(getattr(case.ours, name), block.cut(case.theirs[name]), name)
    (r0, r1), (c0, c1) = case.layout.tile_box()
    bias = case.theirs["token_trans_bias"][0, r0:r1, c0:c1]
    rows, cols = bias.shape[:2]
    ours = case.ours.token_bias[:, :, :rows, :cols]
    penalty = (1 - case.feats["token_pad_mask"][0, c0:c1]) * MASKED
    theirs = bias.view(rows, cols, LAYERS, HEADS).permute(2, 3, 0, 1) + penalty
    assert_close(ours, theirs, "token bias")
    windows = slice(own.start // 32, own.stop // 32)
    first = block.span[0] // 32
    real = block.key_mask[windows, None, None]
    for name in ("atom_enc_bias", "atom_dec_bias"):
        theirs = case.theirs[name][0, first + windows.start : first + windows.stop]
        ours = getattr(case.ours, name)[:, windows]
        for layer in range(DEPTH):
            part = theirs[..., layer * HEADS : (layer + 1) * HEADS].permute(0, 3, 1, 2)
            assert_close(ours[layer] * real, part * real, f"{name} {layer}")
            assert bool((ours[layer].masked_select(~real) == MASKED).all()), name


class Springs:
    """A potential with stock's interface that pulls atoms to fixed places."""

    def __init__(self, atoms: int, weight: float, interval: int) -> None:
        g = torch.Generator().manual_seed(3)
        self.place = 10 * torch.randn(atoms, 3, generator=g, dtype=torch.float64)
        self.weight, self.interval = weight, interval

    def compute_parameters(self, time: float) -> dict[str, float]:
        return {
            "resampling_weight": 1e-3 * self.weight * (1 + time),
            "guidance_weight": 1e-2 * self.weight * time,
            "guidance_interval": self.interval,
        }

    def compute(self, coords: Tensor, feats: Any, parameters: Any) -> Tensor:
        return ((coords - self.place) ** 2).mean((-1, -2))

    def compute_gradient(self, coords: Tensor, feats: Any, parameters: Any) -> Tensor:
        return 2 * (coords - self.place)


class SpringSteering:
    """The springs as foldcp's Steering."""

    def __init__(self, potentials: list[Springs], arguments: dict[str, Any]) -> None:
        self.potentials, self.gd_steps = potentials, arguments["num_gd_steps"]
        self.resample = arguments["fk_steering"]
        self.guide = arguments["physical_guidance_update"]
        self.num_particles = arguments["num_particles"] if self.resample else 1
        self.resampling_interval = arguments["fk_resampling_interval"]
        self.strength = arguments["fk_lambda"]

    def energy(self, coords: Tensor, time: float) -> Tensor:
        return sum(
            p.compute_parameters(time)["resampling_weight"] * p.compute(coords, None, None)
            for p in self.potentials
        )

    def guidance(self, coords: Tensor, time: float) -> Tensor:
        update = torch.zeros_like(coords)
        for i in range(self.gd_steps):
            used = [p for p in self.potentials if i % p.interval == 0]
            gradient = sum(
                p.compute_parameters(time)["guidance_weight"]
                * p.compute_gradient(coords + update, None, None)
                for p in used
            )
            update = update - gradient
        return update


def check_steering(mesh: Mesh, case: Case, resample: bool, guide: bool) -> None:
    arguments = UNSTEERED | dict(
        fk_steering=resample,
        physical_guidance_update=guide,
        num_particles=3,
        fk_resampling_interval=2,
        fk_lambda=4.0,
        num_gd_steps=3,
    )
    potentials = [Springs(case.atom_layout.atoms, 1.0, 1), Springs(case.atom_layout.atoms, 0.5, 2)]
    steering = SpringSteering(potentials, arguments)
    with mock.patch.object(diffusionv2, "get_potentials", lambda *_, **__: potentials):
        ours, theirs = sample_both(mesh, case, stock_sampler(), steering, arguments)
    # Redrawn particles, and the spread of their energies, enlarge rounding errors.
    assert_close(ours, theirs, f"steering, resample={resample}, guide={guide}", 1e-9)


def check_all(mesh: Mesh) -> None:
    with everything_float64():
        for n in TOKENS:
            case = make_case(mesh, n)
            check_conditioning(mesh, case)
            assert_close(*sample_both(mesh, case, stock_sampler()), f"sampler, N={n}")
        done: list[tuple[int, int]] = []
        ours, theirs = sample_both(
            mesh,
            case,
            stock_sampler(alignment_reverse_diff=False),
            max_parallel_samples=1,
            progress=lambda *x: done.append(x),
        )
        assert_close(ours, theirs, "sampler without alignment, one sample at a time")
        assert done == [(i + 1, STEPS) for i in range(STEPS)]
        for resample, guide in ((True, True), (True, False), (False, True)):
            check_steering(mesh, case, resample, guide)
        # Small chunks, and tokens that stock masks.
        set_chunk_bytes(1 << 16)
        case = make_case(mesh, 30, masked=2)
        check_conditioning(mesh, case)
        assert_close(*sample_both(mesh, case, stock_sampler()), "sampler with masked tokens")
        set_chunk_bytes(None)


@pytest.mark.parametrize(("rows", "cols"), MESHES)
def test_diffusion_equals_stock(rows: int, cols: int) -> None:
    ranks.run(rows, cols, check_all)


def test_float32_sampler_follows_stock() -> None:
    """Within ten times what a relative change of 1e-7 of the weights does to stock itself."""
    mesh = Mesh.create(1, 1)
    small = make_case(mesh, 61, dtype=torch.float32)
    twin = stock_sampler().float()
    ours, theirs = sample_both(mesh, small, twin)
    assert ours.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    for p in twin.parameters():
        p.mul_(1 + 1e-7 * torch.randn(p.shape, generator=generator))
    _, moved = sample_both(mesh, small, twin)
    floor = float((moved - theirs).abs().max())
    assert float((ours - theirs).abs().max()) <= 10 * floor


def test_autocast_rounds_biases_but_not_atoms() -> None:
    """bfloat16 stays within the Linears that Boltz runs in it: atoms keep float32."""
    mesh = Mesh.create(1, 1)
    case = make_case(mesh, 61, dtype=torch.float32)
    twin = stock_conditioning().float()
    tiled = DiffusionConditioning(twin, mesh, boltz2_options.diffusion_conditioning(twin))
    with torch.autocast("cpu", torch.bfloat16):
        ours = tiled(
            case.trunk.s,
            case.trunk.z,
            lambda lo, hi: case.trunk.relpos[:, lo:hi],
            case.feats,
            case.layout,
            case.atom_layout,
        )
    for name in ("q", "c"):
        assert torch.equal(getattr(ours, name), getattr(case.ours, name)), name
    for name in ("atom_enc_bias", "atom_dec_bias", "token_bias"):
        rounded, exact = getattr(ours, name), getattr(case.ours, name)
        assert rounded.dtype == torch.bfloat16
        keep = exact > MASKED / 2
        assert_close(rounded.float() * keep, exact * keep, name, 0.05)


def test_one_sampling_step_is_refused() -> None:
    with pytest.raises(ValueError, match="num_sampling_steps.* is 1; .*at least 2"):
        noise_schedule(boltz2_options.sampler(stock_sampler()), 1, torch.device("cpu"))
