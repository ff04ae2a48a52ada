"""CUDA graphs as foldcp records them: replayed, beside random numbers, and after a failure."""

from __future__ import annotations

import torch
from torch import Tensor

from bench import eager
from bench.shapes import OPS, Draw, Inputs
from foldcp.modules.graphs.step_graph import CudaRecorder
from foldcp_kernels.triangle_attention import triangle_attention
from foldcp_kernels.triangle_multiplication import triangle_multiplication

N, REPLAYS = 96, 3


def _block(z: Tensor, multiplication: Inputs, attention: Inputs) -> Tensor:
    z = triangle_multiplication(z, None, eager.multiplication_weights(multiplication), True)
    return triangle_attention(z, None, eager.attention_weights(attention), False)


def replay(device: torch.device) -> str | None:
    """Replays on new data give what the kernels give without a graph, to the bit."""
    draw = Draw(torch.float32, device)
    weights = [OPS[x].make(draw, 8) for x in ("triangle_multiplication", "triangle_attention")]
    inputs = [draw.normal(1, N, N, 128) for _ in range(REPLAYS)]
    buffer, recorder = torch.empty_like(inputs[0]), CudaRecorder(device)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        want = [_block(x.clone(), *weights) for x in inputs]
        # The ops work in place: what is recorded starts from a copy.
        again, out = recorder.record(lambda: _block(buffer.clone(), *weights))
        for i, (x, y) in enumerate(zip(inputs, want, strict=True)):
            buffer.copy_(x)
            again()
            if not torch.equal(out, y):
                off = float((out - y).abs().max())
                return f"replay {i + 1} is {off:.1e} off what runs without a graph"
    return None


def random(device: torch.device) -> str | None:
    """Random numbers after a recording and its replays are those that come without any."""
    x = torch.ones(1000, device=device)
    torch.manual_seed(3)
    want = torch.randn(1000, device=device)
    torch.manual_seed(3)
    again, _ = CudaRecorder(device).record(lambda: x * 2)
    again()
    got = torch.randn(1000, device=device)
    return None if torch.equal(got, want) else "a recording changes the random numbers after it"


def failed(device: torch.device) -> str | None:
    """After a recording that fails, random numbers and further recordings are as ever."""
    x = torch.ones(1000, device=device)
    torch.manual_seed(4)
    want = torch.randn(1000, device=device)
    torch.manual_seed(4)
    recorder = CudaRecorder(device)
    try:
        recorder.record(lambda: x * float(x.sum()))  # the host waits, which no graph can hold
        return "a recording in which the host waits did not fail"
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0][:80]
    try:
        got = torch.randn(1000, device=device)
    except RuntimeError as error:
        said = str(error).strip().splitlines()[0]
        return f"after a failed recording ({why}) no random numbers can be drawn: {said}"
    if not torch.equal(got, want):
        return "a failed recording changes the random numbers after it"
    again, out = CudaRecorder(device).record(lambda: x * 3)
    again()
    right = torch.equal(out, x * 3)
    return None if right else "a recording after a failed one gives other numbers"
