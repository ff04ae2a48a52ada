"""One input of a run: where its features come from, who hears of it, and where its files go."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from foldcp.boltz.lightning.capacity import is_published, planned, shortage
from foldcp.boltz.lightning.data import Batch, Failed, RootData, random_state, set_random_state
from foldcp.boltz.run import Run
from foldcp.errors import InputLost
from foldcp.modules.hooks import Folded, Hooks, KeptTrunk, MatrixSink, Sizes
from foldcp.modules.settings import Features, Settings
from foldcp.runtime.recovery import together
from foldcp.runtime.screen.progress import Progress

if TYPE_CHECKING:
    from foldcp.boltz.families.predict_step import PredictStep
    from foldcp.boltz.lightning.writers import RootWriter


class InputHooks(Hooks):
    """The hooks of one input, see `foldcp.modules.model.FoldOnMesh.__call__` for their order.

    Args:
        run: the prediction under way.
        step: predicts the input.
        data: moves its features to a device.
        writer: writes its files.
        batch: what the loader gave.

    Attributes:
        name: of the input, as far as this rank knows it.
        tokens: N, 0 while it is not known.
    """

    def __init__(
        self, run: Run, step: PredictStep, data: RootData, writer: RootWriter, batch: Batch
    ) -> None:
        self._run, self._step, self._data, self._writer = run, step, data, writer
        self.name, self.tokens = _name(batch), 0
        self._progress: Progress | None = None

    def attempt(self, work: Callable[[], Any]) -> Any:
        """Do the work on all ranks, or drop the input on all, see `together`."""
        found = together(self._run, self, work)
        if found is None:
            self._writer.discard(self.name)
            return {"exception": True}
        return found

    def features(self, batch: Batch) -> Features:
        """Give every rank of a mesh the features and random state of its root, then move them."""
        run = self._run
        run.session.at(f"sharing the features of {self.name}")
        if run.watching is not None:
            run.watching.stages.begin("features")
        if isinstance(batch, dict):
            batch = self._fitting(batch)
        if run.shared:
            root = run.mesh.is_root
            sent = (batch, random_state()) if root else None
            batch, state = run.mesh.ranks.broadcast_object(sent)
            if not root:
                set_random_state(state)
        self.name = _name(batch)
        if isinstance(batch, Failed):
            raise InputLost(batch.reason)
        assert isinstance(batch, dict)
        feats = self._data.moved(batch, run.mesh.device)
        self.tokens = run.tokens[self.name] = feats["token_index"].shape[1]
        if run.watching is not None:
            settings, rates = self._step.settings(), self._step.fold.parts.confidence
            self._progress = run.watching.begin(
                self.name,
                self.tokens,
                passes=settings.recycling_steps + 1,
                steps=settings.sampling_steps,
                samples=settings.diffusion_samples,
                rated=settings.diffusion_samples if rates else 0,
            )
        return feats

    def _fitting(self, batch: dict[str, Any]) -> Batch:
        """Return the features, or why no rank could hold what they lead to."""
        found = planned(self._run, self._step, batch)
        if found is None:
            return batch
        if reason := shortage(self._run, self._step, found):
            return Failed(_name(batch), reason)
        if is_published(self._step, found):
            self._run.plans[_name(batch)] = found
        return batch

    def open_outputs(self, sizes: Sizes) -> MatrixSink | None:
        """See `RootWriter.open_outputs`."""
        return self._writer.open_outputs(self.name, sizes)

    def keep_trunk(self, feats: Features, settings: Settings) -> KeptTrunk | None:
        """See `Hooks.keep_trunk`. FOLDCP_RESUME asks for it."""
        keeper = self._run.keeper
        return None if keeper is None else keeper.begin(feats, settings)

    def at(self, stage: str, done: int, total: int) -> None:
        """See `Hooks.at`. The stage is shown, and other ranks know it."""
        if self._progress is not None:
            self._progress.update(stage, done, total)

    def hand_over(self, folded: Folded) -> dict[str, Any]:
        """Write the files on the root rank, while the others wait."""
        if self._progress is not None:
            self._progress.end()
        if self._run.watching is not None:
            self._run.watching.stages.begin("writing")
        self._run.session.at(f"writing of {self.name}")
        found = self._step.prediction(folded) if self._run.writes else None
        self._writer.hand_over(self.name, folded, found)
        return {"exception": False}


def _name(batch: Batch) -> str:
    """The name of an input, on other ranks than the root its number."""
    if isinstance(batch, int):
        return f"input {batch}"
    return batch.name if isinstance(batch, Failed) else batch["record"][0].id
