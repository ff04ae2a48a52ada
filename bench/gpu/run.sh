#!/bin/bash
# Checks and measures on one GPU, the most valuable first, in under 9 minutes: bash bench/gpu/run.sh
#
# Needs python3 with torch, triton and numpy; what else is missing leaves parts out, each with a line
# that says so. Every part has its own limit, a part that fails leaves its first error and last
# lines and does not stop the next, and what a part has written until then is kept.
#
# In a session that is lent the device machine (/work/.library/device/README.md):
#   1. bash bench/gpu/carry.sh          at the commit to be measured; again after every commit
#   2. the tool `run`: command `bash bench/gpu/run.sh`, timeout_s 600, carry .gpu-deps,
#      foldcp_kernels/_C.abi3.so, foldcp_kernels/_build_info.py
#   3. tar -xzf FILES_AT/results.tar.gz -C bench/results     makes bench/results/gpu-h200
#      python -m bench.plots bench/results/gpu-h200; commit the folder (its tables name the commit
#      that was measured; "+" behind it means uncommitted changes: do not publish those)
#   4. summary.txt first: a part that failed says why, log.txt has the rest. Figures of a row whose
#      status is not "ok" do not exist. Then, if all is right:
#      - foldcp_kernels/core/triton_configs.py: entries by tune.csv, with that file as their source
#      - README.md, docs/index.md, docs/limits.md: "has not run on a GPU yet"; docs/features.md (The
#        sampler), docs/design/*.md, docs/benchmarking.md: "has run on a GPU": replace by what is true
#        then. Figures go to docs/results through a block of bench/pages/results.py
#   5. a second call with time left: PARTS=predict (more and larger N), PARTS=kernels (all other
#      ops), PARTS=peers (torch.compile and trifast too), PARTS=tune
#
# FAST=1      the same parts in the same order, in tiny sizes, on a CPU: the rehearsal that CI runs
# PARTS=...   some of the parts below; kernels and peers run only when they are named. The last one
#             gets all the time that is left
# LIMIT=540   seconds for everything
# OUT=FOLDER  where to leave summary.txt, log.txt and results.tar.gz; the device machine sets it, and
#             brings back at most 8 files. Without it all tables lie in bench/results/<GPU>
cd "$(dirname "$0")/../.." || exit 1
START=$SECONDS
PY=${PYTHON:-python3}
LIMIT=${LIMIT:-540}
PARTS=${PARTS:-correctness engine predict core block graph tune}
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
unset TRITON_INTERPRET
ulimit -c 0
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
CORE=triangle_attention_core,triangle_multiplication # measured apart, first
SIDES=foldcp,foldcp-torch,eager,cuequivariance

# What is carried is compiled for Python 3.12, and compressed as the tree that travels is limited.
if ls .gpu-deps/*.tar.xz >/dev/null 2>&1; then
  if "$PY" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'; then
    mkdir "$WORK/site"
    for archive in .gpu-deps/*.tar.xz; do
      tar -xJf "$archive" -C "$WORK/site" || echo "cannot unpack $archive" &
    done
    wait
    PYTHONPATH=$PYTHONPATH:$WORK/site
  else
    echo "left out: .gpu-deps, which is for Python 3.12"
  fi
fi
NAME=$("$PY" -c 'from bench.machine import results_folder as f; print(f().name)' 2>"$WORK/error") || {
  echo "nothing can run here: $(tail -n 1 "$WORK/error")" | tee "${OUT:-.}/summary.txt"
  exit 1
}
if [ -n "$OUT" ]; then RESULTS=$WORK/$NAME; else RESULTS=bench/results/$NAME; fi
mkdir -p "$RESULTS" ${OUT:+"$OUT"}
LOG=${OUT:-$RESULTS}/log.txt
SUMMARY=${OUT:-$RESULTS}/summary.txt
: >"$LOG"
echo "$NAME, commit $("$PY" -c 'from bench.machine import describe as d; print(d()["commit"])')" >"$SUMMARY"

# Boltz takes seconds to import, and may lack a package of its own.
"$PY" -c 'import boltz.main' >"$WORK/boltz" 2>&1 &
BOLTZ=$!

pack() { # what there is by now, in one file
  [ -n "$OUT" ] || return 0
  tar -C "$WORK" -czf "$OUT/.results.tmp" "$NAME" 2>/dev/null && mv "$OUT/.results.tmp" "$OUT/results.tar.gz"
}
size() { # size REAL TINY
  if [ -n "$FAST" ]; then echo "$2"; else echo "$1"; fi
}
first_error() {
  grep -m 1 -E '^[A-Za-z_.]*(Error|Exception|Interrupt|Exit)\b|^(WRONG|FAILED|TIMEOUT)\b|rror:|Fatal Python' "$WORK/part" ||
    grep -v '^ *$' "$WORK/part" | tail -n 1
}
say() { # say NAME STATUS...
  printf '%-12s %s\n' "$1" "${*:2}" | cut -c1-300 | tee -a "$SUMMARY"
}

# part NAME SECONDS NEEDS COMMAND...: NEEDS is boltz or -; WITHIN in the command is when to start
# nothing more, so that a part ends before it is stopped.
part() {
  local name=$1 limit=$2 needs=$3 began=$SECONDS code why pid ticks=0
  shift 3
  [[ " $PARTS " == *" $name "* ]] || return 0
  local left=$((LIMIT - SECONDS + START))
  [ -n "$FAST" ] && limit=$((3 * limit)) # a rehearsal may share its cores with other tests
  [[ $left -lt $limit || $PARTS == *"$name" ]] && limit=$left
  [ "$limit" -lt 5 ] && say "$name" "left out: no time" && return 0
  if [ "$needs" = boltz ] && ! wait $BOLTZ; then
    say "$name" "left out: no boltz ($(tail -n 1 "$WORK/boltz"))"
    return 0
  fi
  echo "=== $name (at most $limit s, $((began - START)) s in)" | tee -a "$LOG"
  # SIGABRT makes Python print where each thread was. All of the part's processes get it.
  timeout --signal=ABRT --kill-after=2 "$limit" "${@//WITHIN/$((limit - 20))}" >"$WORK/part" 2>&1 &
  pid=$!
  while kill -0 $pid 2>/dev/null; do
    sleep 0.5
    ((++ticks % 40)) || pack
  done
  wait $pid
  code=$?
  head -c 300000 "$WORK/part" >>"$LOG"
  [ "$(wc -c <"$WORK/part")" -gt 300000 ] && { echo "[...]"; tail -c 100000 "$WORK/part"; } >>"$LOG"
  why=$(grep -v '^ *$' "$WORK/part" | tail -n 1)
  case $code in
    0) [[ $why == "left out: "* ]] || why="ok: $why" ;;
    124 | 134 | 137) why="stopped after $((SECONDS - began)) s (exit $code): $(first_error)" ;;
    *) why="failed (exit $code): $(first_error)" ;;
  esac
  if [ $code != 0 ]; then
    grep -v '^ *$' "$WORK/part" | tail -n 12 | cut -c1-300
    FAILED="$FAILED $name"
  fi
  say "$name" "$((SECONDS - began)) s" "$why"
  echo "--- $name: exit $code after $((SECONDS - began)) s" >>"$LOG"
  pack
}

part correctness 95 - "$PY" -m bench.gpu.correctness $(size "--within WITHIN" --fast) --out "$RESULTS"
# Four ranks share the GPU: shows that the exchanges are right, and nothing about speed.
part engine 50 - "$PY" -m bench.gpu.engine $(size "" "--n 24") --out "$RESULTS"
part predict 120 boltz "$PY" -m bench.predict --one-process --within WITHIN --out "$RESULTS/predict.csv" \
  $(size "--n 512,1024,2048 --rounds 2" "--n 24 --blocks 1 --rounds 1")
part core 65 - "$PY" -m bench.kernels --op $CORE --within WITHIN --out "$RESULTS/kernels_core.csv" \
  $(size "--n 1024,2048,512,4096 --budget 1.5 --providers $SIDES" "--n 32 --budget 0.1")
part block 60 boltz "$PY" -m bench.block --within WITHIN --out "$RESULTS/block.csv" \
  $(size "--n 512,1024,2048 --budget 1.5" "--n 16 --layers 1 --budget 0.01")
part graph 45 boltz "$PY" -m bench.gpu.graph --out "$RESULTS" $(size "--n 128,512" "--n 16 --layers 1 --samples 1")
part tune 85 - "$PY" -m bench.tune --hottest 8 --out "$RESULTS" \
  $(size "--within WITHIN" "--rehearse --within 5")
part kernels 300 - "$PY" -m bench.kernels --without $CORE --within WITHIN --out "$RESULTS/kernels.csv" \
  $(size "--n 1024,512,2048 --budget 0.5 --providers $SIDES" "--n 8 --budget 0.01")
# Both packages compile or tune for minutes.
part peers 500 - "$PY" -m bench.kernels --within WITHIN --out "$RESULTS/kernels_peers.csv" \
  $(size "--n 1024,512,2048 --budget 1 --providers foldcp,eager,compile,cuequivariance,trifast" "--n 8")

{
  "$PY" - "$RESULTS" <<'PYTHON'
import csv, sys
from pathlib import Path

for name in ("predict", "kernels_core", "block", "kernels", "kernels_peers"):
    path = Path(sys.argv[1]) / f"{name}.csv"
    for r in csv.DictReader(path.open()) if path.is_file() else ():
        who = r.get("provider") or r["side"]
        if who == "foldcp-torch" or r["status"] == "unavailable":
            continue
        case = r.get("op") or r.get("part") or "predict"
        value = f"{r['ms']} ms" if r.get("ms") else f"{r['seconds']} s" if r.get("seconds") else ""
        share, faster = r.get("roofline_fraction"), r.get("speedup_over_stock")
        print(f"{case:32} {r['n']:>5} {who:14} {value or r['status'] + ': ' + r['reason'][:60]:18}"
              + (f" {float(share):.0%} of roofline" if share else "")
              + (f" {faster}x stock" if faster else ""))
PYTHON
  echo "=== ${NAME}: $((SECONDS - START)) s; not right:${FAILED:- none}"
} | tee -a "$SUMMARY"
pack
[ -z "$FAILED" ]
