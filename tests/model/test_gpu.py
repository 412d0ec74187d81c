"""On a GPU, one process: NCCL, a bf16 step of each mixer, and the published numbers. Run by `make test-gpu`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from layout_runs import next_token_loss, relative_error, train_step
from megatron_jet.configs.files import read_json
from megatron_jet.configs.hf_format import model_from_hf
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.convert.weights import hf_to_megatron, megatron_to_hf
from megatron_jet.mixers.backend import have_transformer_engine
from megatron_jet.model.builder import build_model
from megatron_jet.training.parallel import destroy_parallel, init_parallel
from mixers.mixer_cases import ENTRIES, KINDS, model_with

pytestmark = pytest.mark.gpu
ORACLE = Path(__file__).parent.parent / "data" / "jet_tiny"
# Sizes that fla's kernels are made for.
GPU_SETTINGS = {
    "jet": {"num_heads": 2, "head_dim": 96, "expand_v": 2.6666666667},
    "gated_delta_net": {"num_heads": 2, "head_dim": 64},
    "gla": {"num_heads": 2, "head_dim": 64},
}


@pytest.fixture
def nccl():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    init_parallel(ParallelConfig(), seed=0)
    yield ParallelConfig()
    destroy_parallel()


def gpu_model(kind: str):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    return model_with(ENTRIES[kind], ENTRIES[kind], mixers=GPU_SETTINGS, initializer_range=0.05, **sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bf16_step_learns(nccl, kind):
    """Loss and gradients are finite and a step against the gradient lowers the loss."""
    chunk = build_model(gpu_model(kind), nccl, dtype="bf16")[0]
    tokens = torch.randint(0, 64, (2, 256), device="cuda")
    losses = []
    for _ in range(2):
        loss = next_token_loss(chunk(tokens, None, None), tokens)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in chunk.parameters():
                assert parameter.grad.isfinite().all()
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
    assert losses[1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_separate_on_the_gpu(nccl, kind):
    """In bf16: 8 bits, so a few per cent of the logits' spread."""
    chunk = build_model(gpu_model(kind), nccl, dtype="bf16")[0]
    lengths = [1, 3, 70, 182]
    tokens = torch.randint(0, 64, (1, 256), device="cuda")
    from layout_runs import packed

    params = packed(lengths)
    params.cu_seqlens_q, params.cu_seqlens_kv = params.cu_seqlens_q.cuda(), params.cu_seqlens_kv.cuda()
    with torch.no_grad():
        together = chunk(tokens, None, None, packed_seq_params=params)
        alone = torch.cat([chunk(row, None, None) for row in tokens.split(lengths, dim=1)], dim=1)
    assert (together.float() - alone.float()).abs().max() < 0.1 * alone.float().std()


def test_published_numbers_on_the_gpu(nccl, monkeypatch):
    """fp32 with the reference kernels: the same bounds as on a CPU."""
    if have_transformer_engine():
        pytest.skip("TE's attention has no fp32; the layers are compared in bf16 above")
    monkeypatch.setenv("JET_KERNELS", "reference")
    torch.backends.cuda.matmul.allow_tf32 = False
    model = model_from_hf(read_json(ORACLE / "config.json"))
    weights = hf_to_megatron(model, load_file(ORACLE / "model.safetensors"))
    expected, grads = load_file(ORACLE / "expected.safetensors"), load_file(ORACLE / "expected_grads.safetensors")
    step = train_step(model, nccl, expected["input_ids"].cuda(), tensors=weights)
    assert (step.logits.cpu() - expected["logits"]).abs().max() < 2e-4
    assert step.loss == pytest.approx(expected["loss"].item(), abs=1e-5)
    for tensor, grad in megatron_to_hf(model, step.grads).items():
        assert relative_error(grad, grads[f"grad.{tensor}"]) < 2e-4, tensor


def test_published_numbers_with_gpu_kernels(nccl):
    """The kernels a GPU uses, in bf16: the mean error is within a few per cent of the logits' spread (2.0)."""
    model = model_from_hf(read_json(ORACLE / "config.json"))
    weights = hf_to_megatron(model, load_file(ORACLE / "model.safetensors"))
    expected = load_file(ORACLE / "expected.safetensors")
    from megatron_jet.model.state import load_tensors

    chunks = build_model(model, nccl, dtype="bf16", init_seed=None)
    load_tensors(chunks, weights)
    with torch.no_grad():
        logits = chunks[0](expected["input_ids"].cuda(), None, None).float().cpu()
    assert (logits - expected["logits"]).abs().mean() < 0.06 * expected["logits"].std()
