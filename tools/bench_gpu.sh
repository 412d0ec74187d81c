#!/usr/bin/env bash
# Everything that docs/benchmarks/ has to say about a GPU, in one command: both published hybrids against both peers,
# the kernels, the training step. Files are named after the GPU. A part that fails is named at the end; the others run.
#   bash tools/bench_gpu.sh [OUT_DIR]        CONTEXTS=4096,65536 bash tools/bench_gpu.sh /tmp/short
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
OUT="${1:-docs/benchmarks}"
PY="${PY:-.venv/bin/python}"
CONTEXTS="${CONTEXTS:-4096,8192,16384,32768,65536,131072,262144}"

gpu="$("$PY" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null)" || {
    echo "error: torch sees no GPU here; on a CPU use tools/throughput.py as docs/benchmarks/README.md shows" >&2
    exit 1
}
"$PY" -c 'import flash_attn' 2>/dev/null ||
    echo "note: flash-attn is not installed: both sides use SDPA, whose chunked prefill is slower (pip install flash-attn)" >&2
name="$(echo "$gpu" | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9-')"
mkdir -p "$OUT" || exit 1
failed=()

run() { # label, command...
    echo "== $1" >&2
    "${@:2}" || failed+=("$1")
}

for model in Jet-Nemotron-2B Jet-Nemotron-4B; do
    for peer in Qwen3-1.7B Qwen2.5-1.5B; do
        file="$OUT/$name-$(echo "$model-$peer" | tr 'A-Z.' 'a-z_')"
        run "$model against $peer" "$PY" tools/throughput.py --random-weights "$model" --against "$peer" \
            --beyond-positions --contexts "$CONTEXTS" --output "$file.json" --plot "$file.svg"
    done
done
run kernels "$PY" tools/bench_kernels.py --output "$OUT/$name-kernels.json"
for stage in stage1 stage2; do
    run "training, $stage" "$PY" tools/bench_training.py jet_nemotron_2b --stage "$stage" --output "$OUT/$name-training-$stage.json"
done

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
