"""Switch boltz.main over: its command, its inputs, trainer, writers, data modules and models."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from foldcp.boltz import reporting
from foldcp.boltz.command import early, preflight
from foldcp.boltz.command.guarded import guarded
from foldcp.boltz.command.options import check_numbers, results_folder
from foldcp.boltz.families.boltz1 import BOLTZ1
from foldcp.boltz.families.boltz2 import BOLTZ2
from foldcp.boltz.inputs import download, processing
from foldcp.boltz.lightning import trainer
from foldcp.boltz.lightning.writers import RootAffinityWriter, RootWriter
from foldcp.boltz.run import Run, current, set_current
from foldcp.boltz.seams import check as seams
from foldcp.config import Config
from foldcp.errors import UserError, on_disk
from foldcp.layout import mesh_shape
from foldcp.runtime import allocator, report, session
from foldcp.runtime.files import disk, lock
from foldcp.runtime.files.seal import Seal
from foldcp.runtime.place import Place
from foldcp.runtime.screen import summary
from foldcp.runtime.screen.quiet import one_voice, silent
from foldcp.runtime.screen.watching import Watching
from foldcp_kernels.core.chunking import set_chunk_bytes


def patch(main: ModuleType) -> None:
    """Switch an executed `boltz.main` over; a second call does nothing.

    Args:
        main: the module. Outside of its `predict` command everything in it stays stock.

    Raises:
        ImportError: a function of Boltz differs from those that foldcp knows.
    """
    if getattr(main, "foldcp_switched", False):
        return
    seams.require(main, ends_process=False)  # a program may have imported it before the hook came
    main.foldcp_switched = True
    download.install(main)
    processing.install(main)
    main.Manifest = _RootManifest(main.Manifest)
    main.filter_inputs_structure = _decided_by_root(main.filter_inputs_structure)
    main.filter_inputs_affinity = _decided_by_root(main.filter_inputs_affinity, affinity=True)
    main.Trainer = trainer.trainer_class(main.Trainer)
    main.BoltzWriter, main.BoltzAffinityWriter = RootWriter, RootAffinityWriter
    main.Boltz2InferenceDataModule = BOLTZ2.data_module
    main.BoltzInferenceDataModule = BOLTZ1.data_module
    main.Boltz2, main.Boltz1 = trainer.Loader(main.Boltz2), trainer.Loader(main.Boltz1)
    main.predict.callback = _predict(main.predict.callback)
    main.cli.main = guarded(main.cli.main)


def _predict(stock: Callable[..., None]) -> Callable[..., None]:
    """The command itself, and the list of failures at its end."""

    @wraps(stock)
    def predict(**options: Any) -> None:
        run = fold(stock, options)
        if run.failed:
            several = len(run.failed) > 1  # each on a line of its own
            before, after = ("\n  ", "\n") if several else (" ", ". ")
            listed = "".join(f"{before}{name} ({reason})" for name, reason in run.failed.items())
            raise UserError(
                f"{len(run.failed)} input(s) could not be folded:{listed}{after}Correct them and "
                "run the same command again; finished predictions are kept and skipped"
            )
        run.session.close()

    return predict


def fold(stock: Callable[..., None], options: dict[str, Any], apart: bool = False) -> Run:
    """Make a prediction on all ranks, which all call it, between the checks and the summary.

    Args:
        stock: the function of Boltz's `predict` command.
        options: its arguments.
        apart: read inputs in a process of their own, for programs that predict several times.

    Returns:
        What was done. `failed` is complete on every rank; the session is still to be closed.

    Raises:
        Exception: what ends a run; the session is open.
    """
    start = time.perf_counter()
    with ExitStack() as until_end:
        until_end.callback(_forget)
        run = begin(options, until_end)
        run.apart = apart
        set_current(run)
        try:
            stock(**options)
        except OSError as error:
            raise _not_written(error, run.failed) from error
        run.failed = _sum_up(run, results_folder(options), start)
    return run


def _forget() -> None:
    set_current(None)
    lock.release_all()


def _sum_up(run: Run, folder: Path, start: float) -> dict[str, str]:
    """Say what the run did; returns what failed and why. All ranks call it."""
    run.session.at("the end")
    groups = run.session.gather((run.failed, run.tokens) if run.mesh.is_root else ({}, {}))
    failed = {name: why for of_group, _ in groups for name, why in of_group.items()}
    seconds, stages = time.perf_counter() - start, run.watching.stages
    numbers = report.costs(run.mesh, seconds, run.session.gather, stages)
    if not run.session.is_root:
        return failed
    folded, scored = (
        [name for name in names if name not in failed] for names in (run.asked, run.scored)
    )
    skipped = len({*run.known} - {*run.asked, *run.scored})
    text = summary.lines(folder, folded, scored, skipped, len(failed), numbers)
    run.watching.conclude(text, failed)
    tokens = {name: n for _, of_group in groups for name, n in of_group.items()}
    reporting.write(run, folder, numbers, failed, tokens)
    return failed


def _not_written(error: OSError, failed: dict[str, str]) -> Exception:
    """The error of a disk that is full or cannot be written, in words; any other one as it is."""
    reason = disk.refused(error)
    if reason is None:
        return error
    lost = f"; not folded: {', '.join(sorted(failed))}" if failed else ""
    return UserError(f"{reason}{lost}; {on_disk()}")


def begin(options: dict[str, Any], until_end: ExitStack) -> Run:
    """Check a prediction and bring its ranks together.

    Args:
        options: the arguments of Boltz's `predict`.
        until_end: gets what holds as long as the run.

    Raises:
        ValueError: a FOLDCP_* variable is wrong, or the mesh does not fit the number of ranks.
        UserError: anything else that the user can put right.
    """
    place = Place.find(os.environ)
    ranks = session.start(place)
    config = Config.from_env(os.environ)
    ranks.patience = float(config.timeout)
    early.check_launch(config, place)
    check_numbers(options)
    size = mesh_shape.group_size(place.world, config.dp, config.mesh)
    rows, cols = mesh_shape.choose(size, config.mesh)
    ranks.group, ranks.groups = place.rank // size, config.dp
    device = preflight.choose_device(options, place)
    allocator.check_growth(device)
    set_chunk_bytes(config.chunk_mb and config.chunk_mb * 10**6)
    early.check_together(options, config, size)
    preflight.choose_kernels(options, config)
    preflight.check_same_everywhere(options, config, ranks)
    preflight.check_interfaces(os.environ, place.world)
    early.check_resume_and_report(config, ranks.is_root)
    preflight.agree_on_kernels(config, device, ranks)
    ranks.at("joining the ranks")
    mesh = ranks.form(rows, cols, device, config)
    seal, console = None, None
    if ranks.is_root:
        seal = preflight.claim_folder(options, ranks.fail).seal
        console = until_end.enter_context(one_voice(results_folder(options), config.verbose))
    else:
        until_end.enter_context(silent())
    seal = Seal(*ranks.from_root((seal.path, seal.key) if seal else None))
    asked = {name: options.get(name) for name in ("seed", "write_embeddings")}
    run = Run(config, ranks, mesh, asked["seed"], bool(asked["write_embeddings"]))
    run.seal = seal
    run.output_format = options.get("output_format") or "mmcif"
    run.structures = results_folder(options) / "processed" / "structures"
    run.watching = Watching(ranks, console)
    run.at("reading inputs")
    return run


class _RootManifest:
    """Boltz's `Manifest`, read from disk by the root rank only."""

    def __init__(self, stock: type) -> None:
        self._stock = stock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._stock(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def load(self, path: Path) -> Any:
        """Load the manifest at `path` on the root rank's disk."""
        run = current()
        if run is None:
            return self._stock.load(path)
        manifest = self._stock.load(path) if run.session.is_root else None
        manifest = run.session.from_root(manifest)
        run.with_affinity = any(record.affinity for record in manifest.records)
        run.known = tuple(record.id for record in manifest.records)
        return manifest


def _decided_by_root(stock: Callable[..., Any], affinity: bool = False) -> Callable[..., Any]:
    """Return the inputs still to be predicted, as the root rank sees them.

    Stock hands every input to the affinity pass, also those without an affinity request or whose
    structure could not be written. Its data module finds no structure for them and ends the run:
    only the others may go on.
    """

    @wraps(stock)
    def filter_inputs(**options: Any) -> Any:
        run = current()
        if run is None:
            return stock(**options)
        left = stock(**options) if run.session.is_root else None
        if left is not None and affinity:
            done = options["outdir"] / "predictions"
            asked = [r for r in left.records if r.affinity]
            ready = [r for r in asked if (done / r.id / f"pre_affinity_{r.id}.npz").exists()]
            left = type(left)(ready)
            run.scored = tuple(record.id for record in ready)
        elif left is not None:
            run.asked = tuple(record.id for record in left.records)
        return run.session.from_root(left)

    return filter_inputs
