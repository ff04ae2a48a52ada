"""Loading and running Boltz's models: on the mesh, the affinity model stock on the root rank."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import SingleDeviceStrategy

from foldcp.boltz.command.preflight import versions
from foldcp.boltz.families import loading, swap, weights
from foldcp.boltz.families.predict_step import PredictStep
from foldcp.boltz.lightning.data import RootData, random_state, set_random_state
from foldcp.boltz.lightning.input_hooks import InputHooks
from foldcp.boltz.lightning.writers import RootWriter
from foldcp.boltz.run import Run, current
from foldcp.config.precision import Precision
from foldcp.errors import UserError
from foldcp.output.trunk_keeper import TrunkKeeper
from foldcp.planner.choice import lean
from foldcp.runtime import report
from foldcp.runtime.files.names import Unsafe, regular
from foldcp.runtime.sharing import tokens
from foldcp_kernels.core.dispatch import described

_LIGHTNING_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed"}


def trainer_class(stock: type) -> type:
    """Make Lightning's Trainer for one device per rank, without data parallelism.

    Args:
        stock: `pytorch_lightning.Trainer`.

    Returns:
        A subclass that behaves like `stock` outside of a prediction.
    """

    class MeshTrainer(stock):
        def __init__(self, **options: Any) -> None:
            run = current()
            super().__init__(**(options if run is None else {**options, **_trainer(options, run)}))

        def predict(self, model: Any, *args: Any, **options: Any) -> Any:
            run = current()
            result = None
            if run is not None and not run.alone:
                _connect(model.predict_step, run, self.callbacks, options["datamodule"])
            if not isinstance(model, _Waiting):
                result = super().predict(model, *args, **options)
            if run is not None and run.alone:
                run.session.at("waiting for rank 0")
                run.session.wait_for_root()
            elif run is not None and run.session.groups > 1:
                run.session.at("waiting for the other groups")
                # The affinity pass reads what they have written.
                run.session.gather(None, None if run.watching is None else run.watching.wait)
            return result

    return MeshTrainer


def _connect(step: PredictStep, run: Run, callbacks: list[Any], data: RootData) -> None:
    """Have a run's model take its inputs from the data module and hand them to the writer."""
    (writer,) = [callback for callback in callbacks if isinstance(callback, RootWriter)]
    step.write_embeddings = run.write_embeddings
    step.begin = lambda batch: InputHooks(run, step, data, writer, batch)


def _trainer(options: dict[str, Any], run: Run) -> dict[str, Any]:
    device = run.mesh.device
    precision = options["precision"]
    if precision == "bf16-mixed":  # Boltz-2; Boltz-1 is float32 everywhere
        precision = _LIGHTNING_PRECISION[run.config.precision_on(device.type).pair]
    return {
        "strategy": SingleDeviceStrategy(device=device),
        "devices": [device.index] if device.type == "cuda" else 1,
        "precision": precision,
        # Lightning must not see torchrun's or Slurm's ranks: it would share out the inputs.
        "plugins": [LightningEnvironment()],
        "use_distributed_sampler": False,
        "logger": False,
        "enable_progress_bar": False,  # `foldcp.runtime.screen.watching` has one
        "enable_model_summary": run.config.verbose and run.session.is_root,
    }


class Loader:
    """One of Boltz's model classes; a loaded structure model is swapped in place."""

    def __init__(self, stock: type) -> None:
        self._stock = stock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._stock(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def load_from_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> Any:
        """Load a checkpoint and prepare the model for the run under way.

        Args:
            path: of the checkpoint.
            args: as Lightning's.
            options: as Lightning's.

        Returns:
            The model; on ranks that only wait for the root, a stand-in without weights.

        Raises:
            UserError: the checkpoint cannot be loaded.
        """
        run = current()
        if run is None:
            return self._stock.load_from_checkpoint(path, *args, **options)
        is_affinity = "affinity_mw_correction" in options
        run.alone = is_affinity
        if run.alone and not run.session.is_root:
            return _Waiting()
        run.at("loading the model")
        try:
            model = loading.load(self._stock, regular(path), *args, **options)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"the checkpoint {path} cannot be loaded ({reason[0]}): pass --checkpoint with one "
                f"of {self._stock.__name__}, or delete the file to have Boltz download it again"
            ) from error
        fingerprint = weights.check(model, path)
        if not run.alone:
            weights.check_same(fingerprint, path, run.session)
            run.alone = swap.family_of(model).affinity(model)
        swapped = "the affinity pass runs stock on rank 0" if run.alone else ""
        if not run.alone:
            swapped = _swap(model, run, fingerprint)
        run.precision = run.precision or _precision(model, run)
        if run.session.is_root and not run.announced:
            run.announced = True
            _announce(run, swapped)
        if run.alone and not run.session.is_root:
            return _Waiting()
        return model


def _announce(run: Run, swapped: str) -> None:
    """Say what runs where, now that the inputs are known."""
    sizes: list[int] = []
    with suppress(OSError, Unsafe, ValueError, KeyError):  # told when it is folded
        sizes = [tokens(run.structures / f"{name}.npz") for name in run.asked]
    launcher = run.session.place.launcher
    small = lean(run.mesh.layout(max(sizes, default=1)), run.mesh)
    groups, precision = run.session.groups, run.precision.described() if run.precision else ""
    lines = [report.start_line(run.mesh, precision, launcher, groups, sizes, small)]
    if run.config.verbose:
        lines.append(report.details(run.mesh, described(run.mesh.device), swapped))
    lines.append(report.hint(run.mesh, sizes))
    print("\n".join(line for line in lines if line), flush=True)


def _precision(model: Any, run: Run) -> Precision:
    return swap.family_of(model).precision(run.config.precision_on(run.mesh.device.type))


def _swap(model: Any, run: Run, fingerprint: str) -> str:
    """Put the mesh's modules into a loaded model; returns what was swapped."""
    model.eval()  # Boltz does so too, but after loading
    state = random_state()
    precision = _precision(model, run)
    swapped = swap.apply(model, run.mesh, precision=precision.pair)
    set_random_state(state)  # the draws that follow are those of stock
    if run.config.resume:
        parts = {"seed": run.seed, "weights": fingerprint, "precision": precision.described()}
        parts |= versions()
        run.keeper = TrunkKeeper(Path(run.config.resume).expanduser(), parts, run.mesh)
    affinity = "; the affinity pass runs stock on rank 0" if run.with_affinity else ""
    return swapped.summary() + affinity


class _Waiting:
    """Stands for a model that only the root rank runs."""

    def eval(self) -> _Waiting:
        """Do nothing."""
        return self
