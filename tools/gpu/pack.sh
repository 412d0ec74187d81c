#!/usr/bin/env bash
# Packs what the GPU machine lacks into .gpu/ of this checkout, for one run there. Needs PyPI, no GPU.
#   bash tools/gpu/pack.sh [--te DIR]       DIR holds Transformer Engine's wheels, built elsewhere
# Result: .gpu/pack.tar.xz: Megatron-Core, flash-linear-attention, pydantic, webdataset, a current ptxas.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
te=""
if [ "${1:-}" = --te ]; then te="$(cd "$2" && pwd)"; fi
cd "$here/../.."
python="${PYTHON:-.venv/bin/python}"
[ -x "$python" ] || python="$(bash tools/find_python.sh)"
rm -rf .gpu .cache/gpu-stage .cache/gpu-wheels && mkdir -p .gpu .cache/gpu-wheels .cache/gpu-stage/site .cache/gpu-stage/bin

pinned() { grep -iE "^${1//-/[-_]}==" constraints.txt; }
wanted=("$(pinned megatron-core)" "$(pinned fla-core)" "$(pinned flash-linear-attention)" "$(pinned pydantic)"
  "$(pinned pydantic-core)" "$(pinned annotated-types)" "$(pinned typing-inspection)" "$(pinned typing-extensions)"
  "$(pinned webdataset)" "$(pinned braceexpand)" 'nvidia-cuda-nvcc>=13.3')
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do platforms+=(--platform "${tag}_x86_64"); done
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
  --implementation cp "${platforms[@]}" -d .cache/gpu-wheels "${wanted[@]}" 2> .cache/gpu-pip.log || { cat .cache/gpu-pip.log >&2; exit 1; }
"$python" "$here/unpack.py" .cache/gpu-wheels .cache/gpu-stage $te
tar -C .cache/gpu-stage --sort=name --owner=0 --group=0 -cf - . | xz -T1 -6 > .gpu/partial
mv .gpu/partial .gpu/pack.tar.xz

# What can be checked here: everything imports from the pack, against the torch of this checkout's environment.
if "$python" -c 'import torch' 2>/dev/null; then
  PYTHONPATH=.cache/gpu-stage/site:kernels:. TRITON_PTXAS_PATH=.cache/gpu-stage/bin/ptxas "$python" tools/gpu/env.py --check .cache/gpu-stage
else
  echo "note: no torch in $python, so imports were not tried (make install, then again)" >&2
fi
bytes=$( (git ls-files -z; find .gpu -type f -print0) | xargs -0 stat -c %s | awk '{sum += $1} END {print sum}')
rm -rf .cache/gpu-stage
printf '.gpu/pack.tar.xz is %s; with the checkout %s MiB of 64 travel\n' "$(du -h .gpu/pack.tar.xz | cut -f1)" $((bytes >> 20))
((bytes < 60 << 20)) || { echo "error: too large to travel" >&2; exit 1; }
echo 'now run on the GPU machine, in the checkout with .gpu in it: bash tools/gpu/measure.sh'
