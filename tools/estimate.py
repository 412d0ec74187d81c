#!/usr/bin/env python3
"""Parameters, FLOPs, cache, memory and GPU-hours of a model or a whole run. Needs no GPU, no weights and no torch."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_jet.configs.command_line import positive, run_tool  # noqa: E402
from megatron_jet.configs.cost import model_cost  # noqa: E402
from megatron_jet.configs.estimate_text import model_text, run_text  # noqa: E402
from megatron_jet.configs.files import read_json  # noqa: E402
from megatron_jet.configs.hf_format import model_from_hf  # noqa: E402
from megatron_jet.configs.model import ModelConfig  # noqa: E402
from megatron_jet.configs.recipes.catalog import RECIPES, load_recipe  # noqa: E402
from megatron_jet.configs.recipes.known_models import KNOWN_MODELS  # noqa: E402
from megatron_jet.configs.run_estimate import (  # noqa: E402
    DEFAULT_UTILISATION,
    H100_PEAK_TFLOPS,
    RunEstimate,
    estimate_run,
)
from megatron_jet.configs.teacher_source import teacher_model  # noqa: E402

EXAMPLES = """examples:
  python tools/estimate.py jet_nemotron_2b
  python tools/estimate.py path/to/config.json --context 65536 --json
  python tools/estimate.py Jet-Nemotron-4B --context 65536
"""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line; a bad one prints the usage and exits 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what",
        metavar="RECIPE_OR_CONFIG_JSON",
        help=f"a recipe ({', '.join(RECIPES)}, package.module:function or config.yaml), a Hugging Face config.json or "
        f"the directory it is in, or a published model ({', '.join(KNOWN_MODELS)})",
    )
    parser.add_argument("--context", type=positive, default=65536, metavar="N", help="tokens per sequence (65536)")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--peak-tflops", type=float, default=H100_PEAK_TFLOPS, help="peak of one GPU (H100: 989)")
    parser.add_argument("--utilisation", type=float, default=DEFAULT_UTILISATION, help="share of the peak (0.35)")
    options = parser.parse_args(arguments)
    if not (0 < options.peak_tflops < float("inf") and 0 < options.utilisation <= 1):
        parser.error("--peak-tflops must be above 0 and --utilisation between 0 and 1")
    return options


def load_model(what: str) -> ModelConfig | None:
    """The model that `what` names, or None when it is a recipe. Raises UserError for a bad config.json."""
    path = Path(what)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        return model_from_hf(read_json(path), str(path))
    return KNOWN_MODELS[what]() if what in KNOWN_MODELS else None


def run_json(estimate: RunEstimate) -> list[dict]:
    """Stages as plain dicts, with the memory's total."""
    stages = []
    for stage in estimate.stages:
        row = stage.to_dict()
        if stage.memory is not None:
            row["memory"]["total"] = stage.memory.total
        stages.append(row)
    return stages


def main(arguments: list[str] | None = None) -> int:
    """Print the estimate. Returns the exit code."""
    options = parse_arguments(arguments)
    run = None
    model = load_model(options.what)
    models = {Path(options.what).name: model}
    if model is None:
        config = load_recipe(options.what)
        run = estimate_run(config, teacher_model(config.teacher), options.peak_tflops, options.utilisation)
        models = {"teacher": run.teacher, f"{config.recipe} (planned student)": run.student}
    if options.json:
        report = {name: model_cost(model, options.context).to_dict() for name, model in models.items()}
        print(json.dumps({"schema_version": 1, "models": report, "stages": run_json(run) if run else []}, indent=2))
        return 0
    for name, model in models.items():
        print(model_text(name, model, options.context) + "\n")
    if run:
        print(run_text(run))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
