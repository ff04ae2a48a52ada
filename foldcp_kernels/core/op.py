"""Run an op: check its arguments, choose an implementation once, and differentiate it.

An op that launches one kernel is an `Op`. One of several parts checks its own arguments, chooses
for each part before any of them runs, and tells the parts what was chosen (`Op.run`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from foldcp_kernels.core.arguments import SIGNATURES, Signature
from foldcp_kernels.core.dispatch import Reason, always, choose
from foldcp_kernels.core.recompute import nothing, recompute


@dataclass(frozen=True)
class Op:
    """One op in several implementations that share a signature.

    Each takes the tensors of the op in the order of `signatures.TABLE`, then its settings by name.
    An op that is not called but chosen and run may give them in groups: its caller checks them.

    Args:
        name: in the table, in the log and in errors.
        eager: in torch, differentiable.
        triton: imports the fused forward, which no CPU needs. Its gradients are those of `eager`,
            computed again.
        covers: returns the reason why the fused forward cannot take these tensors, None where it
            can.
        prefers: returns the reason why `auto` leaves to torch what the fused forward could take.
        definition: the truth; None for a part of an op that is defined as a whole.
        in_place: the op changes its first tensor when gradients are off; the fused forward then
            takes it as `out`, too.
        own_backward: the fused forward is differentiable by itself.
        empty: makes the result of a first tensor without elements; None where the result is that
            tensor.
        variants: the table has one signature for each number of dimensions of the first tensor;
            these numbers, the last of which stands for all others.
    """

    name: str
    eager: Callable[..., Any]
    triton: Callable[[], Callable[..., Any]]
    covers: Reason
    prefers: Reason = always
    definition: Callable[..., Any] | None = None
    in_place: bool = False
    own_backward: bool = False
    empty: Callable[..., Tensor] | None = None
    variants: tuple[int, ...] = ()

    def __call__(self, *tensors: Any, impl: str | None = None, **settings: Any) -> Any:
        """Check the arguments, choose, and run.

        Args:
            tensors: of the op, in the order of the table; optional ones may be None.
            impl: what the caller names, see `dispatch`.
            settings: of the op.

        Raises:
            ValueError: a shape or dtype that does not fit, or a named `impl` that cannot run.
        """
        signature = self._signature or self._variant(tensors[0].ndim)
        signature.check(tensors, {})
        return self.checked(*tensors, impl=impl, **settings)

    def checked(self, *tensors: Any, impl: str | None = None, **settings: Any) -> Any:
        """Choose and run: the call, with arguments that were checked.

        Args:
            tensors: as for the call.
            impl: what the caller names.
            settings: of the op.

        Raises:
            ValueError: a named `impl` that cannot run.
        """
        if not tensors[0].numel():
            out = tensors[0] if self.empty is None else self.empty(*tensors)
            return nothing(out, *tensors)
        return self.run(self.choose(*tensors, impl=impl), *tensors, **settings)

    def choose(self, *tensors: Any, impl: str | None = None) -> str:
        """Choose the implementation of a call, see `dispatch.choose`.

        Args:
            tensors: as for the call.
            impl: what the caller names.

        Raises:
            ValueError: a named implementation cannot run.
        """
        covers, prefers = partial(self.covers, *tensors), partial(self.prefers, *tensors)
        return choose(self.name, impl, tensors[0], covers, prefers)

    def run(self, chosen: str, *tensors: Any, **settings: Any) -> Any:
        """Run what was chosen on arguments that were checked.

        Args:
            chosen: from `choose`.
            tensors: as for the call, with elements.
            settings: of the op.
        """
        if chosen == "torch":
            return self.eager(*tensors, **settings)
        if chosen == "reference":
            assert self.definition is not None, f"{self.name} is defined as part of another op"
            return self.definition(*tensors, **settings)
        if self.own_backward:
            return self._fused(*tensors, **settings)
        if torch.is_grad_enabled():
            fused, twin = (partial(f, **settings) for f in (self._fused, self.eager))
            return recompute(fused, twin, *tensors)
        if self.in_place:
            return self._fused(*tensors, out=tensors[0], **settings)
        return self._fused(*tensors, **settings)

    @cached_property
    def _fused(self) -> Callable[..., Any]:
        return self.triton()

    @cached_property
    def _signature(self) -> Signature | None:
        return SIGNATURES.get(self.name)

    def _variant(self, ndim: int) -> Signature:
        return SIGNATURES[f"{self.name} {ndim if ndim in self.variants else self.variants[-1]}"]
