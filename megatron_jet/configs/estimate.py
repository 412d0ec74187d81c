"""What a model costs to hold and to train: memory by part, FLOPs per trained token. No torch, no weights.

Memory follows Megatron-Core's own buffers: weights in the training type, gradients in fp32, and with the distributed
optimiser fp32 master weights and two Adam moments spread over the data-parallel ranks. Activations are counted from the
widths of what the backward pass keeps, logits from the tensors that exist at the same time. Left out: workspaces of
kernels and NCCL, and what the allocator cannot use. None of it has been compared with a GPU.
"""

from fnmatch import fnmatchcase

from megatron_jet.configs.base import ResultModel
from megatron_jet.configs.cost import ModelCost, model_cost
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.training import (
    LOGIT_CHUNK_TENSORS,
    LOGIT_CHUNK_TOKENS,
    ParallelConfig,
    TrainingConfig,
)

GRADIENT_BYTES = 4
MOMENT_BYTES = 8
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}

# A parameter name that stands for each group when `trainable` patterns are matched.
_EMBEDDING = "embedding.word_embeddings.weight"
_MLP = "decoder.layers.0.mlp.linear_fc1.weight"
_NORM = "decoder.layers.0.input_layernorm.weight"
_SOFTMAX = "decoder.layers.0.self_attention.linear_qkv.weight"
_LINEAR = "decoder.layers.0.self_attention.in_proj.weight"


def is_trainable(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a parameter trains: the last pattern that matches decides, '!pattern' freezes again, no match freezes."""
    trains = False
    for pattern in patterns:
        if fnmatchcase(name, pattern.removeprefix("!")):
            trains = not pattern.startswith("!")
    return trains


def trainable_params(model: ModelConfig, patterns: tuple[str, ...]) -> int:
    """Parameters that `patterns` train, by whole groups (embedding, MLPs, norms, mixers of each kind)."""
    cost = model_cost(model, 1)
    groups = [(_EMBEDDING, cost.embedding_params), (_MLP, cost.mlp_params), (_NORM, cost.norm_params)]
    groups += [
        (_SOFTMAX if model.mixer_of(_entry(model, kind)).is_softmax else _LINEAR, part.mixer_params)
        for kind, part in cost.by_kind.items()
    ]
    return sum(count for name, count in groups if is_trainable(name, patterns))


def _entry(model: ModelConfig, kind: str) -> str:
    return next(entry for entry in model.layer_plan if entry.partition(":")[0] == kind)


class MemoryEstimate(ResultModel):
    """Bytes on one GPU while training."""

    weights: int
    teacher: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.teacher + self.gradients + self.optimizer + self.activations + self.logits


def training_memory(
    model: ModelConfig,
    teacher: ModelConfig | None,
    training: TrainingConfig,
    parallel: ParallelConfig,
    dtype: str,
    world_size: int,
) -> MemoryEstimate:
    """Memory of one GPU in one training run.

    Args:
        model: the model that trains.
        teacher: the frozen model it is distilled from, at the same layout; ignored when the loss needs none.
        dtype: "fp32" or "bf16", the type of weights and activations.
        world_size: GPUs of the run.
    """
    width = WEIGHT_BYTES[dtype]
    shard = parallel.tensor * parallel.pipeline
    replicas = parallel.data_parallel(world_size)
    trained = trainable_params(model, training.trainable)
    has_teacher = teacher is not None and training.loss.needs_teacher
    master = 0 if dtype == "fp32" else 4
    optimizer = trained * (MOMENT_BYTES + master) // shard
    streams = 2 if has_teacher and training.loss.feature else 1
    return MemoryEstimate(
        weights=model_cost(model, 1).total_params * width // shard,
        teacher=model_cost(teacher, 1).total_params * width // shard if has_teacher else 0,
        gradients=trained * GRADIENT_BYTES // shard,
        optimizer=optimizer // replicas if training.distributed_optimizer else optimizer,
        activations=_activation_bytes(model, training, parallel, width, streams),
        logits=_logit_bytes(model, training, width) // parallel.tensor,
    )


def _logit_bytes(model: ModelConfig, training: TrainingConfig, width: int) -> int:
    """Peak of the logits: the teacher's and the student's beside one chunk of the losses in fp32. A loss on features
    alone needs none."""
    loss = training.loss
    if not loss.needs_logits:
        return 0
    tokens = training.seq_length * training.micro_batch_size
    whole = tokens * model.vocab_size * width
    chunk = min(tokens, LOGIT_CHUNK_TOKENS) * model.vocab_size * 4 * LOGIT_CHUNK_TENSORS
    return whole * (2 if loss.kl else 1) + chunk


def _activation_bytes(
    model: ModelConfig, training: TrainingConfig, parallel: ParallelConfig, width: int, streams: int
) -> int:
    """Kept activations of one rank. With recomputation: every layer's input, and one whole layer at a time.

    A layer keeps about six residual-wide tensors, the three MLP tensors, and what its mixer projects to; the last is
    its parameter count over the hidden size (the sum of its projections' widths). 1F1B keeps the micro-batches of all
    `pipeline` stages on the first stage, which cancels the division of the layers by `pipeline`.
    """
    tokens = training.seq_length * training.micro_batch_size
    hidden = model.hidden_size
    kept = []
    for i in range(model.num_layers):
        mixer_width = model.mixer(i).num_params(model.shape) / hidden
        split = (3 * model.intermediate_size + mixer_width) / parallel.tensor
        residual = 6 * hidden / (parallel.tensor if parallel.sequence_parallel else 1)
        kept.append(residual + split)
    if training.recompute:
        per_token = streams * model.num_layers * hidden + max(kept)
    else:
        per_token = sum(kept) + (streams - 1) * model.num_layers * hidden
    return int(tokens * width * per_token)


def training_flops_per_token(model: ModelConfig, teacher: ModelConfig | None, training: TrainingConfig) -> float:
    """FLOPs that one trained token needs: forward, gradients of activations, gradients of what trains, the teacher's
    forward. Recomputation is not counted (the usual definition of model FLOPs utilisation). The heads work only where
    the loss needs their logits."""
    loss = training.loss
    cost = model_cost(model, training.seq_length)
    forward = cost.flops_per_token - (0 if loss.needs_logits else _head_flops(model))
    weight_gradients = cost.flops_per_token * _trainable_share(model, cost, training.trainable)
    teaching = 0.0
    if teacher and loss.needs_teacher:
        teaching = model_cost(teacher, training.seq_length).flops_per_token - (0 if loss.kl else _head_flops(teacher))
    return 2 * forward + weight_gradients + teaching


def _head_flops(model: ModelConfig) -> float:
    return 2.0 * model.hidden_size * model.vocab_size


def _trainable_share(model: ModelConfig, cost: ModelCost, patterns: tuple[str, ...]) -> float:
    """Share of the matrix work whose weights train. The LM head works even when tied, so it counts as a matrix."""
    head = model.hidden_size * model.vocab_size
    matrices = cost.total_params - cost.embedding_params + head
    trained = trainable_params(model, patterns)
    if is_trainable(_EMBEDDING, patterns):
        trained += head - cost.embedding_params
    return trained / matrices
