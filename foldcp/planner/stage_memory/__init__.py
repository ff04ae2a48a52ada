"""Count the bytes that each stage of a prediction holds on a rank, from integers alone."""

from foldcp.planner.stage_memory.stages import peak_bytes, stage_bytes, weights_bytes
from foldcp.planner.workload import STAGES

__all__ = ["STAGES", "peak_bytes", "stage_bytes", "weights_bytes"]
