"""Training on a GPU: NCCL with one rank, every mixer in bf16, and the trainer from start to resume."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from megatron_jet.configs.mixers.gated_delta_net import GatedDeltaNetConfig
from megatron_jet.configs.mixers.gla import GLAConfig
from megatron_jet.configs.mixers.jet_block import JetBlockConfig
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.signals import Interrupted
from megatron_jet.configs.training import OptimizerConfig
from megatron_jet.model.builder import build_model
from megatron_jet.training.distill import DistillationModel
from megatron_jet.training.optimizer import Optimizer, wrap_data_parallel
from megatron_jet.training.steps import named_terms, normalizer, run_microbatches, take_batches
from training.training_cases import DISTILL, RandomLoader, job, run_job, write_models

pytestmark = pytest.mark.gpu

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
}
MIXERS = {
    "jet": JetBlockConfig(num_heads=2, head_dim=32, expand_v=2.0),
    "gated_delta_net": GatedDeltaNetConfig(num_heads=2, head_dim=32, expand_v=2.0),
    "gla": GLAConfig(num_heads=2, head_dim=32, expand_v=2.0),
}
SEQ = 128
TEACHER = ModelConfig(**SIZES, layer_plan=("attn", "attn"))


def student(entry: str) -> ModelConfig:
    return ModelConfig(**SIZES, layer_plan=(entry, "attn"), mixers=MIXERS)


@pytest.mark.parametrize("entry", ["attn", "swa:32", "jet", "gated_delta_net", "gla"])
def test_one_step_in_bf16(single_rank, entry):
    assert dist.get_backend() == "nccl"
    model = student(entry)
    chunks = build_model(model, single_rank, dtype="bf16", init_seed=2)
    teacher = build_model(TEACHER, single_rank, dtype="bf16", init_seed=1)
    models = wrap_data_parallel(
        [DistillationModel(chunks[0], teacher[0], DISTILL, model.num_layers)], distributed_optimizer=True
    )
    optimizer = Optimizer(models, OptimizerConfig(lr=1e-3), dtype=torch.bfloat16, distributed=True)
    loader = RandomLoader(None, "train", seq_length=SEQ, micro_batch_size=2, dp_rank=0, dp_size=1, seed=0)
    batches = take_batches(iter(loader), 2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        terms = run_microbatches(models, batches, normalizer(batches), forward_only=False)
        losses.append(sum(named_terms(terms).values()))
        norm = optimizer.gradient_norm()
        assert 0 < norm < float("inf")
        optimizer.apply(1e-3)
    assert all(parameter.isfinite().all() for parameter in chunks[0].parameters())
    assert losses[-1] < losses[0], losses  # the same batch four times


@pytest.mark.parametrize("entry", ["jet", "gla"])
def test_bf16_kernels_follow_the_fp32_model(single_rank, entry):
    """bf16 rounds every activation to 8 bits: logits of two layers agree to a few per cent of their spread."""
    tokens = torch.randint(0, SIZES["vocab_size"], (2, SEQ), device="cuda")
    positions = torch.arange(SEQ, device="cuda").expand_as(tokens)
    logits = []
    for dtype in ("fp32", "bf16"):
        (chunk,) = build_model(student(entry), single_rank, dtype=dtype, init_seed=2)
        with torch.no_grad():
            logits.append(chunk(tokens, positions, None).float())
    assert (logits[0] - logits[1]).norm() < 0.05 * logits[0].norm()


def test_trainer_resumes_on_a_gpu(single_rank, tmp_path):
    def case(out):
        return job(
            out,
            model=student("jet"),
            teacher=TEACHER,
            dtype="bf16",
            training={"seq_length": SEQ, "validation_interval": 3, "validation_batches": 1},
        )

    def stop(row: dict) -> None:
        if row["step"] == 3 and row["split"] == "train":
            os.kill(os.getpid(), signal.SIGTERM)

    write_models(case(tmp_path / "a"))
    straight = run_job(case(tmp_path / "a"))
    write_models(case(tmp_path / "b"))
    with pytest.raises(Interrupted):
        run_job(case(tmp_path / "b"), stop)
    resumed = run_job(case(tmp_path / "b"))
    # Atomic additions in the kernels' backward passes make GPU runs equal only up to rounding.
    assert resumed.final_losses == pytest.approx(straight.final_losses, rel=2e-2)
    assert resumed.validation[0] == pytest.approx(straight.validation[0], rel=2e-2)
    assert resumed.steps == straight.steps == 6
