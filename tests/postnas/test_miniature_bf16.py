"""The whole small run once in bf16: every stage, and an export that is the model that was trained."""

import math

import pytest
import torch

import miniature
from megatron_jet.configs.overrides import load_yaml
from megatron_jet.configs.results import RESULT_TYPES
from megatron_jet.configs.run import RunConfig
from megatron_jet.convert.global_checkpoint import GlobalCheckpoint
from megatron_jet.convert.hf_package import load_for_causal_lm
from megatron_jet.postnas.pipeline import run_stage
from megatron_jet.postnas.stage import StageContext


def test_every_stage_in_bf16(tmp_path):
    miniature.write_inputs(tmp_path)
    run = miniature.open_run(tmp_path, "run", dtype="bf16")
    ctx = StageContext(run, RunConfig.parse(load_yaml(run / "config.yaml")))
    for stage in RESULT_TYPES:
        run_stage(ctx, stage)
    trained = GlobalCheckpoint(ctx.path(ctx.result("stage2").checkpoint))
    for key in trained:
        assert trained.dtype(key) == (torch.float32 if key.endswith("A_log") else torch.bfloat16), key
    assert ctx.result("export").max_logit_difference < 2e-4, "both in fp32, from the same weights"
    exported = load_for_causal_lm(run / "export", dtype=torch.float32).state_dict()
    embedding = trained.read("embedding.word_embeddings.weight")
    assert torch.equal(exported["model.embed_tokens.weight"], embedding.float())
    evaluated = ctx.result("evaluate")
    assert evaluated.megatron == ctx.result("stage2").after
    for name, loss in evaluated.final.loss.items():
        # A mean over tokens of a model of four layers moves by less than one rounding (2^-8) of its size.
        assert math.isfinite(loss) and loss == pytest.approx(evaluated.megatron.loss[name], rel=2**-8)
    for stage in ("block_selection", "new_block", "hardware_search"):
        for candidate in ctx.result(stage).candidates:
            assert all(math.isfinite(value) for value in candidate.scores.loss.values()), candidate.name
