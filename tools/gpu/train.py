#!/usr/bin/env python3
"""tools/bench_training.py with weights drawn on the GPU: on the CPU that takes a minute per model, of nine.

python train.py RECIPE [options of tools/bench_training.py]
python train.py train:jet_2b_recomputed ...   the 2B recipe, activations recomputed instead of kept
"""

import runpy
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).resolve().parent)]


def jet_2b_recomputed():
    """The 2B recipe, activations recomputed instead of kept: what the choice costs."""
    from megatron_jet.configs.recipes.jet_nemotron import jet_nemotron_2b

    config = jet_nemotron_2b()
    stages = {
        name: config.stage(name).replace(training=config.stage(name).training.replace(recompute=True))
        for name in ("stage1", "stage2")
    }
    return config.replace(**stages)


def draw_in_place(chunks, model, seed, choices=None) -> None:
    """Random weights of the right size, equal for equal names, so that student and teacher still share what they do."""
    import torch

    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            torch.manual_seed(zlib.crc32(name.encode()))
            with torch.no_grad():
                if name.endswith("A_log"):
                    parameter.uniform_(-2, 2.7)
                elif name.endswith("dt_bias"):
                    parameter.fill_(-4.0)
                elif "norm" in name:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, 0.02)


def main() -> None:
    """Hand over to the tool with another way to draw weights."""
    from megatron_jet.training import cpu_backend

    cpu_backend.install()
    from megatron_jet.model import builder

    builder.initialize = draw_in_place
    sys.argv[0] = "tools/bench_training.py"  # the command that the result file records
    runpy.run_path(str(ROOT / "tools" / "bench_training.py"), run_name="__main__")


if __name__ == "__main__":
    main()
