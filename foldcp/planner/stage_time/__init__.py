"""Predict the seconds of every stage of a prediction. **Modelled, not measured.**"""

from foldcp.planner.stage_time.kernel_rates import ASSUMED, KernelRates, read_rates, shared
from foldcp.planner.stage_time.parts import StageSeconds
from foldcp.planner.stage_time.stages import STAGES, assumptions, stage_seconds

__all__ = [
    "ASSUMED",
    "STAGES",
    "KernelRates",
    "StageSeconds",
    "assumptions",
    "read_rates",
    "shared",
    "stage_seconds",
]
