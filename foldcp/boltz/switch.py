"""Switches boltz.main over: its command, its inputs, trainer, writers, data modules and models."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from foldcp import allocator, progress, report
from foldcp import mesh as meshes
from foldcp.boltz import disk, download, lock, models, preflight, processing, session
from foldcp.boltz.boltz1_data import RootBoltz1DataModule
from foldcp.boltz.command import guarded
from foldcp.boltz.data import RootDataModule
from foldcp.boltz.options import check_numbers
from foldcp.boltz.place import Place
from foldcp.boltz.run import Run, current, set_current
from foldcp.boltz.seal import Seal
from foldcp.boltz.writers import RootAffinityWriter, RootWriter
from foldcp.config import Config
from foldcp.modules.step_graph import set_graphs
from foldcp.report import UserError
from foldcp_kernels.chunking import set_chunk_bytes


def patch(main: ModuleType) -> None:
    """Switch an executed `boltz.main` over; a second call does nothing.

    Args:
        main: the module. Outside of its `predict` command everything in it stays stock.
    """
    if getattr(main, "foldcp_switched", False):
        return
    main.foldcp_switched = True
    download.install(main)
    processing.install(main)
    main.Manifest = _RootManifest(main.Manifest)
    main.filter_inputs_structure = _decided_by_root(main.filter_inputs_structure)
    main.filter_inputs_affinity = _decided_by_root(main.filter_inputs_affinity, affinity=True)
    main.Trainer = models.trainer_class(main.Trainer)
    main.BoltzWriter, main.BoltzAffinityWriter = RootWriter, RootAffinityWriter
    main.Boltz2InferenceDataModule = RootDataModule
    main.BoltzInferenceDataModule = RootBoltz1DataModule
    main.Boltz2, main.Boltz1 = models.Loader(main.Boltz2), models.Loader(main.Boltz1)
    main.predict.callback = _predict(main.predict.callback)
    main.cli.main = guarded(main.cli.main)


def _predict(stock: Callable[..., None]) -> Callable[..., None]:
    """The command itself, between the checks at the start and the list of failures at the end."""

    @wraps(stock)
    def predict(**options: Any) -> None:
        start = time.perf_counter()
        try:
            run = begin(options)
            set_current(run)
            try:
                stock(**options)
            except OSError as error:
                raise _not_written(error, run.failed) from error
            run.session.at("the end")
            known = run.session.gather(run.failed if run.mesh.is_root else {})
            failed = {name: why for of_group in known for name, why in of_group.items()}
            if run.config.report:
                seconds = time.perf_counter() - start
                numbers = report.costs(run.mesh, seconds, run.session.gather)
                if run.session.is_root:
                    _write_report(numbers, run.config.report)
        finally:
            set_current(None)
            progress.listen(None)
            lock.release_all()
        if failed:
            listed = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
            raise UserError(
                f"{len(failed)} input(s) could not be folded: {listed}. Correct them and run the "
                "same command again; finished predictions are kept and skipped"
            )
        run.session.close()

    return predict


def _not_written(error: OSError, failed: dict[str, str]) -> Exception:
    """The error of a disk that is full or cannot be written, in words; any other one as it is."""
    said = disk.refused(error)
    if said is None:
        return error
    lost = f"; not folded: {', '.join(sorted(failed))}" if failed else ""
    return UserError(f"{said}{lost}; {report.KEPT}")


def _write_report(numbers: dict[str, Any], path: str) -> None:
    partial = Path(f"{path}.partial")
    try:
        partial.write_text(json.dumps(numbers))
        partial.replace(path)
    except OSError as error:  # the predictions are there all the same
        print(f"foldcp: FOLDCP_REPORT={path} is not written: {error.strerror}", file=sys.stderr)


def begin(options: dict[str, Any]) -> Run:
    """Check a prediction and bring its ranks together.

    Args:
        options: the arguments of Boltz's `predict`.

    Raises:
        ValueError: a FOLDCP_* variable is wrong, or the mesh does not fit the number of ranks.
        UserError: anything else that the user can put right.
    """
    place = Place.find(os.environ)
    ranks = session.start(place)
    config = Config.from_env(os.environ)
    ranks.patience = float(config.timeout)
    preflight.check_launch(config, place)
    check_numbers(options)
    size = meshes.group_size(place.world, config.dp, config.mesh)
    rows, cols = meshes.choose(size, config.mesh)
    ranks.group, ranks.groups = place.rank // size, config.dp
    device = preflight.choose_device(options, place)
    allocator.check_growth(device)
    set_chunk_bytes(config.chunk_mb and config.chunk_mb * 10**6)
    preflight.check_graphs(config, device, size)
    set_graphs(config.graphs)
    preflight.choose_kernels(options, config, device)
    preflight.check_same_everywhere(options, config, ranks)
    preflight.check_interfaces(os.environ, place.world)
    preflight.check_kept(config, ranks.is_root)
    preflight.agree_on_kernels(config, device, ranks)
    ranks.at("joining the ranks")
    mesh = ranks.form(rows, cols, device, config)
    progress.listen(ranks.at)
    seal = None
    if ranks.is_root:
        seal = preflight.claim_folder(options, ranks.fail).seal
    else:
        progress.show(False)
        # What Boltz prints would appear once per rank; errors still reach stderr.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    seal = Seal(*ranks.from_root((seal.path, seal.key) if seal else None))
    ranks.at("reading inputs")
    asked = {name: options.get(name) for name in ("seed", "write_embeddings")}
    run = Run(config, ranks, mesh, asked["seed"], bool(asked["write_embeddings"]))
    run.seal = seal
    run.output_format = options.get("output_format") or "mmcif"
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
        """The manifest at `path` on the root rank's disk."""
        run = current()
        if run is None:
            return self._stock.load(path)
        manifest = self._stock.load(path) if run.session.is_root else None
        manifest = run.session.from_root(manifest)
        run.with_affinity = any(record.affinity for record in manifest.records)
        return manifest


def _decided_by_root(stock: Callable[..., Any], affinity: bool = False) -> Callable[..., Any]:
    """What is still to be predicted, as the root rank sees it.

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
        return run.session.from_root(left)

    return filter_inputs
