"""The protocol of throughput: batch search, order, medians, rooflines, and caches as large as predicted."""

import pytest
import torch

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.mixers.gated_delta_net import GatedDeltaNetConfig
from megatron_jet.configs.mixers.gla import GLAConfig
from megatron_jet.configs.mixers.jet_block import JetBlockConfig
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.recipes.known_models import jet_nemotron_2b_model, qwen3_1_7b
from megatron_jet.configs.stages import ThroughputConfig
from megatron_jet.convert.hf.cache import HybridCache
from megatron_jet.evaluation.throughput import session as session_module
from megatron_jet.evaluation.throughput.batch_search import is_out_of_memory, largest_batch, session_fits
from megatron_jet.evaluation.throughput.caches import addresses, new_cache, state_layers
from megatron_jet.evaluation.throughput.models import random_model
from megatron_jet.evaluation.throughput.paper import paper_generation, paper_ratios, published_name
from megatron_jet.evaluation.throughput.protocol import rates, run_interleaved, schedule
from megatron_jet.evaluation.throughput.roofline import Work, decode_work, predicted_cache_bytes, prefill_work
from megatron_jet.evaluation.throughput.session import Load, Session, Timing
from megatron_jet.evaluation.throughput.stages import fitting_run, measure_generation, measure_model

CPU = torch.device("cpu")
PLAIN = ModelConfig(
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=40,
    max_position_embeddings=256,
    initializer_range=0.6,  # so that tokens depend on what is cached, not on the last one alone
    layer_plan=("attn", "attn"),
)
JET = JetBlockConfig(num_heads=2, head_dim=6, expand_v=1.5, dconv_generator_reduction=2)
HYBRID = PLAIN.replace(
    num_layers=5,
    layer_plan=("jet", "attn", "swa:9", "gated_delta_net", "gla"),
    mixers={
        "jet": JET,
        "gated_delta_net": GatedDeltaNetConfig(num_heads=2, head_dim=6, expand_v=1.5, conv_size=3),
        "gla": GLAConfig(num_heads=2, head_dim=6, expand_v=1.5, gate_low_rank_dim=3),
    },
)


def times(*decode: float) -> list[Timing]:
    return [Timing(prefill=2 * seconds, decode=seconds) for seconds in decode]


@pytest.mark.parametrize("limit", [1, 2, 7, 8, 9, 100, 777, 1024])
def test_batch_search_finds_the_memory_limit(limit):
    tried = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found = largest_batch(fits, 1024)
    assert limit - limit // 16 <= found <= limit and found in tried
    assert len(tried) == len(set(tried)) <= 14
    assert max(tried) <= 1024


def test_batch_search_stops_at_its_limit_and_says_when_nothing_fits():
    assert largest_batch(lambda batch: True, 100) == 100
    assert largest_batch(lambda batch: True, 3) == 3
    with pytest.raises(UserError, match="not even a batch of one"):
        largest_batch(lambda batch: False, 1024)


def test_a_session_that_runs_out_of_memory_does_not_fit(monkeypatch):
    """As on a GPU: the allocator raises inside some layer, or ending the capture raises again after it."""
    model = random_model(PLAIN, "fp32", CPU)
    forward = model.forward

    def limited(input_ids, **options):
        if input_ids.shape[0] > 5:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            except RuntimeError:
                raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        if input_ids.shape[0] == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "forward", limited)
    assert largest_batch(lambda batch: session_fits(model, Load(16, batch, 8, 2), "eager"), 64) == 4


def test_other_errors_are_not_taken_for_lack_of_memory(monkeypatch):
    model = random_model(PLAIN, "fp32", CPU)
    monkeypatch.setattr(model, "forward", lambda **options: (_ for _ in ()).throw(RuntimeError("illegal access")))
    with pytest.raises(RuntimeError, match="illegal access"):
        session_fits(model, Load(16, 2, 8, 2), "eager")
    assert not is_out_of_memory(None) and is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"))


def test_turns_go_there_and_back():
    assert schedule(2, 3, 1) == [(0, 0), (1, 0), (1, 1), (0, 1), (0, 2), (1, 2)]
    order = schedule(2, 10, 5)
    assert [side for side, _ in order] == [0] * 5 + [1] * 10 + [0] * 5
    for side in (0, 1):
        assert [iteration for who, iteration in order if who == side] == list(range(10))


class Recorder:
    """A session that notes what is done to it."""

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log

    def __enter__(self):
        self.log.append(f"open {self.name}")
        return self

    def __exit__(self, *exc):
        self.log.append(f"close {self.name}")

    def run(self, seed: int) -> Timing:
        self.log.append(f"{self.name}{seed}")
        return Timing(0.0, float(seed))


def test_interleaved_together_and_one_at_a_time():
    log: list[str] = []
    sessions = [Recorder("a", log), Recorder("b", log)]
    found = run_interleaved(sessions, 2)
    assert log == ["open a", "open b", "a0", "b0", "b1", "a1", "close b", "close a"]
    assert [[t.decode for t in rows] for rows in found] == [[0.0, 1.0], [0.0, 1.0]]
    log.clear()
    run_interleaved(sessions, 4, turn=2)
    turns = "open a,a0,a1,close a,open b,b0,b1,b2,b3,close b,open a,a2,a3,close a"
    assert ",".join(log) == turns


def test_first_iterations_are_dropped_and_the_median_counts():
    found = rates(times(9.0, 8.0, 7.0, 1.0, 2.0, 4.0), Load(100, 3, 50, 10), dropped=3)
    assert found.generation == pytest.approx(3 * 10 / 2.0)
    assert found.prefill == pytest.approx(3 * 100 / 4.0)
    assert found.spread == pytest.approx((4.0 - 1.0) / 2.0)
    with pytest.raises(ValueError, match="leave none"):
        rates(times(1.0), Load(1, 1, 1, 1), dropped=1)


def test_decode_roofline_by_hand():
    """Two softmax layers, fp32: per step all weights once, and for 3 sequences the keys seen and one token written."""
    load = Load(context=10, batch_size=3, prefill_chunk=4, new_tokens=2)
    embedding = 40 * 16
    attention = 16 * (16 + 8 + 8) + (16 + 8 + 8) + 16 * 16  # q, k, v with bias, o
    params = embedding + 2 * (attention + 3 * 16 * 24 + 2 * 16) + 16
    token = 2 * 2 * (2 * 4) * 4  # layers, keys and values, heads * width, bytes
    work = decode_work(PLAIN, load, "fp32")
    assert work.bytes == 4 * params + 3 * token * ((11 + 12) / 2 + 1)
    untied = decode_work(PLAIN.replace(tie_word_embeddings=False), load, "fp32")
    assert untied.bytes == work.bytes  # a second matrix, but the look-up reads three rows of it
    assert decode_work(PLAIN, load, "bf16").bytes == work.bytes / 2


def test_decode_roofline_counts_states_twice_and_windows_once():
    load = Load(context=100, batch_size=1, prefill_chunk=100, new_tokens=1)
    model = PLAIN.replace(layer_plan=("jet", "swa:9"), mixers={"jet": JET})
    state, conv = 2 * 6 * 9 * 4, 3 * (2 * 9) * 2
    window = 2 * 8 * 2
    weights = decode_work(model, Load(100, 0, 100, 1), "bf16").bytes
    assert decode_work(model, load, "bf16").bytes - weights == 2 * (state + conv) + 9 * window + window


def test_prefill_roofline_by_hand():
    load = Load(context=8, batch_size=3, prefill_chunk=4, new_tokens=2)
    matrices = 2 * (2 * 16 * (16 + 8) + 3 * 16 * 24)  # both layers: q, k, v, o and the MLP
    scores = 2 * 4 * 16 * (8 + 1) / 2  # both layers: q k and p v over the mean number of keys
    head = 2 * 16 * 40
    assert prefill_work(PLAIN, load, "fp32").flops == 3 * (8 * (2 * matrices + scores) + 2 * head)
    assert Work(bytes=100.0, flops=30.0).seconds(10.0, 2.0) == 15.0


def test_prediction_is_the_paper_s_at_64k():
    """FACTS: 154 MiB in the paper, 157.25 by the formulas; convolution states come on top."""
    conv = 24 * 3 * 12 * 256 * 2
    assert predicted_cache_bytes(jet_nemotron_2b_model(), 65536, "bf16") == 157.25 * 2**20 + conv
    assert predicted_cache_bytes(qwen3_1_7b(), 65536, "bf16") == 7168 * 2**20


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [PLAIN, HYBRID], ids=["transformers", "hybrid"])
def test_cache_is_as_large_as_predicted(shape, dtype):
    load = Load(context=37, batch_size=3, prefill_chunk=8, new_tokens=4)
    with Session(random_model(shape, dtype, CPU), load) as session:
        session.run(seed=0)
        assert session.cache_bytes == 3 * predicted_cache_bytes(shape, load.longest, dtype)


@pytest.mark.parametrize("shape", [PLAIN, HYBRID], ids=["transformers", "hybrid"])
def test_the_tokens_timed_are_the_model_s(shape):
    """Twice the same from one cache, and equal to what the model says without a cache."""
    torch.manual_seed(0)
    model = random_model(shape, "fp32", CPU)
    load = Load(context=21, batch_size=2, prefill_chunk=8, new_tokens=5)
    with Session(model, load) as session:
        session.run(seed=3)
        first = session.tokens()
        session.run(seed=4)
        other = session.tokens()
        session.run(seed=3)
        assert torch.equal(session.tokens(), first) and not torch.equal(other, first)
        tokens = session._random_tokens(load.context, seed=3)
    with torch.no_grad():
        for _ in range(load.new_tokens + 1):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    # The prefill gives the first new token, each decoding step the next one.
    assert torch.equal(tokens[:, load.context + 1 :].T, first)


@pytest.mark.parametrize(
    ("window", "chunk", "context"),
    [
        (150, 7, 161),  # the ring holds more than what a chunk and its spare room take; windows are no multiple of it
        (150, 7, 143),  # a context shorter than the window, which the new tokens fill
        (149, 16, 145),  # a last chunk of one token
        (500, 16, 90),  # a window that is never filled
    ],
)
def test_chunks_small_against_the_window(window, chunk, context):
    """Opening a session goes behind a context that never ran, so a window's ring must be whole by then."""
    torch.manual_seed(0)
    shape = PLAIN.replace(layer_plan=("attn", f"swa:{window}"))
    model = random_model(shape, "fp32", CPU)
    load = Load(context, batch_size=2, prefill_chunk=chunk, new_tokens=12)
    with Session(model, load) as session:
        assert session.cache_bytes == 2 * predicted_cache_bytes(shape, load.longest, "fp32")
        session.run(seed=3)
        found, tokens = session.tokens(), session._random_tokens(context, seed=3)
    with torch.no_grad():
        for _ in range(load.new_tokens + 1):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens[:, context + 1 :].T, found) and len(set(found.flatten().tolist())) > 2


@pytest.mark.parametrize("new_tokens", [5, 100], ids=["few", "more_than_the_prompt"])
@pytest.mark.parametrize("shape", [PLAIN, HYBRID], ids=["transformers", "hybrid"])
def test_buffers_stay_where_they_are(monkeypatch, shape, new_tokens):
    """What CUDA graphs rely on: after opening, runs allocate no cache; prefill leaves the states at one address."""
    torch.manual_seed(0)
    load = Load(context=21, batch_size=2, prefill_chunk=8, new_tokens=new_tokens)
    places, model = [], random_model(shape, "fp32", CPU)

    class Replay:
        """Stands in for recorded graphs: runs the steps, after checking where they start and read."""

        def __init__(self, step, steps, stream):
            self.step, self.steps = step, steps
            for i in range(steps):
                places.append(session._cache.get_seq_length())
                step(i)

        def replay(self, steps=None):
            for layer in state_layers(session._cache):
                assert all(layer.tensors()[name] is x for name, x in layer.home.items())
            for i in range(steps or self.steps):
                self.step(i)

    with Session(model, load, "eager") as eager:
        eager.run(seed=3)
        expected = eager.tokens()
    monkeypatch.setattr(session_module, "DecodeGraphs", Replay)
    session = Session(model, load, "graph")
    with session:
        assert places == list(range(load.context, load.longest))
        before = addresses(session._cache)
        for seed in (2, 3):
            session.run(seed)
            assert addresses(session._cache) == before
        assert torch.equal(session.tokens(), expected)


def test_a_hybrid_cache_is_made_for_hybrids_only():
    assert isinstance(new_cache(random_model(HYBRID, "fp32", CPU).config, 8), HybridCache)
    sliding = random_model(PLAIN, "fp32", CPU).config
    sliding.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(UserError, match="sliding windows cannot be timed"):
        new_cache(sliding, 8)


def test_stages_get_a_figure_per_context_and_a_clear_error():
    model = random_model(HYBRID, "fp32", CPU)
    settings = ThroughputConfig(contexts=(16, 24), batch_size=2, prefill_chunk=8, new_tokens=2, iterations=3, dropped=1)
    speed = measure_model(model, settings)
    assert set(speed.generation) == set(speed.prefill) == {"16", "24"}
    assert speed.batch_size == {"16": 2, "24": 2}
    assert all(value > 0 for value in [*speed.generation.values(), *speed.prefill.values()])
    with pytest.raises(UserError, match="throughput.decode=graph: CUDA graphs need a GPU"):
        measure_model(model, settings.replace(decode="graph"))


@pytest.mark.parametrize("shape", [PLAIN, HYBRID])
def test_stages_time_contexts_beyond_the_model_s_positions(shape):
    """As the paper does for 4B: 64K tokens with a teacher made for 32K. A stage must not end in this after training."""
    assert shape.max_position_embeddings < 300
    settings = ThroughputConfig(contexts=(300,), batch_size=1, prefill_chunk=64, new_tokens=2, iterations=2, dropped=1)
    assert measure_generation(shape, settings, "fp32").generation["300"] > 0


@pytest.mark.parametrize(("room", "batch"), [(128, 128), (100, 100), (32, 32), (1, 1), (0, None)])
def test_a_stage_runs_the_largest_batch_that_fits(room, batch):
    """A device with room for so many sequences; opening a session may promise a few too many."""

    def run(load):
        if load.batch_size > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ["timing"]

    found = fitting_run(Load(64, 128, 8, 2), run, lambda load: load.batch_size <= room)
    assert (found is None) if batch is None else found[1] == ["timing"]
    if batch is not None:
        assert room * 15 / 16 <= found[0].batch_size <= room
        assert fitting_run(Load(64, 128, 8, 2), run, lambda load: load.batch_size <= room + 3) is not None
    with pytest.raises(RuntimeError, match="broken"):
        fitting_run(Load(64, 4, 8, 2), lambda load: broken(), lambda load: True)


def broken():
    raise RuntimeError("a broken kernel")


def test_the_paper_s_figures_stand_beside_its_own_models_only():
    jet, qwen = jet_nemotron_2b_model(), qwen3_1_7b()
    assert paper_ratios(jet, qwen, 65536) == (2.54, 47.5)
    assert paper_ratios(qwen, jet, 65536) is None and paper_ratios(jet, qwen, 5000) is None
    assert paper_generation(jet, 65536) == 2885 and paper_generation(jet, 4096) is None
    assert published_name(jet.replace(max_position_embeddings=400000)) == "Jet-Nemotron-2B"
    assert published_name(HYBRID) is None and paper_generation(HYBRID, 65536) is None
