#!/usr/bin/env bash
# Everything that one run on the GPU machine finds out in nine minutes, the most valuable first. Run in the checkout:
#   bash tools/gpu/measure.sh                    results in $OUT, seven files
#   PARTS="tests speed" bash tools/gpu/measure.sh      only these parts        TOTAL=300: seconds for all of them
#   JET_GPU_DRY=1 PYTHON=.venv/bin/python bash tools/gpu/measure.sh      on a CPU: the same parts, tiny
# Every part runs whatever became of the others; the end names those that failed, and the exit code is 1 then.
# What tools/gpu/pack.sh packed is unpacked first; without it the machine's own packages have to do.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
kit="$PWD/tools/gpu" pack="${PACK:-$PWD/.gpu/pack.tar.xz}" work="${WORK:-/tmp/jet-gpu}" dry="${JET_GPU_DRY:-}"
OUT="${OUT:-$work/out}" TOTAL="${TOTAL:-540}" python="${PYTHON:-python3}"
PARTS="${PARTS:-env tests kernels train speed more te quickstart}"
mkdir -p "$work/run" "$OUT" && rm -rf "$work/run"
exec > >(tee "$OUT/output.txt") 2>&1

if [ -f "$pack" ]; then
  "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="tar")' "$pack" "$work" 2> /dev/null ||
    { echo "error: $pack does not unpack; make it again with tools/gpu/pack.sh" >&2; exit 1; }
elif [ -z "$dry" ]; then
  echo "note: no .gpu/pack.tar.xz here (tools/gpu/pack.sh makes it); this machine's own packages have to do"
fi
export PYTHONPATH="$work/site:$PWD:$PWD/kernels:$PWD/launcher" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=4 TORCHINDUCTOR_COMPILE_THREADS=8 PYTHONWARNINGS=ignore
[ -n "$dry" ] && export OMP_NUM_THREADS=1
export NCCL_SOCKET_IFNAME=lo GLOO_SOCKET_IFNAME=lo  # there is no network
# Triton 3.6 brings ptxas 12.8, which emits wrong code for Hopper; the packed one is current (docs/numerics.md).
export TRITON_CACHE_DIR="$work/triton"
if [ -z "$dry" ] && [ -f "$work/bin/ptxas" ]; then
  for ptxas in "$work/bin/ptxas" "$(command -v ptxas || echo /usr/local/cuda/bin/ptxas)"; do # the machine's is 13.0, half mended
    TRITON_PTXAS_PATH="$ptxas" timeout 60 "$python" "$kit/probe.py" && { export TRITON_PTXAS_PATH="$ptxas"; break; }
  done
fi
# Correctness takes one configuration per fla kernel, speed takes the tuned one: tuning compiles 900 kernels for the tests.
fixed=(env FLA_CACHE_MODE=default FLA_CONFIG_DIR="$work/fla_configs")

failed=() # names of parts
part() { # name, most seconds, command...
  local name="$1" limit="$2" began=$SECONDS
  shift 2
  [ -n "$dry" ] && limit="${LIMIT:-$limit}" # a busy CPU is no GPU
  ((limit > TOTAL - SECONDS)) && limit=$((TOTAL - SECONDS))
  ((limit >= 10)) || { echo "== $name: left out, no time"; failed+=("$name"); return; }
  echo "== $name: from second $SECONDS, at most $limit s: ${*/#$PWD\//}"
  timeout --kill-after=5 "$limit" "$@"
  local code=$?
  ((code)) && failed+=("$name")
  echo "== $name: exit code $code after $((SECONDS - began)) s"
}
has() { [[ " $PARTS " == *" $1 "* ]]; }

pytests() { # all GPU tests, four processes side by side: they wait for compilers more than for the GPU
  local limit="$1" log="$work/tests" mark=(-m gpu -q -rA --tb=short -p no:cacheprovider --timeout 140)
  [ -n "$dry" ] && mark+=(--collect-only) limit="${LIMIT:-$limit}"
  mkdir -p "$log"
  local groups=("tests/kernels/test_triton_kernels.py -k float32" "tests/kernels/test_triton_kernels.py -k bfloat16"
    "tests/model/test_gpu.py tests/convert/test_hf_gpu.py" "tests/gpu tests/evaluation/test_throughput_gpu.py")
  local i pids=()
  for i in "${!groups[@]}"; do
    # shellcheck disable=SC2086 # words are arguments
    "${fixed[@]}" timeout --kill-after=5 "$limit" "$python" -m pytest "${mark[@]}" ${groups[i]} > "$log/$i.txt" 2>&1 &
    pids+=($!)
  done
  for i in "${!groups[@]}"; do wait "${pids[i]}" || failed+=("tests (${groups[i]})"); done
  for i in "${!groups[@]}"; do echo "##### ${groups[i]}"; tail -c 3000000 "$log/$i.txt"; done > "$OUT/tests.txt"
  grep -hE '^(FAILED|ERROR)|(passed|failed|error|skipped|collected).* in ' "$log"/*.txt | cut -c1-300
}

if has env; then
  part env 40 bash -c "'$python' '$kit/env.py' > '$OUT/env.json' && grep -E '\"(torch|triton|name|nvidia_smi|bytes_per|bf16_fl)' '$OUT/env.json'"
fi
part defaults 30 "$python" "$kit/prewarm.py" --defaults "$work/fla_configs"
if [ -z "$dry" ]; then # beside the tests; what it compiles is asked for after them
  "$python" "$kit/prewarm.py" > "$work/prewarm.txt" 2>&1 &
  prewarm=$!
fi
if has tests; then
  echo "== tests: from second $SECONDS"
  pytests "$((TOTAL - SECONDS < 160 ? TOTAL - SECONDS : 160))"
fi
[ -z "$dry" ] && { wait "$prewarm" || failed+=(prewarm); tail -n 5 "$work/prewarm.txt"; }

if [ -z "$dry" ]; then
  kernels=(--operations chunk_gated_delta_rule,fused_dynamic_conv,causal_conv,rms_norm_gated,l2_normalize
    --shapes 2x4096x12x96x256)
  recipe=jet_nemotron_2b other=train:jet_2b_recomputed sizes=(--micro-batch 2 --batch 8 --iterations 4 --drop 2) speed=()
  steps=(stage1.training.steps=20 stage2.training.steps=10)
else
  kernels=(--operations chunk_gated_delta_rule,l2_normalize --shapes 1x64x2x16x32)
  recipe=tiny other=tiny sizes=(--micro-batch 1 --batch 2 --iterations 2 --drop 1 --layers 4 --seq-length 64) speed=(--dry)
  steps=(stage1.training.steps=4 stage2.training.steps=2)
fi
train() { # name, most seconds, recipe, options: one run of the training benchmark; all of them end up in training.json
  part "train-$1" "$2" "${te[@]}" "$python" "$kit/train.py" "${@:3}" "${sizes[@]}" --output "$work/training/$1.json"
  "$python" -c 'import json, pathlib, sys; print(json.dumps({f.stem: json.loads(f.read_text()) for f in
    sorted(pathlib.Path(sys.argv[1]).glob("*.json"))}, indent=1))' "$work/training" > "$OUT/training.json"
}
te=() && rm -rf "$work/training" && mkdir -p "$work/training"
has kernels && part kernels 90 "$python" tools/bench_kernels.py "${kernels[@]}" --output "$OUT/kernels.json"
has train && train stage1 100 "$recipe" --stage stage1 --mixers jet,gated_delta_net
has speed && part speed 150 "$python" "$kit/speed.py" "$OUT/speed.json" "${speed[@]}"
if has more; then
  train stage2 60 "$recipe" --stage stage2 --mixers jet
  train stage1-recomputed 60 "$other" --stage stage1 --mixers jet
fi
if has te && [ -d "$work/te" ]; then
  libraries="$("$python" -c 'import glob, nvidia; print(":".join(sorted(d for r in nvidia.__path__ for d in glob.glob(r + "/*/lib"))))')"
  te=(env PYTHONPATH="$work/te:$PYTHONPATH" NVTE_FRAMEWORK=pytorch LD_LIBRARY_PATH="$libraries:${LD_LIBRARY_PATH:-}")
  part te-tests 60 "${te[@]}" "${fixed[@]}" "$python" -m pytest -m gpu -q -rA --tb=short tests/model/test_gpu.py tests/gpu
  train stage1-te 60 "$recipe" --stage stage1 --mixers jet
fi
if has quickstart; then
  part quickstart 120 "${fixed[@]}" "$python" launcher/postnas.py run tiny_distill --output "$work/run" "${steps[@]}"
  [ -f "$work/run/report.json" ] && cp "$work/run/report.json" "$OUT/quickstart.json"
fi
echo "== done after $SECONDS s"
ls -l "$OUT"
if ((${#failed[@]})); then
  printf '== failed: %s\n' "${failed[@]}"
  exit 1
fi
