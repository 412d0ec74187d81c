"""A whole PostNAS run in seconds: a random teacher of four small layers, little data, a few steps per stage."""

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_jet.configs.overrides import dump_yaml
from megatron_jet.configs.recipes.tiny import DISTILL, LINEAR_ONLY, tiny
from megatron_jet.configs.run import RunConfig, TeacherConfig
from megatron_jet.configs.stages import EvalConfig, GridPoint, ThroughputConfig
from megatron_jet.configs.training import DataConfig, OptimizerConfig, TrainingConfig
from megatron_jet.data.prepare import Request, prepare
from megatron_jet.tasks import vocabulary as vocab
from megatron_jet.teacher.model import save_tokenizer

LAYERS = 4
EVAL = EvalConfig(samples=6, batch_size=4)
ANALYTIC = ThroughputConfig(mode="analytic", contexts=(64,), batch_size=2)


def write_teacher(path: Path) -> None:
    """A random Qwen2 model in the teacher's vocabulary, with its tokenizer."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab.VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=vocab.END_OF_TEXT,
            eos_token_id=vocab.END_OF_TEXT,
            pad_token_id=vocab.END_OF_TEXT,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms that matter
            else:
                parameter.mul_(4)
    model.save_pretrained(path)
    save_tokenizer(path)


def write_data(path: Path, tokenizer: Path) -> None:
    """Some text and recall and choice samples of 64 tokens."""
    counts = {"train": 40, "search": 12, "heldout": 12}
    prepare(
        Request(
            inputs=(),
            tokenizer=tokenizer,
            seq_length=64,
            stdlib_bytes={"train": 30_000, "search": 6_000, "heldout": 6_000},
            synthetic=("recall", "choice"),
            samples=counts,
        ),
        path,
    )


def training(steps: int, **changes) -> TrainingConfig:
    base = TrainingConfig(
        steps=steps,
        micro_batch_size=2,
        global_batch_size=4,
        seq_length=64,
        optimizer=OptimizerConfig(lr=1e-3),
        loss=DISTILL,
        trainable=LINEAR_ONLY,
        checkpoint_interval=2,
    )
    return base.replace(**changes)


def config(root: Path, **changes) -> RunConfig:
    """The tiny recipe shrunk, with teacher and data under `root` (made by `write_inputs`)."""
    base = tiny()
    small = {"num_heads": 2, "head_dim": 8, "expand_v": 2.0}
    mixers = {name: mixer.replace(**small) for name, mixer in base.mixers.items()}
    whole = ("*.self_attention.*",)
    shrunk = base.replace(
        teacher=TeacherConfig(path=str(root / "teacher")),
        data=DataConfig(path=str(root / "data")),
        mixers=mixers,
        placement=base.placement.replace(
            training=training(4),
            linear="gla",
            compare_training=training(2),
            full_layers={0: 1, 1: 2, 2: 1},
            budget=1,
            beam_width=2,
            swa_budget=1,
            swa_window=8,
            eval=EVAL,
        ),
        block_selection=base.block_selection.replace(training=training(2), throughput=ANALYTIC, eval=EVAL),
        new_block=base.new_block.replace(training=training(2), throughput=ANALYTIC, eval=EVAL),
        hardware_search=base.hardware_search.replace(
            training=training(2),
            grid=(GridPoint(d_k=8, d_v=16, heads=2), GridPoint(d_k=16, d_v=8, heads=2)),
            throughput=ANALYTIC.replace(also_timed=True, new_tokens=2, iterations=2),
            eval=EVAL,
        ),
        stage1=base.stage1.replace(
            training=training(4, trainable=whole, validation_interval=2), eval=EVAL, init="teacher"
        ),
        stage2=base.stage2.replace(training=training(3, trainable=("*",), validation_interval=0), eval=EVAL),
        evaluate=base.evaluate.replace(eval=EVAL, throughput=ANALYTIC.replace(contexts=(64, 128))),
    )
    return shrunk.replace(**changes)


def write_inputs(root: Path) -> None:
    """Teacher and data that `config` refers to."""
    write_teacher(root / "teacher")
    write_data(root / "data", root / "teacher")


def open_run(root: Path, name: str, **changes) -> Path:
    """A run directory as the launcher makes it."""
    run = root / name
    run.mkdir()
    (run / "config.yaml").write_text(dump_yaml(config(root, **changes)))
    return run
