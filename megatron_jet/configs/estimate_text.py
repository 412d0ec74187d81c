"""Estimates as plain text tables, for `tools/estimate.py` and the launcher's --dryrun."""

from collections.abc import Sequence

from megatron_jet.configs.cost import ModelCost, model_cost
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.run_estimate import RunEstimate
from megatron_jet.configs.stages import SEARCH_STAGES

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(count: float) -> str:
    """`1792.0 MiB`: binary units, one decimal, the next unit from 10 000 on."""
    unit = 0
    while abs(count) >= 10_000 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 else f"{count:,.1f} {_UNITS[unit]}"


def format_count(count: float) -> str:
    """`1.965B`, `2.03M`, `512`: decimal units as the field writes parameters and tokens."""
    for size, unit, digits in ((1e12, "T", 2), (1e9, "B", 3), (1e6, "M", 2), (1e3, "K", 1)):
        if abs(count) >= size:
            return f"{count / size:.{digits}f}{unit}"
    return f"{count:.0f}"


def format_seconds(seconds: float) -> str:
    """`45 s`, `7 min`, `3.2 h`, `12 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    grid = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in grid) for i in range(len(header))]
    lines = []
    for row in grid:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def model_text(name: str, model: ModelConfig, context: int) -> str:
    """Parameters, FLOPs and cache of one model at one context, by layer type."""
    cost = model_cost(model, context)
    lines = [
        f"{name}: {format_count(cost.total_params)} parameters, {model.num_layers} layers, hidden {model.hidden_size}",
        f"at {context} tokens: {cost.flops_per_token / 1e9:.2f} GFLOPs per token forward, "
        f"{format_bytes(cost.cache_bytes)} cache per sequence "
        f"(+ {format_bytes(cost.conv_state_bytes)} convolution state; K/V in 2 bytes, recurrent states in fp32)",
        f"weights: {format_bytes(2 * cost.total_params)} in bf16, {format_bytes(4 * cost.total_params)} in fp32",
        "",
        table(("layers", "count", "parameters", "MFLOPs/token", "cache/sequence"), _kind_rows(cost)),
    ]
    return "\n".join(lines)


def _kind_rows(cost: ModelCost) -> list[tuple[str, ...]]:
    rows = [
        (
            kind,
            str(part.layers),
            format_count(part.mixer_params),
            f"{part.flops_per_token / 1e6:,.1f}",
            format_bytes(part.cache_bytes),
        )
        for kind, part in sorted(cost.by_kind.items(), key=lambda item: -item[1].layers)
    ]
    mixer_flops = sum(part.flops_per_token for part in cost.by_kind.values())
    head_flops = cost.flops_per_token - mixer_flops - 2.0 * cost.mlp_params
    rows.append(("MLPs", "", format_count(cost.mlp_params), f"{2 * cost.mlp_params / 1e6:,.1f}", ""))
    rows.append(("embedding, head", "", format_count(cost.embedding_params), f"{head_flops / 1e6:,.1f}", ""))
    rows.append(("norms", "", format_count(cost.norm_params), "", ""))
    return rows


def run_text(estimate: RunEstimate) -> str:
    """Stages of a run with GPUs, tokens, GPU-hours, memory per GPU and disk."""
    rows = []
    for stage in estimate.stages:
        rows.append(
            (
                stage.stage,
                jobs_text(stage.jobs, len(stage.runs)),
                str(stage.gpus),
                format_count(stage.tokens),
                f"{stage.flops:.2e}",
                _hours(stage.gpu_hours),
                "-" if stage.paper_gpu_hours is None else _hours(stage.paper_gpu_hours),
                "-" if stage.memory is None else format_bytes(stage.memory.total),
                format_bytes(stage.disk_bytes),
            )
        )
    header = ("stage", "jobs", "GPUs", "tokens", "FLOPs", "GPU-hours", "paper", "memory/GPU", "disk")
    note = (
        f"GPU-hours at {estimate.utilisation:.0%} of {estimate.peak_tflops:g} TFLOP/s "
        "(model FLOPs, recomputation not counted)."
    )
    if any(stage.stage in SEARCH_STAGES for stage in estimate.stages):
        note += " Placement is assumed uniform; costs depend on the budgets only."
    return table(header, rows) + "\n" + note


def jobs_text(trained: int, candidates: int) -> str:
    """`9`, or `8 + 1 reused` where equal candidates of an earlier stage spare training."""
    return str(trained) if trained == candidates or not candidates else f"{trained} + {candidates - trained} reused"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}" if hours >= 0.05 else f"{hours:.2g}"
