#!/usr/bin/env bash
# One complex on all GPUs of this machine, its ranks started by torchrun:
#
#     examples/torchrun.sh                                             # ubiquitin
#     examples/torchrun.sh complex.yaml --use_msa_server               # yours
#     RANKS=2 examples/torchrun.sh complex.yaml --accelerator cpu      # without a GPU
#
# On several machines add --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 behind
# `torchrun` and start this on each of them.
# Look at: the line "foldcp 0.1.0: 2x2 mesh, 4 GPU ranks (torchrun), ...". Without a line that begins
# with `foldcp` it is stock Boltz that runs, once per GPU.
set -euo pipefail

input=${1:-examples/inputs/ubiquitin.yaml}
FOLDCP=1 exec torchrun --nproc-per-node "${RANKS:-gpu}" -m boltz.main \
    predict "$input" "${@:2}"
