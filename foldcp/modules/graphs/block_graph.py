"""Blocks of stacks recorded once as a CUDA graph, and replayed with the weights of each.

Where a block is small the host launches its kernels more slowly than the GPU runs them. Blocks of
one kind differ in their weights alone: one of them is recorded, on tensors that stand in for the
weights, and before each replay those of the block are copied there. So a recording costs as much
as launching one block, takes the memory of one block, and serves every block of every pass but the
first few: 64 graphs, one per block, would cost a whole pass with an idle GPU, and save the host's
time in the three that are left.

Random numbers are drawn outside, by the same calls as without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foldcp.fabric.memory import free_bytes
from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout
from foldcp.modules.base import Block
from foldcp.modules.graphs import step_graph
from foldcp.modules.graphs.step_graph import Recorder, goes_without
from foldcp.modules.graphs.weight_slots import WeightSlots, signature

State = tuple[Tensor, ...]
Fixed = tuple[Tensor | None, ...]

# Operations of the largest block that is recorded: those of a pairformer block at 1,024 tokens. An
# H100 takes 7 ms for them at 400 TFLOP/s; launching one takes a host 2 to 6 ms (63 to 105 kernels
# of 18 to 56 us, counted on a CPU). Larger blocks keep the GPU busy without.
MOST_OPERATIONS = 2.9e12
# What a block takes besides its state, in parts of it (test_block_graph.py measures it).
TRANSIENT = 3
_WHAT = "blocks of the trunk and of the confidence module"


@contextmanager
def recorded(mesh: Mesh) -> Iterator[None]:
    """Record the blocks of stacks inside, on one GPU; at the end all of it is given back.

    Args:
        mesh: the mesh.

    Raises:
        ValueError: FOLDCP_GRAPHS=1, but nothing can be recorded.
    """
    recorder = step_graph.recorder(mesh)
    if recorder is None:
        yield
        return
    before, mesh.recordings = mesh.recordings, Recordings(recorder, mesh)
    try:
        yield
    finally:
        mesh.recordings.release()
        mesh.recordings = before


def run_blocks(
    layers: Sequence[Block],
    state: State,
    fixed: Fixed,
    layout: PairLayout,
    done: Callable[[int, int], None] | None = None,
) -> State:
    """Run the blocks of a stack, one after the other.

    Args:
        layers: the blocks.
        state: what each of them updates.
        fixed: tensors that all of them read, None where there is none.
        layout: the tiling.
        done: called with (blocks done, blocks in all).

    Returns:
        The updated state; see `Block.in_place`.
    """
    recordings: Recordings | None = None
    if layers and not torch.is_grad_enabled():
        recordings = layers[0].mesh.recordings
    run = state
    for i, layer in enumerate(layers):
        layer.draw(*run, layout)
        if recordings is None:
            run = layer.compute(*run, *fixed, layout)
        else:
            run = recordings(layer, run, fixed, layout)
        if done is not None:
            done(i + 1, len(layers))
    if recordings is None:
        return run
    out = []
    for given, x, here in zip(state, run, layers[-1].in_place, strict=True):
        if x is given or not recordings.holds(x):
            out.append(x)
        else:
            out.append(given.copy_(x) if here else x.clone())
    return tuple(out)


class Recordings:
    """The recordings of one stage, one for each kind of block and of tensors.

    Args:
        recorder: records.
        mesh: the mesh.
    """

    def __init__(self, recorder: Recorder, mesh: Mesh) -> None:
        self._recorder, self._mesh = recorder, mesh
        self._kinds: dict[Any, _Kind] = {}
        self._signatures: dict[int, Any] = {}

    def __call__(self, layer: Block, state: State, fixed: Fixed, layout: PairLayout) -> State:
        """One block: its updated state, in tensors that belong to the recording or not."""
        if id(layer) not in self._signatures:  # layers outlive the recordings
            self._signatures[id(layer)] = signature(layer)
        device = self._mesh.device.type
        tensors = tuple(
            x if x is None else (x.shape, x.dtype, x.stride()) for x in (*state, *fixed)
        )
        auto = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = (self._signatures[id(layer)], tensors, layout, auto)
        if key not in self._kinds:
            pays = step_graph.demanded(self._mesh) or layer.operations(*state) <= MOST_OPERATIONS
            wanted = pays and self._signatures[id(layer)] is not None
            self._kinds[key] = _Kind(self._recorder, self._mesh, wanted)
        return self._kinds[key](layer, state, fixed, layout)

    def holds(self, x: Tensor) -> bool:
        """Tell whether the next block may overwrite a tensor."""
        return any(x is held for kind in self._kinds.values() for held in kind.state)

    def release(self) -> None:
        """Give back the memory of all recordings."""
        for kind in self._kinds.values():
            kind.release()
        self._kinds.clear()
        self._recorder.release()


class _Kind:
    """Runs blocks of one kind: one as it is, one on the recording's tensors, then the recording.

    Args:
        recorder: records.
        mesh: the mesh.
        wanted: False runs every block as it is.
    """

    def __init__(self, recorder: Recorder, mesh: Mesh, wanted: bool) -> None:
        self._recorder, self._mesh, self._wanted = recorder, mesh, wanted
        self._done = 0
        self.release()

    def __call__(self, layer: Block, state: State, fixed: Fixed, layout: PairLayout) -> State:
        """One block."""
        self._done += 1
        if self._wanted and self._done == 2:
            self._wanted = self._warm_up(layer, state, fixed, layout)
            if self._wanted:
                return self.state
        if not self._wanted or self._done == 1:
            out = layer.compute(*state, *fixed, layout)
            # The first block of a stack may widen its state; it stays on its own.
            same = zip(state, out, strict=True)
            self._wanted &= all(x.shape == y.shape and x.dtype == y.dtype for x, y in same)
            return out
        self._load(layer, state, fixed)
        if self._record():
            self._replay()
        else:
            self._body()
        return self.state

    def release(self) -> None:
        """Let go of the recording and its tensors."""
        self.state: State = ()
        self._fixed: Fixed = ()
        self._given: Fixed = ()
        self._slots: WeightSlots | None = None
        self._replay: Callable[[], None] | None = None
        self._body: Callable[[], None] = lambda: None

    def _warm_up(self, layer: Block, state: State, fixed: Fixed, layout: PairLayout) -> bool:
        """One block on the recording's tensors; False, and nothing done, where memory is short."""
        try:
            if not self._hold(layer, state, fixed, layout):
                return False
            self._load(layer, state, fixed)
            self._recorder.warm_up(self._body)
        except torch.OutOfMemoryError as error:
            self.release()
            goes_without(self._mesh, _WHAT, error)
            return False
        return True

    def _hold(self, layer: Block, state: State, fixed: Fixed, layout: PairLayout) -> bool:
        """Make the tensors that the recording works on; False where there is no room for them."""
        read = (x for x in fixed if x is not None)
        own = sum(x.nbytes for x in (*state, *read, *layer.parameters()))
        need = own + TRANSIENT * sum(x.nbytes for x in state)
        free = None if step_graph.demanded(self._mesh) else free_bytes(self._mesh)
        if free is not None and need > free:
            return False
        self.state = tuple(torch.empty_like(x) for x in state)
        self._fixed = tuple(None if x is None else torch.empty_like(x) for x in fixed)
        self._slots = slots = WeightSlots(layer)
        kept = self.state

        def body() -> None:
            with slots.standing_in():
                out = layer.compute(*kept, *self._fixed, layout)
            for held, x in zip(kept, out, strict=True):
                if x is not held:
                    held.copy_(x)

        self._body = body
        return True

    def _load(self, layer: nn.Module, state: State, fixed: Fixed) -> None:
        assert self._slots is not None
        self._slots.load(layer)
        for held, x in zip(self.state, state, strict=True):
            if x is not held:
                held.copy_(x)
        if any(x is not y for x, y in zip(fixed, self._given, strict=False)) or not self._given:
            for held, x in zip(self._fixed, fixed, strict=True):
                if held is not None and x is not None:
                    held.copy_(x)
            self._given = fixed

    def _record(self) -> bool:
        """Try to record once; tell whether there is a recording."""
        if self._replay is None and self._done == 3:
            assert self._slots is not None
            try:
                with self._slots.complete():
                    self._replay, _ = self._recorder.record(self._body)
            except RuntimeError as error:
                goes_without(self._mesh, _WHAT, error)
                self._wanted = False
        return self._replay is not None
