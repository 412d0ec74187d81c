#!/usr/bin/env bash
# The figures of docs/benchmarks/ that a CPU gives, in one command; nothing else should run: the quickstart's
# export against its teacher, a hybrid of 46M parameters against a full-attention model, the kernels, the training step.
#   bash tools/bench_cpu.sh [OUT_DIR]
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
OUT="${1:-docs/benchmarks}"
PY="${PY:-.venv/bin/python}"
# One thread: with more, a single other process on the machine makes all of them wait.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$OUT" || exit 1
failed=()

run() { # label, command...
    echo "== $1" >&2
    "${@:2}" || failed+=("$1")
}

compare() { # name, arguments of tools/throughput.py...
    run "$1" "$PY" tools/throughput.py "${@:2}" --device cpu --batch-size 1 --new-tokens 32 \
        --output "$OUT/cpu-$1.json" --plot "$OUT/cpu-$1.svg"
}

if [ -f runs/tiny/export/config.json ]; then
    compare tiny runs/tiny/export --against megatron_jet/teachers/tiny --contexts 1024,4096,8192
else
    failed+=("tiny: no runs/tiny/export; run 'make quickstart' first")
fi
compare 46m --random-weights docs/benchmarks/configs/hybrid-46m.json --against docs/benchmarks/configs/full-42m.json \
    --contexts 1024,4096
run kernels "$PY" tools/bench_kernels.py --device cpu --output "$OUT/cpu-kernels.json"
run training "$PY" tools/bench_training.py tiny --output "$OUT/cpu-training.json"

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
