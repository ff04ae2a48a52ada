"""Switches boltz.main over: its command, its inputs, trainer, writers, data modules and models."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from foldcp import mesh as meshes
from foldcp import report
from foldcp.boltz import models, preflight, session
from foldcp.boltz.command import guarded
from foldcp.boltz.data import RootDataModule
from foldcp.boltz.launch import Place
from foldcp.boltz.run import Run, current, set_current
from foldcp.boltz.writers import RootAffinityWriter, RootWriter
from foldcp.config import Config
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
    main.download_boltz1 = _download(main.download_boltz1)
    main.download_boltz2 = _download(main.download_boltz2)
    main.process_input = _keep_reason(main.process_input)
    main.process_inputs = _process_inputs(main.process_inputs)
    main.Manifest = _RootManifest(main.Manifest)
    main.filter_inputs_structure = _decided_by_root(main.filter_inputs_structure)
    main.filter_inputs_affinity = _decided_by_root(main.filter_inputs_affinity, affinity=True)
    main.Trainer = models.trainer_class(main.Trainer)
    main.BoltzWriter, main.BoltzAffinityWriter = RootWriter, RootAffinityWriter
    main.Boltz2InferenceDataModule = RootDataModule
    main.Boltz2, main.Boltz1 = models.Loader(main.Boltz2), models.Loader(main.Boltz1)
    main.predict.callback = _predict(main.predict.callback)
    main.cli.main = guarded(main.cli.main)


def _predict(stock: Callable[..., None]) -> Callable[..., None]:
    """The command itself, between the checks at the start and the list of failures at the end."""

    @wraps(stock)
    def predict(**options: Any) -> None:
        start = time.perf_counter()
        run = begin(options)
        set_current(run)
        try:
            stock(**options)
            failed = run.mesh.broadcast_object(run.failed)
            if run.config.report:
                numbers = report.costs(run.mesh, time.perf_counter() - start)
                if run.mesh.is_root:
                    Path(run.config.report).write_text(json.dumps(numbers))
        finally:
            set_current(None)
        if failed:
            listed = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
            raise UserError(
                f"{len(failed)} input(s) could not be folded: {listed}. Correct them and run the "
                "same command again; finished predictions are kept and skipped"
            )
        run.session.close()

    return predict


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
    preflight.check_launch(config, place)
    rows, cols = meshes.choose(place.world, config.mesh)
    device = preflight.choose_device(options, place)
    set_chunk_bytes(config.chunk_mb and config.chunk_mb * 10**6)
    preflight.choose_kernels(options, config, device)
    preflight.check_same_everywhere(options, config, ranks.form(rows, cols, device, config))
    mesh = ranks.connect(config)
    if mesh.is_root:
        preflight.check_writable(options)
    else:
        # What Boltz prints would appear once per rank; errors still reach stderr.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    ranks.wait_for_root()
    return Run(config, ranks, mesh, write_embeddings=bool(options.get("write_embeddings")))


def _download(stock: Callable[[Path], None]) -> Callable[[Path], None]:
    """Download on the root rank only, and leave nothing half-downloaded behind."""
    stock = getattr(stock, "__wrapped__", stock)  # past Lightning's rank_zero_only

    @wraps(stock)
    def download(cache: Path) -> None:
        run = current()
        if run is None or run.mesh.is_root:
            before = set(cache.iterdir())
            try:
                stock(cache)
            except Exception as error:
                for path in set(cache.iterdir()) - before:
                    if path.is_file():
                        path.unlink()
                raise UserError(
                    f"Boltz's weights and molecules are not complete in {cache} and downloading "
                    f"them failed ({error}): connect to the network, copy the files there, or "
                    "name the folder that has them with --cache or BOLTZ_CACHE"
                ) from error
        if run is not None:
            run.session.wait_for_root()

    return download


def _process_inputs(stock: Callable[..., None]) -> Callable[..., None]:
    """Read the inputs on the root rank and note those that could not be read."""
    stock = getattr(stock, "__wrapped__", stock)

    @wraps(stock)
    def process_inputs(data: list[Path], out_dir: Path, **options: Any) -> None:
        run = current()
        if run is None:
            stock(data=data, out_dir=out_dir, **options)
            return
        if run.mesh.is_root:
            with tempfile.TemporaryDirectory(prefix="foldcp_") as folder:
                run.reasons = Path(folder)
                stock(data=data, out_dir=out_dir, **options)
                for path in data:
                    if not (out_dir / "processed" / "records" / f"{path.stem}.json").exists():
                        reason = run.reasons / path.name
                        known = reason.read_text() if reason.exists() else "see above"
                        run.failed[path.name] = known
                run.reasons = None
        run.session.wait_for_root()

    return process_inputs


class _Tee:
    """Standard output that also remembers its last line about a failure."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.failure = ""

    def write(self, text: str) -> int:
        if text.startswith("Failed to process"):
            self.failure = text.partition("Error:")[2].strip()
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _keep_reason(stock: Callable[..., None]) -> Callable[..., None]:
    """Read one input and keep the reason if that fails; stock prints it and goes on."""

    @wraps(stock)
    def process_input(path: Path, *args: Any, **options: Any) -> None:
        run = current()
        if run is None or run.reasons is None:
            stock(path, *args, **options)
            return
        sys.stdout = tee = _Tee(sys.stdout)
        try:
            stock(path, *args, **options)
        finally:
            sys.stdout = tee.stream
        if tee.failure:  # through a file, because this may be a process of Boltz's pool
            (run.reasons / path.name).write_text(" ".join(tee.failure.split()).rstrip(".")[:300])

    return process_input


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
        manifest = self._stock.load(path) if run.mesh.is_root else None
        manifest = run.mesh.broadcast_object(manifest)
        run.with_affinity = any(record.affinity for record in manifest.records)
        return manifest


def _decided_by_root(stock: Callable[..., Any], affinity: bool = False) -> Callable[..., Any]:
    """What is still to be predicted, as the root rank sees it.

    Stock hands every input to the affinity pass, also those without an affinity request, for which
    its data module finds no structure: with several inputs only those that ask for it may go on.
    """

    @wraps(stock)
    def filter_inputs(**options: Any) -> Any:
        run = current()
        if run is None:
            return stock(**options)
        left = stock(**options) if run.mesh.is_root else None
        if left is not None and affinity:
            left = type(left)([r for r in left.records if r.affinity])
        return run.mesh.broadcast_object(left)

    return filter_inputs
