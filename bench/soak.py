"""Does a long run grow? `python -m bench.soak --count 200 --mesh 2x2`.

Folds many small inputs with one `boltz predict` on CPU ranks and looks at every rank after each:
memory, file handles, threads, shared-memory maps, keys of the store that joins the ranks, Python
objects. Exits with 1 when one of them grows after the warm-up.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SIZES = (7, 9, 12, 14)  # residues; every size comes in the warm-up
WARM_UP = 0.3  # of the predictions, at least one of each size
BLOCKS = 2  # of the trunk, so that a prediction is short
EXACT = ("handles", "threads", "maps", "keys")
# Most that may remain of one prediction: the allocator's own scatter, a new size in a cache.
SLACK = {"rss_bytes": 100e3, "objects": 20.0}
SCATTER = {"rss_bytes": 6e6, "objects": 500.0}  # between two samples of a run that does not grow
PLANTS = ("memory", "handle", "thread", "map", "key", "object")
OPTIONS = "--accelerator cpu --num_workers 0 --sampling_steps 2 --recycling_steps 0 --seed 1"
Samples = list[dict[str, float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak and print what it found.

    Returns:
        0 when nothing grows, 1 when something does, 2 when the run failed.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="predictions (200)")
    parser.add_argument("--mesh", default="2x2", help="rows x columns (2x2)")
    parser.add_argument("--transport", default="auto", help="FOLDCP_TRANSPORT (auto)")
    parser.add_argument("--plant", nargs="*", default=[], choices=PLANTS, help="leak on purpose")
    parser.add_argument("--json", type=Path, help="write all samples here")
    options = parser.parse_args(argv)
    begun = time.perf_counter()
    # Before torch is imported: threads of the parent would be missing in the forked ranks.
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        codes = _run(Path(folder), options)
        found = [Path(folder, f"rank_{r}.json") for r in range(len(codes))]
        samples = [json.loads(path.read_text()) if path.exists() else [] for path in found]
        logs = [Path(folder, f"log_{r}").read_text(errors="replace") for r in range(len(codes))]
    if any(codes) or any(len(of_rank) != options.count for of_rank in samples):
        print(f"the run failed: exit codes {codes}, samples {[len(x) for x in samples]}")
        print(*(f"[rank {rank}]\n{log[-4000:]}" for rank, log in enumerate(logs)), sep="\n")
        return 2
    if options.json:
        options.json.write_text(json.dumps(samples))
    seconds = time.perf_counter() - begun
    print(f"{options.count} predictions on {options.mesh}, {seconds:.0f} s")
    grown = []
    for rank, of_rank in enumerate(samples):
        for name, (first, last, allowed) in growth(of_rank).items():
            grew = last - first > allowed
            print(f"rank {rank}  {name:10}  {first:14,.0f} -> {last:14,.0f}"
                  f"  allowed +{allowed:,.0f}{'  GROWS' if grew else ''}")  # fmt: skip
            grown += [f"{name} on rank {rank}"] * grew
    print("nothing grows" if not grown else f"grows: {', '.join(grown)}")
    return 1 if grown else 0


def growth(samples: Samples) -> dict[str, tuple[float, float, float]]:
    """Compare the samples after the warm-up with those at the end.

    Args:
        samples: of one rank, in order.

    Returns:
        By name: what there was after the warm-up, at the end, and by how much it may have grown.
        Of what is counted the least of each window is taken: what the writer's threads have open
        for a moment does not matter. Of the rest it is the median.
    """
    start = max(int(WARM_UP * len(samples)), len(SIZES) + 1)
    window = max(2, (len(samples) - start) // 3)
    first, last = samples[start : start + window], samples[-window:]
    apart = len(samples) - start - window
    found = {}
    for name in samples[0]:
        before, after = ([x[name] for x in part] for part in (first, last))
        if name in EXACT:
            found[name] = (min(before), min(after), 0.0)
        else:
            allowed = SCATTER[name] + SLACK[name] * apart
            found[name] = (float(np.median(before)), float(np.median(after)), allowed)
    return found


def _run(folder: Path, options: argparse.Namespace) -> list[int]:
    """Fold on forked ranks: Boltz is imported once; returns their exit codes."""
    import boltz.main  # noqa: F401

    from bench.synthetic import make_cache

    make_cache(folder / "cache", "tiny")
    (folder / "many").mkdir()
    letters = "MKTAYIAKQRQISFVK"
    for i in range(options.count):
        # One sequence a size: other residues would be another number of atoms, and so new plans.
        sequence = letters[: SIZES[i % len(SIZES)]]
        text = f"version: 1\nsequences:\n- protein: {{id: A, sequence: {sequence}, msa: empty}}\n"
        (folder / "many" / f"{i:04d}.yaml").write_text(text)
    rows, cols = (int(side) for side in options.mesh.split("x"))
    children = []
    sys.stdout.flush()
    for rank in range(rows * cols):
        pid = os.fork()
        if pid == 0:
            _rank(folder, options, rank, rows * cols)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def _rank(folder: Path, options: argparse.Namespace, rank: int, world: int) -> None:
    code = 1
    try:
        with Path(folder, f"log_{rank}").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ |= {"FOLDCP": "1", "FOLDCP_MESH": options.mesh}
        os.environ |= {"FOLDCP_TRANSPORT": options.transport, "FOLDCP_PRECISION": "fp32"}
        if world > 1:
            place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1")
            os.environ |= {name: str(value) for name, value in place.items()}
            os.environ["MASTER_PORT"] = str(20000 + os.getppid() % 20000)
        _fold(folder, partial(_plant, options.plant), rank)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _fold(folder: Path, after_each: Callable[[], None], rank: int) -> None:
    import boltz.main as main
    from pytorch_lightning.strategies import Strategy

    from foldcp.boltz import switch

    main.PairformerArgsV2 = partial(main.PairformerArgsV2, num_blocks=BLOCKS)
    load, step = main.Boltz2.load_from_checkpoint, Strategy.predict_step
    # The checkpoint has the blocks of the trunk that are left out.
    main.Boltz2.load_from_checkpoint = lambda *a, **o: load(*a, **{**o, "strict": False})
    samples: Samples = []

    def predict_step(*args: Any, **more: Any) -> Any:
        if not samples:
            gc.collect()
            gc.freeze()  # half a million objects of modules, which need not be looked at again
        samples.append(sample())
        (folder / f"rank_{rank}.json").write_text(json.dumps(samples))
        after_each()
        return step(*args, **more)

    Strategy.predict_step = predict_step
    switch.patch(main)
    # By name: the file system's order may bring a size, and its plans, first after the warm-up.
    listed = main.Manifest.load
    main.Manifest.load = lambda path: main.Manifest(
        sorted(listed(path).records, key=lambda record: record.id)
    )
    places = ["--cache", str(folder / "cache"), "--out_dir", str(folder / "out")]
    sys.argv = ["boltz", "predict", str(folder / "many"), *OPTIONS.split(), *places]
    main.cli.main()


def sample() -> dict[str, float]:
    """What this process holds, after what is free was given back."""
    from foldcp.boltz.run import current

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    run = current()
    store = None if run is None else getattr(run.session, "store", None)
    maps = Path("/proc/self/maps").read_text()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "objects": len(gc.get_objects()),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "maps": maps.count("memfd:") + maps.count("/dev/shm/"),
        "keys": store.num_keys() if store is not None else 0,
    }


_planted: list[Any] = []


def _plant(plants: Sequence[str]) -> None:
    """Leak what the name says."""
    from foldcp.boltz.run import current

    for plant in plants:
        if plant == "memory":
            _planted.append(np.ones(500_000))
        elif plant == "handle":
            _planted.append(os.open(os.devnull, os.O_RDONLY))
        elif plant == "thread":
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        elif plant == "map":
            import mmap

            handle = os.memfd_create("leak")
            os.ftruncate(handle, 4096)
            _planted.append(mmap.mmap(handle, 4096))
        elif plant == "key":
            current().session.store.set(f"leak/{os.getpid()}/{len(_planted)}", "")
            _planted.append(None)
        elif plant == "object":
            _planted.extend([] for _ in range(200))


if __name__ == "__main__":
    sys.exit(main())
