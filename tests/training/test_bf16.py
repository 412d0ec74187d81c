"""Training in bf16 with every mixer of the registry: the trainer, resuming, supernets, layouts, the export."""

from pathlib import Path

import pytest
import torch

from megatron_jet.configs.training import OptimizerConfig, ParallelConfig
from megatron_jet.convert.global_checkpoint import GlobalCheckpoint
from megatron_jet.convert.hf_export import export_hf
from megatron_jet.convert.hf_package import load_for_causal_lm
from megatron_jet.convert.verify.compare import first_different, verify
from megatron_jet.model.builder import build_model
from megatron_jet.training.checkpoint import load_model
from megatron_jet.training.parallel import parallel_session
from megatron_jet.training.sampling import PathSampling
from mixers.mixer_cases import ENTRIES, KINDS, MIXER_SETTINGS, model_with
from training.test_trainer import assert_equal, train_case
from training.training_cases import LINEAR_ONLY, ONE

TP2, PP2 = ParallelConfig(tensor=2), ParallelConfig(pipeline=2)
STATIC = MIXER_SETTINGS | {"jet": MIXER_SETTINGS["jet"] | {"static_kernel": True}}
PLAN = tuple(ENTRIES[kind] for kind in KINDS)
PLAN += ("attn",) * (len(PLAN) % 2)  # two pipeline stages
FULL = ("attn",) * len(PLAN)
MIXERS = [entry for entry in PLAN if entry != "attn"]


def changes(plan: tuple[str, ...] = PLAN, **more) -> dict:
    """For `job`: a bf16 student with this plan and a teacher of full attention."""
    training = {"optimizer": OptimizerConfig(lr=3e-3, warmup_steps=1, weight_decay=0.1), **more.pop("training", {})}
    model = model_with(*plan, mixers=more.pop("mixers", MIXER_SETTINGS))
    return {"dtype": "bf16", "model": model, "teacher": model_with(*FULL), "training": training, **more}


def supernet() -> dict:
    """Every layer may be full attention or one of the mixers; steps draw plans."""
    choices = tuple(("attn", entry) if entry != "attn" else ("attn", MIXERS[0]) for entry in PLAN)
    sampling = PathSampling(choices, {0: 1.0, 2: 1.0, 3: 1.0}, seed=0)
    return changes(FULL, sampling=sampling, training={"trainable": LINEAR_ONLY})


@pytest.fixture(scope="module")
def straight(pool, tmp_path_factory):
    """An undisturbed run on two data-parallel ranks with sharded optimiser states: (folder, what rank 0 found)."""
    out = tmp_path_factory.mktemp("bf16")
    return out, pool.run(train_case, out, changes(), world_size=2)[0]


def final_checkpoint(out: Path) -> Path:
    return max((out / "run" / "checkpoints").glob("step-*")) / "model"


def test_every_mixer_learns(straight):
    out, (_, _, rows) = straight
    losses = [row["loss"] for row in rows]
    assert losses[-1] < losses[0], losses
    before, after = GlobalCheckpoint(out / "init"), GlobalCheckpoint(final_checkpoint(out))
    assert set(before) == set(after)
    still = set()
    for key in after:
        tensor = after.read(key)
        assert tensor.isfinite().all(), key
        assert tensor.dtype == (torch.float32 if key.endswith("A_log") else torch.bfloat16), key
        if torch.equal(before.read(key).to(tensor.dtype), tensor):
            still.add(key.rpartition(".")[2])
    # Between 4 and 8 bf16 numbers are 1/32 apart, more than six steps make of a dt_bias; its main copy moved.
    assert still <= {"dt_bias"}
    for layer in range(len(PLAN)):
        assert any(f"layers.{layer}.self_attention." in key for key in after)


def test_resume_is_bit_exact(pool, straight, tmp_path):
    assert_equal(pool.run(train_case, tmp_path, changes(), interrupt=3, world_size=2)[0], straight[1])


@pytest.mark.parametrize("parallel", [TP2, PP2], ids=["tp2", "pp2"])
def test_other_layouts_resume_bit_exactly_and_begin_alike(pool, straight, tmp_path, parallel):
    """Sums in another order round otherwise, which Adam soon makes visible. Of the first loss, a mean over tokens, it
    is less than one rounding (2^-8)."""
    case = changes(parallel=parallel)
    expected = pool.run(train_case, tmp_path / "a", case, layout=parallel)[0]
    assert_equal(pool.run(train_case, tmp_path / "b", case, interrupt=3, layout=parallel)[0], expected)
    assert expected[2][0]["loss"] == pytest.approx(straight[1][2][0]["loss"], rel=2**-8)


@pytest.mark.parametrize("case", ["supernet", "static"])
def test_resume_is_bit_exact_of_a(pool, tmp_path, case):
    """Supernet with undrawn paths; JetBlock with a static kernel, on one rank with whole optimiser states."""
    if case == "supernet":
        case, ranks = supernet(), 2
    else:
        case, ranks = changes(("jet", *FULL[1:]), mixers=STATIC, training={"distributed_optimizer": False}), 1
    expected = pool.run(train_case, tmp_path / "a", case, world_size=ranks)[0]
    assert_equal(pool.run(train_case, tmp_path / "b", case, interrupt=3, world_size=ranks)[0], expected)
    assert expected[2][-1]["loss"] < expected[2][0]["loss"]


def test_export_is_the_trained_model(straight, tmp_path):
    """In fp32 the two implementations agree as closely as fp32 weights do: the bf16 weights are carried over exactly.

    In bf16 each strays from that by its own roundings. A layer has about 16 (norms, projections, activations, products,
    two additions), each of at most 2^-9 of a value and in no order; 6 layers make sqrt(96) * 2^-9 = 0.02 of the logits'
    norm, before what norms and cancelling sums add. 0.05 is the bound of tests/mixers/test_conformance.py for this.
    """
    model = changes()["model"]
    checkpoint = final_checkpoint(straight[0])
    export_hf(checkpoint, tmp_path / "hf")
    assert first_different(verify(tmp_path / "hf", checkpoint, ONE), 1e-5) is None
    tokens = torch.randint(0, model.vocab_size, (2, 70), generator=torch.Generator().manual_seed(1))
    logits = {}
    with parallel_session(ONE, seed=0), torch.no_grad():
        for dtype in ("fp32", "bf16"):
            chunk = build_model(model, ONE, dtype=dtype, init_seed=None)
            load_model(chunk, checkpoint)
            logits[dtype] = chunk[0].eval()(tokens, None, None).float()
        exported = load_for_causal_lm(tmp_path / "hf").eval()
        assert exported.lm_head.weight.dtype == torch.bfloat16
        logits["export"] = exported(tokens).logits.float()
    for dtype in ("bf16", "export"):
        error = (logits[dtype] - logits["fp32"]).norm() / logits["fp32"].norm()
        assert 0 < error < 0.05, dtype
