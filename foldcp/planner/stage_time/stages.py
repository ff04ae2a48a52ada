"""Model the stages of a prediction, in their order.

Source: docs/design/strategies-and-cost.md.
"""

from __future__ import annotations

from foldcp.planner.dims import Dims, dims_of
from foldcp.planner.rates import EXCHANGE, GROUP, LAUNCH, PRODUCT, TRANSFER, Chip, Links
from foldcp.planner.stage_time import diffusion, trunk
from foldcp.planner.stage_time.kernel_rates import ASSUMED, KernelRates
from foldcp.planner.stage_time.parts import FLOAT32, KERNEL_GAP, Case, Part, StageSeconds
from foldcp.planner.workload import Setup, Workload

# Operations of the largest block that one GPU records, as `foldcp.modules.graphs.block_graph` has
# them: 12 N^3 C + 68 N^2 C^2 of a pairformer block.
_MOST_OPERATIONS = 2.9e12


def _distogram(case: Case) -> Part:
    d, pairs = case.dims, case.tile
    moved = pairs * (2 * d.token_z * case.setup.z_itemsize + FLOAT32)
    flops = 2 * pairs * d.token_z * d.bins
    head = case.kernel("pair_rows", flops, moved, pairs * d.bins, launches=2, calls=6)
    return head + case.exchange("transpose", ("z",), [d.token_z * case.setup.z_itemsize])


def _confidence(case: Case) -> Part:
    d, pairs, c = case.dims, case.tile, case.dims.token_z
    lay = case.layout
    built = case.kernel("pair_rows", 2 * pairs * c * c, 14 * pairs * c * FLOAT32, 0, 4, calls=40)
    heads = case.kernel(
        "pair_rows",
        4 * pairs * c * d.bins,
        pairs * (2 * c * case.setup.z_itemsize + 2 * FLOAT32),
        2 * pairs * d.bins,
        launches=2,
        calls=60,
    )
    stack = trunk.pairformer(case, d.confidence_blocks)
    if d.confidence_msa_blocks:
        stack = stack + trunk.alignment(case, d.confidence_msa_blocks)
    size = case.setup.size
    gathered = case.bytes_moved((lay.padded**2 - pairs) * 2 * FLOAT32, size - 1)
    totals = case.bytes_moved(lay.padded * 64 * FLOAT32, size - 1)
    per_sample = built + stack + 2 * heads + gathered + totals
    tokens = case.exchange("tokens", ("rows", "cols") * 2, [c * FLOAT32] * 4)
    return case.workload.samples * per_sample + tokens


def _records_blocks(case: Case) -> bool:
    n, c = case.layout.padded, case.dims.token_z
    small = n * n * c * (12 * n + 68 * c) <= _MOST_OPERATIONS
    return case.setup.size == 1 and case.stated.asynchronous and small


def stage_seconds(
    workload: Workload,
    setup: Setup,
    chip: Chip,
    links: Links,
    rates: KernelRates = ASSUMED,
    dims: Dims | None = None,
) -> dict[str, StageSeconds]:
    """Model the seconds of every stage of a prediction, in their order.

    Args:
        workload: the input and what is asked of it.
        setup: the mesh and its choices.
        chip: processor of each rank.
        links: between the ranks.
        rates: what kernels reach of the chip's rates.
        dims: sizes of the model, None for those that it is published with.

    Returns:
        For each of `STAGES` its seconds. Loading a checkpoint, features and writing files are not
        among them.

    Raises:
        ValueError: there is no such model.

    Source: docs/design/strategies-and-cost.md.
    """
    dims = dims or dims_of(workload.model)
    case, passes = Case(workload, setup, dims, chip, links, rates), workload.recycling_steps + 1
    parts = {
        "input_embedder": diffusion.input_embedder(case),
        "recycling": passes * trunk.recycling(case),
        "templates": passes * trunk.templates(case),
        "msa": passes * trunk.alignment(case, dims.msa_blocks),
        "pairformer": passes * trunk.pairformer(case, dims.pairformer_blocks),
        "distogram": _distogram(case),
        "conditioning": diffusion.conditioning(case),
        "sampling": workload.sampling_steps * diffusion.step(case),
        "confidence": _confidence(case),
    }
    blocks = ("msa", "pairformer", "templates", "confidence") if _records_blocks(case) else ()
    steps = ("sampling",) if setup.size == 1 and chip.asynchronous else ()
    return {
        name: case.seconds(part, recorded=name in (*blocks, *steps)) for name, part in parts.items()
    }


def assumptions(chip: Chip, links: Links, setup: Setup, rates: KernelRates = ASSUMED) -> list[str]:
    """List everything that the seconds are assumed to follow from, a line each.

    Args:
        chip: as of `stage_seconds`.
        links: as of `stage_seconds`.
        setup: as of `stage_seconds`.
        rates: as of `stage_seconds`.
    """
    link = links.far if setup.size > links.node else links.near
    return [
        f"{chip.name}: {chip.tflops:g} TFLOP/s in bfloat16, {chip.float32_tflops:g} in float32, "
        f"{chip.gexps:.4g} G exponentials/s, {chip.tbs:g} TB/s ({chip.source})",
        f"{links.name(setup.size)}: {link.gbs:g} GB/s a direction, {1e6 * link.latency:g} us",
        *rates.described(),
        f"seconds of the host: exchange {EXCHANGE:g}, group {GROUP:g}, transfer {TRANSFER:g}, "
        f"launch {LAUNCH:g}, operator of torch {PRODUCT:g} (foldcp/planner/rates.py), times "
        f"{chip.host:g}",
        f"{KERNEL_GAP:g} s between kernels: assumed",
        "one GPU replays its sampling steps, and blocks of small inputs",
        "not counted: loading the checkpoint, features, files; waits of ranks for one another",
    ]
