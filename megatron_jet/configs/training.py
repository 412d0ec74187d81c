"""How a model is trained: layout over processes, optimiser, losses, schedule and intervals."""

import math
from typing import Literal

from pydantic import Field, model_validator

from megatron_jet.configs.base import Share, StrictModel, Weights
from megatron_jet.configs.errors import UserError

# Of the losses on logits (training/vocab_parallel.py), which the memory estimate counts: tokens per chunk, and how many
# fp32 tensors [chunk, vocabulary] exist at the same time at most.
LOGIT_CHUNK_TOKENS = 2048
LOGIT_CHUNK_TENSORS = 4


class ParallelConfig(StrictModel):
    """Layout of one model. The data-parallel size is world size / (tensor * pipeline)."""

    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)
    virtual_pipeline: int | None = Field(default=None, ge=2, description="model chunks per pipeline stage")
    context: int = Field(default=1, ge=1, description="reserved: values above 1 raise until context parallelism lands")
    sequence_parallel: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "ParallelConfig":
        if self.context > 1:
            raise UserError("parallel.context: context parallelism is not supported yet; use context=1")
        if self.sequence_parallel and self.tensor == 1:
            raise UserError("parallel.sequence_parallel needs parallel.tensor above 1")
        if self.virtual_pipeline and self.pipeline == 1:
            raise UserError("parallel.virtual_pipeline needs parallel.pipeline above 1")
        return self

    def data_parallel(self, world_size: int) -> int:
        """Data-parallel size. Raises UserError when the layout does not fit the world size."""
        model = self.tensor * self.pipeline
        if world_size % model:
            raise UserError(f"{world_size} processes do not divide by tensor*pipeline={model}")
        return world_size // model


class OptimizerConfig(StrictModel):
    """AdamW and its learning-rate schedule. Step counts are optimiser steps."""

    lr: float = Field(default=1e-3, gt=0)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="final lr / lr")
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    decay_fraction: float = Field(default=0.2, gt=0, le=1, description="wsd: last part of the steps, spent decaying")
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_grad: float = Field(default=1.0, ge=0, description="global gradient norm; 0 switches clipping off")


class LossConfig(StrictModel):
    """Weights of the loss terms. The paper names distillation only; weights and features are unpublished."""

    feature: float = Field(default=0.0, ge=0, description="MSE of the residual stream over the teacher's variance")
    layer_weights: tuple[Share, ...] | None = Field(
        default=None, min_length=1, description="feature weight per layer; None: equal"
    )
    kl: float = Field(default=0.0, ge=0)
    kl_direction: Literal["forward", "reverse"] = "forward"
    temperature: float = Field(default=1.0, gt=0)
    cross_entropy: float = Field(default=0.0, ge=0)

    @property
    def needs_teacher(self) -> bool:
        return self.feature > 0 or self.kl > 0

    @property
    def needs_logits(self) -> bool:
        """Whether the loss looks at the student's logits; one on features alone does not."""
        return self.kl > 0 or self.cross_entropy > 0

    @model_validator(mode="after")
    def _some_term(self) -> "LossConfig":
        if not (self.feature or self.kl or self.cross_entropy):
            raise UserError("loss: every weight is 0; set at least one of feature, kl, cross_entropy")
        if self.layer_weights is not None and not 0 < sum(self.layer_weights) < math.inf:
            raise UserError("loss.layer_weights: give non-negative weights, at least one above 0")
        return self


class TrainingConfig(StrictModel):
    """One training run. Tokens = steps * global_batch_size * seq_length."""

    steps: int = Field(gt=0)
    micro_batch_size: int = Field(default=1, gt=0, description="sequences per forward on one data-parallel rank")
    global_batch_size: int = Field(gt=0, description="sequences per optimiser step over all ranks")
    seq_length: int = Field(gt=0)
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig
    trainable: tuple[str, ...] = Field(
        default=("*",),
        min_length=1,
        description="fnmatch patterns of parameter names that train; '!pattern' freezes again",
    )
    validation_interval: int = Field(default=0, ge=0, description="steps between held-out validations; 0: none")
    validation_batches: int = Field(default=4, gt=0)
    checkpoint_interval: int = Field(
        default=0, ge=0, description="steps between checkpoints; 0: only on signals and at the end"
    )
    log_interval: int = Field(default=1, gt=0)
    keep_best: bool = Field(default=False, description="keep the checkpoint with the lowest validation loss as well")
    nan_limit: int = Field(default=3, ge=0, description="non-finite steps to skip before failing")
    distributed_optimizer: bool = True
    recompute: bool = Field(default=False, description="recompute activations layer by layer in the backward pass")

    @property
    def tokens(self) -> int:
        return self.steps * self.global_batch_size * self.seq_length

    def check_pipeline(self, parallel: ParallelConfig, data_parallel: int) -> None:
        """Raise UserError when the micro-batches of a step cannot go through this pipeline.

        With model chunks, as many of them as there are stages go through one chunk before the next.
        """
        count, stages = self.microbatches(data_parallel), parallel.pipeline
        if parallel.virtual_pipeline and count % stages:
            raise UserError(
                f"global_batch_size={self.global_batch_size} makes {count} micro-batches per step, and "
                f"parallel.virtual_pipeline needs a multiple of parallel.pipeline={stages}"
            )

    def microbatches(self, data_parallel: int) -> int:
        """Micro-batches per step and rank. Raises UserError when the batch does not divide."""
        per_pass = self.micro_batch_size * data_parallel
        if self.global_batch_size % per_pass:
            raise UserError(
                f"global_batch_size={self.global_batch_size} does not divide by "
                f"micro_batch_size*data_parallel={per_pass}"
            )
        return self.global_batch_size // per_pass


class DataConfig(StrictModel):
    """A prepared data directory (tools/prepare_data.py) and how its sources are mixed."""

    path: str = Field(
        min_length=1, description="prepared directory, or 'bundled' to prepare the tiny recipe's data inside the run"
    )
    blend: Weights[str] | None = Field(default=None, description="sampling weight per source; None: as in the data")
    train_split: str = "train"
    search_split: str = "search"
    heldout_split: str = "heldout"
