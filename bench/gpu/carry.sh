#!/bin/bash
# Fills .gpu-deps (ignored by git) with what bench/gpu/run.sh can use on a machine without network:
# Boltz with the packages its modules import, cuEquivariance and trifast to compare with, and the
# name of the commit. For Python 3.12 and CUDA 13 there. Run it here before every run there:
# packages are fetched only when the lists below have changed. bash bench/gpu/carry.sh
#
# What cannot be fetched is left out; the parts that need it are then left out, with their reason.
# The tree that travels may have 64 MiB, packed: this says how much it has, and fails above that.
cd "$(dirname "$0")/../.." || exit 1
PY=${PYTHON:-.venv/bin/python}
DEPS=.gpu-deps
MOST=$((63 << 20))
BOLTZ="boltz==2.2.1 rdkit gemmi biopython einx frozendict mashumaro omegaconf"
PURE="fairscale antlr4 chembl_structure_pipeline ihm modelcif" # no wheel, copied from here
PEERS="cuequivariance==0.13.0 cuequivariance-torch==0.13.0 cuequivariance-ops-cu13==0.13.0
  cuequivariance-ops-torch-cu13==0.13.0 trifast==0.1.13 platformdirs"
EXTENSION=(foldcp_kernels/_C.abi3.so foldcp_kernels/_build_info.py)

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir -p $DEPS
echo '*' >$DEPS/.gitignore
SOURCES="foldcp foldcp_kernels csrc setup.py"
echo "$(git rev-parse --short HEAD)$(git status --porcelain -- $SOURCES | head -c1 | tr -c '\n' +)" >$DEPS/COMMIT

fetch() { # fetch FOLDER PACKAGE...: wheels for the machine there, without their dependencies
  local folder=$WORK/$1 tags="" v
  shift
  for v in 2014 _2_17 _2_24 _2_27 _2_28; do tags="$tags --platform manylinux${v}_x86_64"; done
  for package in "$@"; do
    "$PY" -m pip install -q --no-deps --no-compile --only-binary=:all: -c constraints.txt \
      --python-version 3.12 --implementation cp $tags --target "$folder" "$package" 2>/dev/null || {
      echo "left out: $package"
      COMPLETE=""
    }
  done
}
local_copy() { # a package that has no wheel but is pure Python, from the environment here
  "$PY" -c 'import importlib.util as u, sys; s = u.find_spec(sys.argv[1]); print(s.origin.rsplit("/", 1)[0])' \
    "$1" 2>/dev/null | xargs -I{} cp -r {} "$WORK/boltz/" || echo "left out: $1"
}

WANTED="$BOLTZ $PURE $PEERS"
if [ "$(cat $DEPS/PACKAGES 2>/dev/null)" != "$WANTED" ]; then
  rm -f $DEPS/*.tar.xz $DEPS/PACKAGES
  COMPLETE=1
  fetch boltz $BOLTZ
  for name in $PURE; do local_copy "$name"; done
  fetch peers $PEERS
  for set in boltz peers; do
    [ -d "$WORK/$set" ] || continue
    tar -C "$WORK/$set" --exclude=__pycache__ --exclude=tests --exclude=Contrib -cf - . | xz -T0 -6 >$DEPS/$set.tar.xz
  done
  [ -n "$COMPLETE" ] && echo "$WANTED" >$DEPS/PACKAGES # else fetched again next time
fi

"$PY" -c 'from foldcp_kernels.core.extension import load; print("extension:", load().described())'
newer=$(find csrc setup.py -newer ${EXTENSION[0]} -name '*.*' 2>/dev/null | head -n 1)
[ -n "$newer" ] && echo "extension: $newer is newer; build it again, or leave it out and it is built there"
du -h $DEPS/*
TREE=$({ git ls-files -z -co --exclude-standard; find $DEPS "${EXTENSION[@]}" -type f -print0; } | xargs -0 du -cb | awk '$2 == "total" {n += $1} END {print n}')
echo "commit $(cat $DEPS/COMMIT); $((TREE >> 20)) MiB travel"
[ "$TREE" -le $MOST ] || { echo "more than $((MOST >> 20)) MiB: take packages off the lists"; exit 1; }
