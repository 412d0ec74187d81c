"""Throughput on a GPU: CUDA graphs decode what eager decoding does, again and again, and a batch is found."""

import pytest
import torch

from megatron_jet.configs.mixers.gated_delta_net import GatedDeltaNetConfig
from megatron_jet.configs.mixers.gla import GLAConfig
from megatron_jet.configs.mixers.jet_block import JetBlockConfig
from megatron_jet.configs.model import ModelConfig
from megatron_jet.evaluation.device import measure_rates
from megatron_jet.evaluation.throughput.batch_search import largest_batch, session_fits
from megatron_jet.evaluation.throughput.models import choose_attention, random_model
from megatron_jet.evaluation.throughput.protocol import run_interleaved
from megatron_jet.evaluation.throughput.roofline import predicted_cache_bytes
from megatron_jet.evaluation.throughput.session import Load, Session

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PLAIN = ModelConfig(
    hidden_size=256,
    intermediate_size=512,
    num_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=1000,
    max_position_embeddings=8192,
    layer_plan=("attn",) * 4,
)
SIZES = {"num_heads": 2, "head_dim": 64, "expand_v": 2.0}
HYBRID = PLAIN.replace(
    num_layers=5,
    layer_plan=("jet", "attn", "swa:100", "gated_delta_net", "gla"),
    mixers={"jet": JetBlockConfig(**SIZES), "gated_delta_net": GatedDeltaNetConfig(**SIZES), "gla": GLAConfig(**SIZES)},
)
SHAPES = {"transformers": PLAIN, "hybrid": HYBRID}


def model(name: str):
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    return random_model(SHAPES[name], "bf16", device, choose_attention("auto", device))


@pytest.mark.parametrize("name", SHAPES)
def test_graphs_decode_like_eager(name):
    """Three prompts with one recording: the third's tokens are no leftovers of the first two."""
    made, load = model(name), Load(context=500, batch_size=4, prefill_chunk=128, new_tokens=24)
    tokens = {}
    for decode in ("eager", "graph"):
        with Session(made, load, decode) as session:
            tokens[decode] = []
            for seed in range(3):
                timing = session.run(seed)
                assert timing.prefill > 0 and timing.decode > 0
                tokens[decode].append(session.tokens())
            assert session.cache_bytes == 4 * predicted_cache_bytes(SHAPES[name], load.longest, "bf16")
    for eager, graph in zip(tokens["eager"], tokens["graph"]):
        # One token that rounding decides differently changes the rest of its row.
        assert (eager[0] == graph[0]).all() and (eager == graph).float().mean() > 0.7
    assert not torch.equal(tokens["graph"][0], tokens["graph"][1])


def test_graphs_are_faster_than_eager():
    made, load = model("hybrid"), Load(context=500, batch_size=4, prefill_chunk=500, new_tokens=32)
    seconds = {}
    for decode in ("eager", "graph"):
        (timings,) = run_interleaved([Session(made, load, decode)], 4, turn=4)
        seconds[decode] = min(timing.decode for timing in timings)
    assert seconds["graph"] < seconds["eager"]


def test_batch_search_meets_the_real_allocator():
    """With 2 GiB to use, some batch fits, twice that does not, and the memory comes back."""
    made = model("transformers")
    device = torch.device("cuda", 0)
    assert session_fits(made, Load(64, 1, 64, 4), "graph")  # libraries take their own memory at first use
    before = torch.cuda.memory_allocated(device)
    torch.cuda.set_per_process_memory_fraction(2**31 / torch.cuda.get_device_properties(device).total_memory, device)
    try:
        found = largest_batch(lambda n: session_fits(made, Load(4096, n, 64, 4), "graph"), 4096)
        assert 1 < found < 4096
        assert not session_fits(made, Load(4096, 2 * found, 64, 4), "graph")
        (timings,) = run_interleaved([Session(made, Load(4096, found, 64, 4))], 1, turn=1)
        assert len(timings) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert torch.cuda.memory_allocated(device) <= before + 2**20


def test_rates_of_the_device_are_plausible():
    rates = measure_rates(torch.device("cuda", 0), torch.bfloat16)
    assert rates.bytes_per_second > 5e10 and rates.flops_per_second > 1e12
