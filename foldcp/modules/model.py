"""The prediction of one input on a mesh: the order of the stages and nothing else.

features -> open outputs -> input embedding -> (recycle: pair input, templates, MSA, pairformer) ->
distogram -> diffusion conditioning -> sampler -> confidence -> hand over
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foldcp.errors import InputLost
from foldcp.fabric.exchange.autograd import fetch
from foldcp.fabric.memory import on_host
from foldcp.fabric.mesh import Mesh
from foldcp.layout.plans import token_plan
from foldcp.layout.tiles import WINDOW, AtomLayout, PairLayout
from foldcp.modules.confidence.ratings import Ratings
from foldcp.modules.graphs.block_graph import recorded
from foldcp.modules.hooks import Folded, Hooks, Like, MatrixSink, Outputs, Sizes, Wanted
from foldcp.modules.settings import Features, Parts, Settings
from foldcp.modules.trunk.pair_embedding import PairEmbedding
from foldcp.modules.trunk.whole import gather_pairs, gather_tokens, rows_at_root
from foldcp.planner.agreement import agree
from foldcp.planner.choice import lean
from foldcp_kernels.core.chunking import chunk_length, spans

StageProgress = Callable[[str, int, int], None]
_NONE = Hooks()


class NotFinite(InputLost):
    """A prediction with NaN or infinite coordinates."""


class FoldOnMesh:
    """Predicts with a swapped model.

    Args:
        model: Boltz-2 whose submodules are tiled modules (see foldcp.boltz.families.boltz2).
        mesh: the mesh.
        parts: optional parts that the model has.
        steering: makes the steering of one sample from its features, None when none applies.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        parts: Parts,
        steering: Callable[[Features, torch.device], Any] | None = None,
    ) -> None:
        self.model: Any = model
        self.mesh, self.parts, self.steering = mesh, parts, steering
        self.pair_embedding = PairEmbedding(
            self.model.rel_pos,
            self.model.token_bonds,
            self.model.token_bonds_type if parts.bond_types else None,
            None if parts.contacts is None else self.model.contact_conditioning,
            parts.contacts,
        )

    @property
    def conditioner(self) -> nn.Module:
        """Conditions the sampler on the trunk."""
        return self.model.diffusion_conditioning

    def rate(self, *trunk: Any, **options: Any) -> Ratings:
        """Rate the samples, see `ConfidenceModule.forward`.

        Args:
            trunk: the positional arguments of `ConfidenceModule.forward`.
            options: its other arguments.
        """
        rated: Ratings = self.model.confidence_module(*trunk, **options)
        return rated

    def layouts(self, feats: Features) -> tuple[PairLayout, AtomLayout]:
        """Return the tilings of one sample."""
        n, atoms = feats["token_index"].shape[1], feats["atom_pad_mask"].shape[1]
        windows = AtomLayout(atoms // WINDOW, self.mesh.size, self.mesh.rank)
        return self.mesh.layout(n), windows

    @torch.no_grad()
    def __call__(self, batch: Any, settings: Settings, hooks: Hooks = _NONE) -> Any:
        """Predict one input; all ranks of the mesh call it.

        Args:
            batch: what `hooks.features` makes compact features of (collated, B = 1); without
                hooks, these features on the mesh's device, equal on all ranks.
            settings: recycles, steps, samples.
            hooks: where features come from and results go.

        Returns:
            What `hooks.hand_over` returns; without hooks, the outputs.

        Raises:
            InputLost: the input cannot be folded, for a reason that all ranks have.
        """
        model, parts = self.model, self.parts
        feats = hooks.features(batch)
        layout, atoms = self.layouts(feats)
        agree(layout, atoms, self.mesh)
        sizes = self._sizes(layout.n, settings)
        opened = hooks.open_outputs(sizes)
        sink = None if opened is None else Wanted(opened, sizes)
        kept = hooks.keep_trunk(feats, settings)
        found = None if kept is None else kept.load(self._trunk_like(layout))

        hooks.at("input embedding", 0, 1)
        s_inputs = model.input_embedder(feats, layout, atoms)
        with recorded(self.mesh):
            s, z = found or self.trunk(feats, s_inputs, layout, settings.recycling_steps, hooks.at)
        if kept is not None and found is None:
            kept.save(s, z)
        self.mesh.pool.clear()  # what follows has exchanges of other sizes

        hooks.at("distogram", 0, 1)
        contact = model.distogram_module.contact_probability(z, layout)
        singles = gather_tokens(s, layout, self.mesh)
        bfactor = model.bfactor_module(singles) if parts.bfactor else None
        pairs = self._to_root(z, layout, sink) if settings.keep_z else None
        if lean(layout, self.mesh):
            z, found = on_host(z), None  # what follows reads it by rows

        coords = self._sample(feats, s, s_inputs, z, layout, atoms, settings, hooks.at)
        self.mesh.pool.clear()

        ratings = None
        if parts.confidence:
            hooks.at("confidence", 0, 1)
            rated = (s_inputs, s, z, coords, feats, contact, layout)
            with recorded(self.mesh):
                ratings = self.rate(*rated, reuse_z=True, sink=sink)
            hooks.at("confidence", 1, 1)
        outputs = Outputs(coords, singles, bfactor, pairs, ratings)
        return hooks.hand_over(Folded(feats, outputs, opened, kept))

    def _sizes(self, n: int, settings: Settings) -> Sizes:
        """Numbers in each matrix that is handed out, of N tokens."""
        samples = range(settings.diffusion_samples if self.parts.confidence else 0)
        sizes = {(name, m): n * n for name in settings.errors for m in samples}
        if settings.keep_z:
            sizes["z", 0] = n * n * self.model.z_norm.weight.shape[0]
        return sizes

    def trunk(
        self,
        feats: Features,
        s_inputs: Tensor,
        layout: PairLayout,
        recycling_steps: int,
        report: StageProgress,
    ) -> tuple[Tensor, Tensor]:
        """Recycle the pair stack: (single shard [1, n, C_s], pair tile [1, T_r, T_c, C]).

        Args:
            feats: collated compact features.
            s_inputs: shard of the input embedding [1, n, C_s].
            layout: the tiling.
            recycling_steps: passes after the first.
            report: called with (stage, done, in all).
        """
        model = self.model
        s_init = model.s_init(s_inputs)
        z1, z2 = model.z_init_1(s_inputs), model.z_init_2(s_inputs)
        sides = fetch(
            self.mesh, token_plan(layout, ("rows", "cols")), (z1, z2), ((1,), (1,)), "trunk"
        )
        s = torch.zeros_like(s_init)
        dtype = model.z_norm.weight.dtype
        z = s_init.new_zeros(
            (1, layout.tile_rows, layout.tile_cols, model.z_norm.weight.shape[0]), dtype=dtype
        )
        passes = recycling_steps + 1
        deep = len(model.msa_module.layers)
        total = deep + len(model.pairformer_module.layers)
        for i in range(passes):
            stage = f"recycle {i + 1}/{passes}"
            report(stage, 0, total)
            s = s_init + model.s_recycle(model.s_norm(s))
            self._recycle_pair(z, feats, sides, layout)
            if self.parts.templates:
                z = model.template_module(z, feats, layout)
            z = model.msa_module(
                z, s_inputs, feats, layout, lambda k, _, t=stage: report(t, k, total)
            )
            s, z = model.pairformer_module(
                s, z, layout, lambda k, _, t=stage: report(t, deep + k, total)
            )
        return s, z

    def _trunk_like(self, layout: PairLayout) -> Like:
        """Return empty tensors like those that `trunk` returns."""
        single, pair = self.model.s_norm.weight, self.model.z_norm.weight
        shard = (1, layout.padded // layout.size, single.shape[0])
        tile = (1, layout.tile_rows, layout.tile_cols, pair.shape[0])
        computed = (single.dtype,)
        if torch.is_autocast_enabled(single.device.type):
            computed += (torch.get_autocast_dtype(single.device.type),)
        return {"s": (shard, computed), "z": (tile, (pair.dtype,))}

    def _recycle_pair(
        self, z: Tensor, feats: Features, sides: tuple[Tensor, Tensor], layout: PairLayout
    ) -> None:
        """z <- z_init + z_recycle(LN(z)), row chunk by row chunk; z_init is computed again."""
        model, (rows, cols) = self.model, sides
        each = 6 * z.shape[2] * z.shape[3] * z.element_size()
        for lo, hi in spans(z.shape[1], chunk_length(z.shape[1], each, z.device)):
            new = model.z_recycle(model.z_norm(z[:, lo:hi])).to(z.dtype)
            new += rows[:, lo:hi, None]
            new += cols[:, None]
            self.pair_embedding.add_rows_(new, feats, layout, lo, hi)
            z[:, lo:hi] = new

    def _sample(
        self,
        feats: Features,
        s: Tensor,
        s_inputs: Tensor,
        z: Tensor,
        layout: PairLayout,
        atoms: AtomLayout,
        settings: Settings,
        report: StageProgress,
    ) -> Tensor:
        """Coordinates [M, A, 3], finite and equal on all ranks, in angstrom."""
        model = self.model
        report("conditioning", 0, 1)
        conditioning = self.conditioner(
            s,
            z,
            lambda lo, hi: self.pair_embedding.relpos_rows(feats, layout, lo, hi),
            feats,
            layout,
            atoms,
        )
        steering = None if self.steering is None else self.steering(feats, self.mesh.device)
        with torch.autocast(self.mesh.device.type, enabled=False):
            coords = model.structure_module.sample(
                s_trunk=s,
                s_inputs=s_inputs,
                feats=feats,
                conditioning=conditioning,
                layout=layout,
                atom_layout=atoms,
                num_sampling_steps=settings.sampling_steps,
                multiplicity=settings.diffusion_samples,
                max_parallel_samples=settings.max_parallel_samples,
                steering=steering,
                progress=lambda done, total: report("diffusion", done, total),
            )
        if not torch.isfinite(coords).all():
            raise NotFinite(
                "the sampled coordinates are not finite: check the input (forced constraints, "
                "potentials, --step_scale), or use FOLDCP_PRECISION=fp32"
            )
        return coords

    def _to_root(self, z: Tensor, layout: PairLayout, sink: MatrixSink | None) -> Tensor | None:
        """Bring the whole pair tensor to `sink`, or return it in host memory, on the root."""
        if sink is None:
            return gather_pairs(z, layout, self.mesh)
        for lo, rows in rows_at_root(z, layout, self.mesh):
            sink.rows("z", 0, lo, rows[0])
        return None
