"""Count the live bytes of each stage of a prediction, in their order.

Source: docs/design/strategies-and-cost.md.
"""

from __future__ import annotations

from foldcp.planner.dims import dims_of
from foldcp.planner.stage_memory import terms
from foldcp.planner.stage_memory.terms import FLOAT32, Case
from foldcp.planner.stage_memory.triangles import pair_ops
from foldcp.planner.workload import STAGES, Setup, Workload

# Parameters of the published checkpoints in float32, as `boltz predict` loads them.
_WEIGHTS = {"boltz2": 506_724_992 * FLOAT32, "boltz1": 592_009_278 * FLOAT32}


def _input_embedder(case: Case) -> int:
    bias = terms.atom_biases(case, case.dims.atom_layers)
    layer = 2 * bias + terms.atom_rows(case, 17)
    pairs = bias + terms.atom_rows(case, 2) + terms.window_pairs(case) * 2 // 3
    return terms.features(case) + max(layer, pairs)


def _trunk(case: Case) -> int:
    return terms.features(case) + terms.singles(case) + case.z


def _recycling(case: Case) -> int:
    d, lay = case.dims, case.layout
    each = 6 * lay.tile_cols * d.token_z * case.setup.z_itemsize
    return _trunk(case) + each * case.chunk(lay.tile_rows, each) // 2


def _templates(case: Case) -> int:
    d, held = case.dims, 0
    if case.workload.templates and d.template_z:
        held = 2 * case.pairs * d.template_z * FLOAT32 + pair_ops(case) * d.template_z // d.token_z
    return _trunk(case) + held


def _alignment(case: Case) -> int:
    pairs = pair_ops(case) + terms.masks(case)
    return terms.alignment(case) + max(pairs, terms.outer_product(case), terms.averaging(case))


def _msa(case: Case) -> int:
    return _trunk(case) + (0 if case.lean else case.z) + _alignment(case)


def _pairformer(case: Case) -> int:
    return _trunk(case) + terms.masks(case) + pair_ops(case)


def _distogram(case: Case) -> int:
    return _trunk(case) + terms.contacts(case) + terms.mirrored_rows(case)


def _sampler(case: Case) -> int:
    held = _trunk(case) - (case.z if case.lean else 0) + terms.contacts(case)
    return held + terms.gathered_single(case) + terms.pooled(case) + terms.token_biases(case)


def _conditioning(case: Case) -> int:
    windows = terms.atom_biases(case, 2 * case.dims.atom_layers) + terms.atom_rows(case, 2)
    largest = max(terms.conditioned_rows(case), windows + terms.window_pairs(case))
    return _sampler(case) + case.pairs * case.dims.atom_z * FLOAT32 + largest


def _sampling(case: Case) -> int:
    windows = terms.atom_biases(case, 2 * case.dims.atom_layers) + terms.atom_rows(case, 37)
    layer = max(terms.token_layer(case), terms.window_layer(case))
    return _sampler(case) + windows + layer


def _confidence(case: Case) -> int:
    held = terms.contacts(case) + terms.gathered_single(case)
    if case.workload.samples > 1 and not case.lean:
        held += case.z
    return held + (_msa(case) if case.dims.confidence_msa_blocks else _pairformer(case))


_OF_STAGE = {
    "input_embedder": _input_embedder,
    "recycling": _recycling,
    "templates": _templates,
    "msa": _msa,
    "pairformer": _pairformer,
    "distogram": _distogram,
    "conditioning": _conditioning,
    "sampling": _sampling,
    "confidence": _confidence,
}


def stage_bytes(workload: Workload, setup: Setup, rank: int | None = None) -> dict[str, int]:
    """Count the live bytes of each stage of a prediction on a rank, weights apart.

    Args:
        workload: the input and what is asked of it.
        setup: the mesh and its choices.
        rank: of the mesh; None for the most of any rank.

    Returns:
        For each of `STAGES` the bytes at its peak.

    Raises:
        ValueError: there is no such model, or no such rank.

    Source: docs/design/strategies-and-cost.md.
    """
    dims = dims_of(workload.model)
    ranks = range(setup.size) if rank is None else (rank,)
    found = [_of_rank(Case(workload, setup, dims, i)) for i in ranks]
    return {name: max(one[name] for one in found) for name in STAGES}


def _of_rank(case: Case) -> dict[str, int]:
    return {name: _OF_STAGE[name](case) for name in STAGES}


def weights_bytes(model: str) -> int:
    """Return the bytes of a model's weights, which every rank holds.

    Args:
        model: "boltz2" or "boltz1".

    Raises:
        ValueError: there is no such model.
    """
    dims_of(model)
    return _WEIGHTS[model]


def peak_bytes(workload: Workload, setup: Setup, rank: int | None = None) -> int:
    """Count the bytes of a rank at its peak, weights included.

    Args:
        workload: as of `stage_bytes`.
        setup: as of `stage_bytes`.
        rank: as of `stage_bytes`.
    """
    return max(stage_bytes(workload, setup, rank).values()) + weights_bytes(workload.model)
