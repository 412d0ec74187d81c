"""A comparison as tables for a terminal."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from megatron_jet.configs.estimate_text import format_bytes
from megatron_jet.evaluation.throughput.result import Row, ThroughputResult

SPEED_COLUMNS = (
    "context",
    "model",
    "batch",
    "chunk",
    "prefill",
    "of roofline",
    "generation",
    "of roofline",
    "spread",
    "paper",
)
CACHE_COLUMNS = ("context", "model", "measured", "predicted")


def table(result: ThroughputResult) -> Group:
    """Speeds and caches of every row, then the ratios, then what was left out."""
    device, measured = result.device["name"], result.measured
    rates = f"{measured['bytes_per_second'] / 1e9:,.1f} GB/s, {measured['flops_per_second'] / 1e12:,.2f} TFLOP/s"
    speeds = _grid(f"Tokens per second over the whole batch, medians ({device}: {rates} measured)", SPEED_COLUMNS)
    caches = _grid("Cache of one sequence at the end", CACHE_COLUMNS)
    for row in result.rows:
        speeds.add_row(*map(Text, _speed_cells(row)))
        sizes = row.measured.cache_bytes, row.predicted_cache_bytes
        caches.add_row(*map(Text, [f"{row.context}", row.model, *map(format_bytes, sizes)]))
    parts = [speeds, caches]
    if result.ratios:
        parts.append(_ratios(result))
    parts += [Text(f"{row.model} at {row.context} tokens left out: {row.reason}") for row in result.skipped]
    return Group(*parts)


def _grid(title: str, columns: tuple[str, ...]) -> Table:
    # Text throughout: in a plain string rich takes [/b] of a model's name for an instruction.
    grid = Table(title=Text(title), title_justify="left")
    for column in columns:
        grid.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    return grid


def _speed_cells(row: Row) -> list[str]:
    measured = row.measured
    return [
        f"{row.context}",
        row.model,
        f"{row.batch_size}",
        f"{row.prefill_chunk}",
        f"{measured.prefill_tokens_per_second:,.0f}",
        f"{measured.prefill_share:.0%}",
        f"{measured.generation_tokens_per_second:,.0f}",
        f"{measured.generation_share:.0%}",
        f"{measured.spread:.0%}",
        "-" if row.paper_generation is None else f"{row.paper_generation:,.0f}",
    ]


def _ratios(result: ThroughputResult) -> Table:
    first, second = (model.name for model in result.models)
    grid = _grid(f"{first} over {second}", ("context", "prefill", "paper", "generation", "paper"))
    for ratio in result.ratios:
        measured = ratio.measured
        cells = [measured["prefill"], ratio.paper_prefill, measured["generation"], ratio.paper_generation]
        grid.add_row(f"{ratio.context}", *("-" if cell is None else f"{cell:.2f}" for cell in cells))
    return grid
