"""Prefill and generation by context, like the paper's figure 6: speeds of the models, and their ratio above them."""

import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from megatron_jet.evaluation.report.plot_style import ACCENT, FINAL, INK, TEACHER, figure
from megatron_jet.evaluation.report.plots_models import context_text
from megatron_jet.evaluation.throughput.result import ThroughputResult

PANELS = (("prefill", "Prefill, tokens/s"), ("generation", "Generation, tokens/s"))


def plot(result: ThroughputResult, path: str | Path) -> None:
    """Write the figure; .svg, .png or .pdf by its name. Replaces an old one only when the new one is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    with figure(1, 2, 3.1) as (made, axes_list):
        for axes, (kind, title) in zip(axes_list, PANELS):
            _panel(axes, result, kind)
            axes.set_title(title)
        lines, labels = axes_list[0].get_legend_handles_labels()
        made.legend(lines, labels, loc="outside lower center", ncols=len(labels))
        made.savefig(temporary, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    os.replace(temporary, path)


def _panel(axes: Axes, result: ThroughputResult, kind: str) -> None:
    names = [model.name for model in result.models]
    colors = (FINAL, TEACHER) if len(names) > 1 else (FINAL,)
    tops: dict[int, float] = {}
    for name, color in zip(names, colors):
        rows = [row for row in result.rows if row.model == name]
        contexts = [row.context for row in rows]
        speeds = [getattr(row.measured, f"{kind}_tokens_per_second") for row in rows]
        limits = [getattr(row.measured, f"{kind}_roofline") for row in rows]
        axes.plot(contexts, speeds, "o-", ms=5, color=color, label=name)
        axes.plot(contexts, limits, ":", color=color, lw=1.1, label=f"{name}, roofline")
        for context, speed in zip(contexts, speeds):
            tops[context] = max(speed, tops.get(context, 0.0))
    for ratio in result.ratios:
        axes.annotate(
            f"{ratio.measured[kind]:.2g}×",
            (ratio.context, tops[ratio.context]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=INK,
        )
        paper = getattr(ratio, f"paper_{kind}")
        if paper is not None:
            axes.annotate(
                f"paper {paper:g}×",
                (ratio.context, tops[ratio.context]),
                xytext=(0, 17),
                textcoords="offset points",
                ha="center",
                fontsize=6.5,
                color=ACCENT,
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    contexts = sorted({row.context for row in result.rows})
    axes.set_xticks(contexts, [context_text(context) for context in contexts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.margins(x=0.08, y=0.2)
    axes.set_xlabel("context, tokens")
