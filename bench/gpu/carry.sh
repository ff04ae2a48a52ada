#!/bin/bash
# Fills .gpu-deps (ignored by git, at most 62 MiB) with what bench/gpu/run.sh can use on a machine
# without network: Boltz with the packages its modules import, and cuEquivariance and trifast to
# compare with. Runs here, for Python 3.12 and CUDA 13 there: bash bench/gpu/carry.sh
# What cannot be fetched is left out; the parts that need it are then skipped, with their reason.
cd "$(dirname "$0")/../.." || exit 1
PY=${PYTHON:-.venv/bin/python}
DEPS=.gpu-deps
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir -p $DEPS && rm -f $DEPS/*.tar.xz
echo '*' >$DEPS/.gitignore
echo "$(git rev-parse --short HEAD)$(git status --porcelain -uno -- foldcp foldcp_kernels | head -c1 | tr -c '\n' +)" >$DEPS/COMMIT

fetch() { # fetch FOLDER PACKAGE...: wheels for the machine there, without their dependencies
  local folder=$WORK/$1 tags="" v
  shift
  for v in 2014 _2_17 _2_24 _2_27 _2_28; do tags="$tags --platform manylinux${v}_x86_64"; done
  for package in "$@"; do
    "$PY" -m pip install -q --no-deps --no-compile --only-binary=:all: -c constraints.txt \
      --python-version 3.12 --implementation cp $tags --target "$folder" "$package" 2>/dev/null || echo "left out: $package"
  done
}
local_copy() { # packages that have no wheel but are pure Python, from the environment here
  "$PY" -c 'import importlib.util as u, sys; s = u.find_spec(sys.argv[1]); print(s.origin.rsplit("/", 1)[0])' \
    "$1" 2>/dev/null | xargs -I{} cp -r {} "$WORK/boltz/" || echo "left out: $1"
}

fetch boltz boltz==2.2.1 rdkit gemmi biopython einx frozendict mashumaro omegaconf
for name in fairscale antlr4 chembl_structure_pipeline ihm modelcif; do local_copy $name; done
fetch peers cuequivariance==0.13.0 cuequivariance-torch==0.13.0 cuequivariance-ops-cu13==0.13.0 \
  cuequivariance-ops-torch-cu13==0.13.0 trifast==0.1.13 platformdirs
for set in boltz peers; do
  tar -C "$WORK/$set" --exclude=__pycache__ --exclude=tests --exclude=Contrib -cf - . | xz -T0 -6 >$DEPS/$set.tar.xz
done
du -sh $DEPS/*
