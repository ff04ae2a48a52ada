"""Loading and running Boltz's models: Boltz-2 on the mesh, the others stock on the root rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import SingleDeviceStrategy

from foldcp.boltz import swap
from foldcp.boltz.data import FAILED, random_state, set_random_state
from foldcp.boltz.run import Run, current
from foldcp.report import UserError, start_line
from foldcp_kernels.dispatch import described

_LIGHTNING_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed"}


def trainer_class(stock: type) -> type:
    """Lightning's Trainer for one device per rank and no data parallelism.

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
            if not isinstance(model, _Waiting):
                result = super().predict(model, *args, **options)
            if run is not None and run.alone:
                run.session.wait_for_root()
            return result

    return MeshTrainer


def _trainer(options: dict[str, Any], run: Run) -> dict[str, Any]:
    device = run.mesh.device
    precision = options["precision"]
    if precision == "bf16-mixed":  # Boltz-2; Boltz-1 is float32 everywhere
        precision = _LIGHTNING_PRECISION[run.config.precision_on(device.type)]
    return {
        "strategy": SingleDeviceStrategy(device=device),
        "devices": [device.index] if device.type == "cuda" else 1,
        "precision": precision,
        # Lightning must not see torchrun's or Slurm's ranks: it would share out the inputs.
        "plugins": [LightningEnvironment()],
        "use_distributed_sampler": False,
        "logger": False,
        "enable_progress_bar": run.mesh.is_root,
        "enable_model_summary": run.mesh.is_root,
    }


class Loader:
    """One of Boltz's model classes; a loaded Boltz-2 structure model is swapped in place."""

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
            args, options: as Lightning's.

        Returns:
            The model; on ranks that only wait for the root, a stand-in without weights.

        Raises:
            UserError: the checkpoint cannot be loaded.
        """
        run = current()
        if run is None:
            return self._stock.load_from_checkpoint(path, *args, **options)
        is_affinity = "affinity_mw_correction" in options
        run.alone = self._stock.__name__ != "Boltz2" or is_affinity
        if run.alone and not run.mesh.is_root:
            return _Waiting()
        try:
            model = self._stock.load_from_checkpoint(path, *args, **options)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"the checkpoint {path} cannot be loaded ({reason[0]}): pass --checkpoint with one "
                f"of {self._stock.__name__}, or delete the file to have Boltz download it again"
            ) from error
        if not run.alone and model.affinity_prediction:
            run.alone = True
        swapped = self._name(is_affinity) + " runs stock on rank 0" if run.alone else ""
        if not run.alone:
            swapped = _swap(model, run)
        if run.mesh.is_root and not run.announced:
            run.announced = True
            precision = "fp32"
            if self._stock.__name__ == "Boltz2":
                precision = run.config.precision_on(run.mesh.device.type)
            print(start_line(run.mesh, precision, swapped, described(run.mesh.device)), flush=True)
        if run.alone and not run.mesh.is_root:
            return _Waiting()
        return model

    def _name(self, is_affinity: bool) -> str:
        return "the affinity pass" if is_affinity else f"{self._stock.__name__}"


def _swap(model: Any, run: Run) -> str:
    """Put the mesh's modules into a loaded Boltz-2; returns what was swapped."""
    model.eval()  # Boltz does so too, but after loading
    state = random_state()
    precision = run.config.precision_on(run.mesh.device.type)
    report = swap.apply(model, run.mesh, precision=precision)
    set_random_state(state)  # the draws that follow are those of stock
    model.foldcp_write_embeddings = run.write_embeddings
    swapped_step = model.predict_step

    def predict_step(batch: dict[str, Any], *args: Any, **options: Any) -> dict[str, Any]:
        if FAILED in batch:
            return {"exception": True}
        return swapped_step(batch, *args, **options)

    model.predict_step = predict_step
    affinity = "; the affinity pass runs stock on rank 0" if run.with_affinity else ""
    return report.summary() + affinity


class _Waiting:
    """Stands for a model that only the root rank runs."""

    def eval(self) -> _Waiting:
        """Nothing to do."""
        return self
