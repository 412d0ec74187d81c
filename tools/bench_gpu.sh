#!/usr/bin/env bash
# Everything that docs/benchmarks/ has to say about a GPU, in one command: both published hybrids against both peers,
# the kernels, the training step. Files are named after the GPU. A part that fails is named at the end; the others run.
#   bash tools/bench_gpu.sh [OUT_DIR]               minutes: fixed batches, prefill twice, decoding behind a cache of noise
#   bash tools/bench_gpu.sh --full [OUT_DIR]        the paper's protocol: 13 hours (30 with flash-attn, whose batches are larger)
#   CONTEXTS=4096,65536 bash tools/bench_gpu.sh --full /tmp/short
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
full=""
case "${1:-}" in
--full) full=1 && shift ;;
--quick) shift ;;
-*) echo "error: $1: give --quick (the default) or --full, then a directory" >&2 && exit 2 ;;
esac
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

if [ -z "$full" ]; then
    run speed "$PY" tools/gpu/speed.py "$OUT/$name-speed.json"
    run kernels "$PY" tools/bench_kernels.py --shapes 2x4096x12x96x256 --output "$OUT/$name-kernels.json"
else
    echo "note: seven contexts of four pairs take about 13 hours by the estimate, 30 with flash-attn; CONTEXTS=4096,65536 takes less" >&2
fi
for model in ${full:+Jet-Nemotron-2B Jet-Nemotron-4B}; do
    for peer in Qwen3-1.7B Qwen2.5-1.5B; do
        file="$OUT/$name-$(echo "$model-$peer" | tr 'A-Z.' 'a-z_')"
        run "$model against $peer" "$PY" tools/throughput.py --random-weights "$model" --against "$peer" \
            --beyond-positions --contexts "$CONTEXTS" --output "$file.json" --plot "$file.svg"
    done
done
[ -z "$full" ] || run kernels "$PY" tools/bench_kernels.py --output "$OUT/$name-kernels.json"
for stage in stage1 stage2; do
    run "training, $stage" "$PY" tools/bench_training.py jet_nemotron_2b --stage "$stage" --output "$OUT/$name-training-$stage.json"
done

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
