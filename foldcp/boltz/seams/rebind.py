"""Run a function of stock's with other globals than those of its module."""

from __future__ import annotations

from types import FunctionType
from typing import Any


def rebind(function: FunctionType, **names: Any) -> FunctionType:
    """Rebind a function's code to a copy of its module's globals with `names` replaced.

    Args:
        function: a function of stock's.
        names: values of the globals that are replaced.
    """
    scope = {**function.__globals__, **names}
    copy = FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
