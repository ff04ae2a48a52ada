"""Predict the seconds of every stage of a prediction. **Modelled, not measured.**"""

from foldcp.planner.stage_time.kernel_rates import ASSUMED, KernelRates, read_rates, shared
from foldcp.planner.stage_time.parts import StageSeconds
from foldcp.planner.stage_time.stages import assumptions, stage_seconds
from foldcp.planner.workload import STAGES

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
