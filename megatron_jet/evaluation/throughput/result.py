"""What `tools/throughput.py` writes. Everything that a clock gave, or follows from it, is under `measured`."""

from typing import Any

from pydantic import Field

from megatron_jet.configs.base import ResultModel
from megatron_jet.configs.files import SCHEMA_VERSION


class ModelRecord(ResultModel):
    """One of the models compared."""

    name: str
    published: str | None = Field(description="the published model of this shape")
    params: int
    random_weights: bool
    layers: dict[str, int] = Field(description="number of layers by mixer")
    attention: str
    decode: str = Field(description="eager or graph")


class RowMeasured(ResultModel):
    """Speeds in tokens per second over the whole batch."""

    prefill_tokens_per_second: float
    generation_tokens_per_second: float
    spread: float = Field(description="(longest - shortest) / median of the decoding times that count")
    cache_bytes: int = Field(description="of one sequence, as allocated")
    prefill_roofline: float = Field(description="tokens per second at the device's own measured rates")
    generation_roofline: float

    @property
    def prefill_share(self) -> float:
        return self.prefill_tokens_per_second / self.prefill_roofline

    @property
    def generation_share(self) -> float:
        return self.generation_tokens_per_second / self.generation_roofline


class Row(ResultModel):
    """One model at one context."""

    model: str
    context: int
    batch_size: int
    prefill_chunk: int
    predicted_cache_bytes: int = Field(description="of one sequence at the end of generation")
    decode_bytes: float = Field(description="that one step moves at least, over the whole batch")
    prefill_flops: float = Field(description="of the whole prefill and batch")
    paper_generation: float | None = Field(description="the paper's tokens per second, on an H100")
    measured: RowMeasured


class Ratio(ResultModel):
    """First model over second, at one context."""

    context: int
    paper_prefill: float | None = None
    paper_generation: float | None = None
    measured: dict[str, float] = Field(description="prefill, generation")


class Skipped(ResultModel):
    """What could not be measured."""

    model: str
    context: int
    reason: str


class ThroughputResult(ResultModel):
    """A whole comparison."""

    schema_version: int = SCHEMA_VERSION
    kind: str = "throughput"
    date: str
    command: str
    device: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    models: list[ModelRecord]
    rows: list[Row] = Field(default_factory=list)
    ratios: list[Ratio] = Field(default_factory=list)
    skipped: list[Skipped] = Field(default_factory=list)
    measured: dict[str, float] = Field(description="the device's bytes and FLOPs per second")

    def row(self, model: str, context: int) -> Row | None:
        """That model's row at that context, if it was measured."""
        return next((row for row in self.rows if (row.model, row.context) == (model, context)), None)
