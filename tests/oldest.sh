#!/usr/bin/env bash
# What runs with the oldest promised versions (make test-oldest): config files and exports of every kind against that
# transformers, a checkpoint there and back, and tiny_distill cut short, from its data to its report. `python` is theirs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python -c "import torch, transformers, pydantic, typer
print(f'torch {torch.__version__}, transformers {transformers.__version__}, pydantic {pydantic.VERSION}, typer {typer.__version__}')"
python -m pytest -q -p no:cacheprovider \
    tests/convert/test_config_keys.py tests/convert/test_hf_config.py tests/convert/test_hf_model.py \
    tests/convert/test_hf_generation.py tests/convert/test_hf_package.py tests/convert/test_published_format.py \
    tests/convert/test_families.py tests/convert/test_verify.py tests/launcher/test_cli.py
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
python launcher/postnas.py run tiny_distill stage1.training.steps=20 stage2.training.steps=20 \
    evaluate.throughput.mode=analytic --output "$scratch/run"
test -s "$scratch/run/report.html"
echo "oldest versions: passed"
