"""An exchange of your own: say what each rank owns and wants, and foldcp derives every message.

    torchrun --nproc-per-node 4 examples/custom_exchange.py [gloo]

Four ranks hold a quarter of the tokens each; every token adds up what all tokens send it, and a
ring passes the quarters on. Look at: `own` and `want` are all that is written by hand; the transfer
of the next step runs while `stream` yields this one; gradients find their way back to the owners.
"""

import sys

import torch
import torch.distributed as dist

from foldcp import Mesh
from foldcp.fabric.exchange.autograd import stream
from foldcp.layout.schedule import Schedule, Want, plan

TOKENS, CHANNELS, RANKS = 20, 8, 4


def own(rank: int, source: int) -> tuple[tuple[int, int], ...]:
    """The box of tensor `source` that a rank holds: here one span of tokens."""
    each = TOKENS // RANKS
    return ((rank * each, (rank + 1) * each),)


def want(rank: int, step: int) -> tuple[Want, ...]:
    """What a rank works on at a step: the quarter of the rank `step` places further."""
    return (Want(0, own((rank + step) % RANKS, 0)),)


dist.init_process_group("gloo")
mesh = Mesh.create(2, 2, "cpu", transport=sys.argv[1] if len(sys.argv) > 1 else "auto")
mine = plan(Schedule(RANKS, RANKS, own, want, route="ring"), mesh.rank, sources=1)

torch.manual_seed(0)  # every rank makes the whole tensor too, to compare with
whole = torch.randn(TOKENS, CHANNELS, dtype=torch.float64, requires_grad=True)
(lo, hi), *_ = mine.owned[0]
x = whole[lo:hi].detach().requires_grad_()
out = torch.zeros_like(x)
for step, (theirs,) in enumerate(stream(mesh, mine, [x], dims=[(0,)], label="custom")):
    out = out + torch.tanh(x @ theirs.T) @ theirs
    senders = [f"tokens {p.box[0]} from rank {p.peer}" for p in mine.steps[step].recvs]
    if mesh.is_root:
        print(f"rank 0, step {step}: {', '.join(senders) or 'its own tokens'}")
out.square().sum().backward()

alone = torch.tanh(whole @ whole.T) @ whole
alone.square().sum().backward()
off = [(out - alone[lo:hi]).abs().max().item(), (x.grad - whole.grad[lo:hi]).abs().max().item()]
print(f"rank {mesh.rank} ({mesh.transport}): off by {off[0]:.0e}, gradients by {off[1]:.0e}")
mesh.close()
dist.destroy_process_group()
