"""Plan a prediction on a cluster: the fastest mesh, strategies and memory mode that fit.

**Modelled, not measured**: bytes by `stage_memory`, seconds by `stage_time`.

Source: docs/design/strategies-and-cost.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from foldcp.errors import UserError
from foldcp.layout.mesh_shape import choose
from foldcp.layout.strategies import ATTENTION, MULTIPLICATION, Sizes
from foldcp.layout.tiles import PairLayout
from foldcp.planner.choice import cheapest
from foldcp.planner.dims import dims_of
from foldcp.planner.gpus import GPUS, Cluster
from foldcp.planner.stage_memory import stage_bytes, weights_bytes
from foldcp.planner.stage_time import ASSUMED, KernelRates, assumptions, stage_seconds
from foldcp.planner.workload import Setup, Workload

# Bytes, assumed: the CUDA context, buffers of NCCL, and what an allocator cannot use.
BESIDE = 2_000_000_000
ALIGNED = 16  # tokens, as `foldcp.fabric.mesh.Mesh` aligns tiles on GPUs
MODES = ("fast", "lean")
_EVERY = 16  # ranks up to which every number of them is looked at, beyond it halves of all
_SEARCHED = 64  # GPUs up to which more of them are tried, as advice
_NARROW = 8  # ranks up to which a mesh may be of any shape
_SQUARE = 4  # columns over rows of larger meshes, at most; beyond _EVERY ranks, 2


@dataclass(frozen=True)
class Plan:
    """A way for a cluster to fold an input, or the setup that comes nearest to fitting.

    Args:
        workload: the input.
        cluster: the GPUs.
        setup: mesh, strategies and memory mode.
        stages: bytes of each stage on the worst rank, weights apart.
        weights: bytes of the model's weights on each rank.
        beside: bytes beside tensors, assumed.
        seconds: of each stage; empty where it does not fit or no times were asked for.
        assumptions: what the seconds follow from, a line each.
        hidden: fraction of the transfers' seconds that kernels hide; None without either.
    """

    workload: Workload
    cluster: Cluster
    setup: Setup
    stages: Mapping[str, int]
    weights: int
    beside: int
    seconds: Mapping[str, float]
    assumptions: tuple[str, ...]
    hidden: float | None = None

    @property
    def needed(self) -> int:
        """Return the bytes that a GPU must have."""
        return max(self.stages.values()) + self.weights + self.beside

    @property
    def fits(self) -> bool:
        """Tell whether the worst rank fits its GPU."""
        return self.needed <= self.cluster.memory

    @property
    def total_s(self) -> float:
        """Return the seconds of all stages."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Remedy:
    """A change with which an input fits.

    Args:
        change: what to do, in words.
        plan: that it leads to.
    """

    change: str
    plan: Plan


def shapes(count: int, tokens: int) -> list[tuple[int, int]]:
    """List the meshes of up to so many ranks that are worth a look, R <= Q.

    QxR takes as long as RxQ: every op has a direction along the rows and one along the columns.

    Args:
        count: GPUs.
        tokens: N; no rank is without tokens.
    """
    sizes = {n for n in range(1, min(count, _EVERY) + 1)}
    halved = count
    while halved > _EVERY:
        sizes.add(halved)
        halved //= 2
    found = [
        (r, n // r)
        for n in sorted(sizes)
        for r in range(1, int(n**0.5) + 1)
        if n % r == 0
        and (n <= _NARROW or n // r <= (_SQUARE if n <= _EVERY else 2) * r)
        and n * ALIGNED <= tokens + ALIGNED
    ]
    return found or [(1, 1)]


def setup_of(
    workload: Workload, shape: tuple[int, int], memory: str, route: str = "direct"
) -> Setup:
    """Return the setup that a run takes on GPUs, with the strategies that `auto` chooses.

    Args:
        workload: the input.
        shape: of the mesh.
        memory: "fast" or "lean".
        route: of panels (FOLDCP_ROUTE).
    """
    dims = dims_of(workload.model)
    setup = Setup(*shape, memory=memory, itemsize=dims.itemsize)
    if setup.size == 1:
        return setup
    padded = PairLayout(workload.tokens, *shape, 0, ALIGNED).padded
    sizes = Sizes(
        setup.z_itemsize,
        setup.itemsize,
        dims.token_z,
        dims.pair_heads,
        setup.wire,
        memory == "lean",
    )
    found = [
        cheapest(op, padded, shape, route, sizes, False, setup.chunk_bytes)
        for op in (MULTIPLICATION, ATTENTION)
    ]
    return replace(setup, multiplication=found[0], attention=found[1])


def of_setup(
    workload: Workload,
    cluster: Cluster,
    setup: Setup,
    timed: bool = True,
    rates: KernelRates = ASSUMED,
) -> Plan:
    """Count what a given setup takes.

    Args:
        workload: the input.
        cluster: the GPUs.
        setup: the mesh and its choices.
        timed: model the seconds as well, where it fits.
        rates: what kernels reach.
    """
    chip, links = cluster.gpu.chip, cluster.links
    stages, weights = stage_bytes(workload, setup), weights_bytes(workload.model)
    told = tuple(assumptions(chip, links, setup, rates))
    found = Plan(workload, cluster, setup, stages, weights, BESIDE, {}, told)
    if not (timed and found.fits):
        return found
    seconds = stage_seconds(workload, setup, chip, links, rates)
    moving, bare = (
        sum(getattr(x, a) for x in seconds.values()) for a in ("transfer_s", "exposed_s")
    )
    hidden = 1 - bare / moving if moving else None
    return replace(found, seconds={n: x.total_s for n, x in seconds.items()}, hidden=hidden)


def plan(
    workload: Workload,
    cluster: Cluster,
    memory: str = "auto",
    mesh: str = "auto",
    rates: KernelRates = ASSUMED,
) -> Plan:
    """Plan a prediction: the fastest of all meshes and memory modes that fit.

    Args:
        workload: the input.
        cluster: the GPUs.
        memory: "auto", "fast" or "lean".
        mesh: "auto" or RxQ.
        rates: what kernels reach.

    Returns:
        The plan; where nothing fits, that of the setup which needs the least memory.

    Raises:
        UserError: the sizes are impossible, or the mesh is larger than the cluster.
    """
    check(workload)
    found = [
        of_setup(workload, cluster, setup_of(workload, shape, mode), rates=rates)
        for shape in meshes(workload, cluster, mesh)
        for mode in (MODES if memory == "auto" else (memory,))
    ]
    if fitting := [one for one in found if one.fits]:
        return min(fitting, key=lambda one: one.total_s)
    return min(found, key=lambda one: one.needed)


def meshes(workload: Workload, cluster: Cluster, mesh: str) -> list[tuple[int, int]]:
    """List the meshes that a plan may take.

    Args:
        workload: the input.
        cluster: the GPUs.
        mesh: "auto" or RxQ.

    Raises:
        UserError: the mesh is malformed or larger than the cluster.
    """
    if mesh == "auto":
        return shapes(cluster.count, workload.tokens)
    rows, _, cols = mesh.lower().partition("x")
    if not (rows.isdecimal() and cols.isdecimal() and int(rows) and int(cols)):
        raise UserError(f"--mesh must be auto or ROWSxCOLUMNS, for example 2x4, got {mesh!r}")
    if int(rows) * int(cols) > cluster.count:
        raise UserError(
            f"--mesh {mesh} needs {int(rows) * int(cols)} GPUs and there are {cluster.count}: use "
            "a smaller mesh, or --gpus with more"
        )
    return [(int(rows), int(cols))]


def check(workload: Workload) -> None:
    """Refuse impossible sizes.

    Args:
        workload: the input.

    Raises:
        UserError: names the size.
    """
    ones = ("tokens", "atoms", "sequences", "samples", "sampling_steps")
    for name in (*ones, "recycling_steps"):
        value, smallest = getattr(workload, name), int(name in ones)
        if value < smallest:
            raise UserError(f"{name} must be at least {smallest}, got {value}")


def fitting(workload: Workload, cluster: Cluster, memory: str = "auto") -> Plan | None:
    """Return a plan without times on all the GPUs if one fits, else None.

    Args:
        workload: the input.
        cluster: the GPUs.
        memory: "auto", which asks for lean memory, "fast" or "lean".
    """
    mode = "lean" if memory == "auto" else memory
    found = of_setup(workload, cluster, setup_of(workload, choose(cluster.count), mode), False)
    return found if found.fits else None


def remedies(found: Plan, memory: str = "auto") -> list[Remedy]:
    """List what would make an input fit, each found by planning it.

    Args:
        found: a plan that does not fit.
        memory: that it was made with.
    """
    workload, cluster = found.workload, found.cluster
    listed = list(_smaller(workload, cluster, memory))
    count = cluster.count
    while (count := count * 2) <= _SEARCHED:
        node = max(cluster.node, min(count, 8))
        more = fitting(workload, replace(cluster, count=count, node=node))
        if more is not None:
            listed.append(Remedy(f"{count} of these GPUs ({count}x{cluster.gpu.label})", more))
            break
    for gpu in sorted(GPUS, key=lambda gpu: gpu.gigabytes):
        if gpu.gigabytes * 10**9 > cluster.memory:
            larger = replace(cluster, gpu=gpu, memory=gpu.gigabytes * 10**9)
            bigger = fitting(workload, larger)
            if bigger is not None:
                listed.append(Remedy(f"larger GPUs: {cluster.count}x{gpu.label}", bigger))
                break
    return listed


def _smaller(workload: Workload, cluster: Cluster, memory: str) -> Iterator[Remedy]:
    if memory == "fast":
        leaner = fitting(workload, cluster, "lean")
        if leaner is not None:
            yield Remedy("FOLDCP_MEMORY=lean", leaner)
    for change, asked in (
        ("--max_parallel_samples 1", replace(workload, parallel_samples=1)),
        ("--diffusion_samples 1", replace(workload, samples=1)),
    ):
        if workload.together > 1:
            one = fitting(asked, cluster, memory)
            if one is not None:
                yield Remedy(change, one)
                return
