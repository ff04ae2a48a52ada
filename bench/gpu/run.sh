#!/bin/bash
# Checks and measures everything on one GPU in under 9 minutes: bash bench/gpu/run.sh
# Needs python3 with torch, triton and pytest. The part `engine` needs the compiled extension: carry
# foldcp_kernels/_C.abi3.so and _build_info.py, which git ignores, there. Parts with Boltz or cuEquivariance run when they are
# importable, from .gpu-deps (bench/gpu/carry.sh makes it) or installed. Each part has a time limit,
# and a part that fails does not stop the next. Results go to $OUT: tables, plots, log.txt.
#
# FAST=1     a rehearsal: tiny sizes, works on a CPU
# PARTS=...  some of: correctness engine core block graph kernels predict plots (the default) and peers,
#            which adds torch.compile and trifast and takes 8 minutes alone
cd "$(dirname "$0")/../.." || exit 1
PY=${PYTHON:-python3}
NAME=$($PY -c 'from bench.machine import results_folder as f; print(f().name)') || exit 1
OUT=${OUT:-bench/results/$NAME}
PARTS=${PARTS:-correctness engine core block graph kernels predict plots}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
unset TRITON_INTERPRET
CORE=triangle_attention_core,triangle_multiplication # measured apart, first
START=$SECONDS
FAILED=""

# What is carried is compiled for Python 3.12, and compressed as the tree that travels is limited.
if ls .gpu-deps/*.tar.xz >/dev/null 2>&1 && $PY -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'; then
  SITE=$(mktemp -d)
  for archive in .gpu-deps/*.tar.xz; do tar -xJf "$archive" -C "$SITE" || echo "cannot unpack $archive"; done
  PYTHONPATH=$PYTHONPATH:$SITE
fi

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS code
  shift 2
  [[ " $PARTS " == *" $name "* ]] || return 0
  echo "=== $name (at most $limit s, ${began} s in)" | tee -a "$OUT/log.txt"
  timeout --kill-after=5 "$limit" "$@" >"$OUT/part.txt" 2>&1
  code=$?
  cat "$OUT/part.txt" >>"$OUT/log.txt"
  if [ $code != 0 ]; then
    FAILED="$FAILED $name($code)"
    tail -n 15 "$OUT/part.txt"
  fi
  echo "--- $name: exit $code after $((SECONDS - began)) s" | tee -a "$OUT/log.txt"
}

: >"$OUT/log.txt"
if [ -n "$FAST" ]; then
  part correctness 200 "$PY" -m pytest -q -x tests/test_bench.py -k roofline
  part engine 100 "$PY" -m bench.gpu.engine --out "$OUT"
  part core 60 "$PY" -m bench.kernels --op $CORE --n 32 \
    --budget 0.1 --out "$OUT/kernels_core.csv"
  part block 90 "$PY" -m bench.block --n 24 --layers 2 --budget 0.1 --out "$OUT/block.csv"
  part graph 60 "$PY" -m bench.gpu.graph --n 24 --layers 2 --out "$OUT"
  part kernels 90 "$PY" -m bench.kernels --without $CORE --n 32 --within 60 --budget 0.1 --out "$OUT/kernels.csv"
  part predict 120 "$PY" -m bench.predict --n 24 --blocks 1 --within 110 --out "$OUT/predict.csv"
else
  # Triton compiles for minutes on one core.
  PARALLEL=$($PY -c 'import xdist' 2>/dev/null && echo "-n 8")
  part correctness 90 "$PY" -m pytest -q -p no:cacheprovider --maxfail=20 $PARALLEL tests/test_kernels*.py \
    -k "not compile_for_every_chip"
  # Four ranks share the GPU: shows that the exchanges are right, and nothing about speed.
  part engine 45 "$PY" -m bench.gpu.engine --out "$OUT"
  part core 90 "$PY" -m bench.kernels --op $CORE --n 1024,2048,512,4096 --budget 1.5 --within 70 \
    --out "$OUT/kernels_core.csv" --providers foldcp,foldcp-torch,eager,cuequivariance
  part block 65 "$PY" -m bench.block --n 512,1024,2048 --budget 1.5 --within 50 --out "$OUT/block.csv"
  part graph 40 "$PY" -m bench.gpu.graph --n 128,512 --out "$OUT"
  part kernels 80 "$PY" -m bench.kernels --n 1024,512,2048 --budget 0.5 --within 65 --without $CORE \
    --out "$OUT/kernels.csv" --providers foldcp,foldcp-torch,eager,cuequivariance
  part predict 85 "$PY" -m bench.predict --n 512,1024,2048 --recycles 0 --steps 20 --one-process \
    --within 78 --out "$OUT/predict.csv"
  # Not among the default parts: both packages compile or tune for minutes.
  part peers 500 "$PY" -m bench.kernels --n 1024,512,2048 --budget 1 --within 400 \
    --out "$OUT/kernels_peers.csv" --providers foldcp,eager,compile,cuequivariance,trifast
fi
rm -f "$OUT/part.txt"
part plots 20 "$PY" -m bench.plots "$OUT"
rm -f "$OUT/part.txt" # at most 8 files come back: tables, plots, the log
for plot in kernels_core.png kernels.png; do
  [ "$(find "$OUT" -maxdepth 1 -type f | wc -l)" -gt 8 ] && rm -f "$OUT/$plot"
done

echo "=== ${NAME}: $((SECONDS - START)) s; failed:${FAILED:- none}"
"$PY" - "$OUT" <<'PYTHON'
import csv, sys
from pathlib import Path

for name in ("kernels_core", "block", "kernels", "predict", "kernels_peers"):
    path = Path(sys.argv[1]) / f"{name}.csv"
    for r in csv.DictReader(path.open()) if path.is_file() else ():
        who = r.get("provider") or r["side"]
        if who == "foldcp-torch" or r["status"] == "unavailable":
            continue
        case = r.get("op") or r.get("part") or "predict"
        value = f"{r['ms']} ms" if r.get("ms") else f"{r['seconds']} s" if r.get("seconds") else ""
        share = r.get("roofline_fraction")
        print(f"{case:32} {r['n']:>5} {who:14} {value or r['status'] + ': ' + r['reason'][:60]:18}"
              + (f" {float(share):.0%} of roofline" if share else ""))
PYTHON
