"""The modeling code on a GPU: the published numbers in fp32, and fla's kernels against plain PyTorch in bf16."""

import pytest
import torch

from convert.hf_cases import GATED_DELTA_NET, GLA, JET, config_dict, load_oracle, random_model, random_tokens
from megatron_jet.convert.hf.cache import HybridCache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES = {"head_dim": 64, "expand_v": 2}  # that fla's kernels are made for


def test_published_numbers(monkeypatch):
    """Plain PyTorch in true fp32 (no TF32), with the CPU test's tolerance."""
    monkeypatch.setenv("JET_HF_KERNELS", "reference")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model, expected, _ = load_oracle()
    model.cuda()
    with torch.no_grad():
        logits = model(expected["input_ids"].cuda()).logits.cpu()
    assert (logits - expected["logits"]).abs().max() < 2e-4


@pytest.mark.parametrize("padded", [False, True])
def test_fla_agrees_with_plain_pytorch(monkeypatch, padded):
    """Prefill in two chunks and eight decode steps; bf16 rounds to 3 digits, and five layers add that up."""
    linear = {"jet": {**JET, **SIZES}, "gated_delta_net": {**GATED_DELTA_NET, **SIZES}, "gla": {**GLA, **SIZES}}
    config = config_dict(efficient_attention_config={**linear, "swa": {"window_size": 5}})
    model = random_model(config, dtype=torch.bfloat16).cuda()
    tokens = random_tokens(3, 200).cuda()
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :70], mask[1, :3] = 0, 0
    logits = {}
    for kernels in ("reference", "fla"):
        monkeypatch.setenv("JET_HF_KERNELS", kernels)
        cache, end, out = HybridCache(model.config), 0, []
        with torch.no_grad():
            for part in tokens.split([150, 42, *[1] * 8], 1):
                end += part.shape[1]
                out.append(model(part, attention_mask=mask[:, :end], past_key_values=cache).logits.float())
        logits[kernels] = torch.cat(out, 1)[mask.bool()]
    assert (logits["fla"] - logits["reference"]).norm() < 0.05 * logits["reference"].norm()
