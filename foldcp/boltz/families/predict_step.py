"""Predict one input with a swapped model: what takes the place of Boltz's `predict_step`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from foldcp.boltz.families.family import ModelFamily
from foldcp.modules.hooks import Folded, Hooks
from foldcp.modules.model import FoldOnMesh
from foldcp.modules.random_draws import replay
from foldcp.modules.settings import Features, Settings


class PredictStep:
    """A model's `predict_step` on the mesh: features in, stock's prediction dict on the root rank.

    Args:
        family: of the model.
        fold: predicts with the swapped model.

    Attributes:
        write_embeddings: hand out the pair representation, too.
        begin: makes the hooks of an input from its batch, as a run sets it; None: the prediction
            goes back to the caller.
    """

    def __init__(self, family: ModelFamily, fold: FoldOnMesh) -> None:
        self.family, self.fold = family, fold
        self.write_embeddings = False
        self.begin: Callable[[Any], Hooks] | None = None

    def __call__(self, batch: Any, batch_idx: int = 0, *_: Any) -> dict[str, Any]:
        """Predict one input; all ranks of the mesh call it.

        Args:
            batch: compact features, collated. In a run what the loader of this rank gave.
            batch_idx: unused, as in stock.

        Returns:
            Stock's prediction dict on the root rank, {"exception": False} elsewhere and in a run,
            which has written it; {"exception": True} where the run dropped the input.
        """
        hooks = _HandsBack(self) if self.begin is None else self.begin(batch)
        return hooks.attempt(lambda: self.fold(batch, self.settings(), hooks))

    @property
    def __wrapped__(self) -> Callable[..., dict[str, Any]]:
        """Give Lightning the method, whose code and parameters it looks at."""
        return self.__call__

    def settings(self) -> Settings:
        """Return the settings that `boltz predict` gave the model."""
        args = self.fold.model.predict_args
        return Settings(
            recycling_steps=args["recycling_steps"],
            sampling_steps=args["sampling_steps"],
            diffusion_samples=args["diffusion_samples"],
            max_parallel_samples=args.get("max_parallel_samples"),
            keep_z=self.write_embeddings,
            errors=self.family.errors(args),
        )

    def prediction(self, folded: Folded) -> dict[str, Any]:
        """Return stock's prediction dict; pae, pde and z are in it unless a sink took them."""
        return self.family.prediction(self.fold.model, folded)

    def replay(self, feats: Features) -> None:
        """Draw the random numbers that a prediction draws, and compute nothing."""
        replay(self.fold, feats, self.settings())


class _HandsBack(Hooks):
    """Gives the caller of the step its prediction."""

    def __init__(self, step: PredictStep) -> None:
        self._step = step

    def hand_over(self, folded: Folded) -> dict[str, Any]:
        """See `Hooks.hand_over`."""
        root = self._step.fold.mesh.is_root
        return self._step.prediction(folded) if root else {"exception": False}
