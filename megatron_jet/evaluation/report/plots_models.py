"""Figures about models: throughput by context, the size search, loss curves."""

from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from megatron_jet.evaluation.report.curves import LOSS_KEYS
from megatron_jet.evaluation.report.finding import mean_accuracy, timed_speed
from megatron_jet.evaluation.report.plot_style import (
    ACCENT,
    FINAL,
    INK,
    MUTED,
    PAPER,
    SERIES,
    TEACHER,
    figure,
    quiet_axis,
    to_svg,
)

LOSS_NAMES = {"loss": "total", "feature": "features", "kl": "KL to teacher", "cross_entropy": "cross-entropy"}


def context_text(tokens: float) -> str:
    """`4K`, `256K`, `512`: as the field writes context lengths."""
    return f"{tokens / 1024:g}K" if tokens >= 1024 else f"{tokens:g}"


def throughput(comparison: dict[str, Any]) -> str:
    """Tokens per second of teacher and final model by context, generation and prefill, on a log scale."""
    measured = comparison["measured"]
    panels = [
        (title, measured[key])
        for title, key in (
            ("Generation, tokens/s", "generation_tokens_per_second"),
            ("Prefill, tokens/s", "prefill_tokens_per_second"),
        )
        if measured.get(key)
    ]
    with figure(1, len(panels), 2.6) as (made, axes_list):
        for axes, (title, speeds) in zip(axes_list, panels):
            contexts = sorted(speeds, key=int)
            x = [int(context) for context in contexts]
            for side, color in (("teacher", TEACHER), ("final", FINAL)):
                y = [speeds[context][side] for context in contexts]
                axes.plot(x, y, "o-", ms=5, color=color, label=side)
            for context, position in zip(contexts, x):
                top = max(speeds[context]["teacher"], speeds[context]["final"])
                text = f"{speeds[context]['ratio']:.2g}×"
                axes.annotate(
                    text, (position, top), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8, color=INK
                )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(x, [context_text(value) for value in x])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.margins(x=0.12, y=0.22)
            axes.set_title(title)
            axes.set_xlabel("context, tokens")
        axes_list[0].legend(loc="best")
        return to_svg(made, "speed")


def candidate_speed(selection: dict[str, Any], candidate: dict[str, Any]) -> float | None:
    """Generation tokens per second as the stage ranked it: measured (None where it did not fit into memory) or from
    the formulas."""
    if selection["throughput_mode"] == "measured":
        return timed_speed(selection, candidate)
    return candidate["analytic_tokens_per_second"][selection["context"]]


def pareto(selection: dict[str, Any], name: str) -> str:
    """Accuracy against generation speed; the front is joined, the winner filled."""
    points = {
        c["name"]: (speed, mean_accuracy(c["scores"]))
        for c in selection["candidates"]
        if (speed := candidate_speed(selection, c)) is not None
    }
    with figure(1, 1, 3.2) as (made, (axes,)):
        front = sorted(points[c] for c in selection["pareto"] if c in points)
        axes.plot([x for x, _ in front], [y for _, y in front], color=ACCENT, lw=1.2, zorder=1)
        for label, (x, y) in points.items():
            winner, on_front = label == selection["winner"], label in selection["pareto"]
            edge = FINAL if winner else ACCENT if on_front else TEACHER
            axes.plot(
                [x], [y], "o", ms=8 if winner else 6.5, mfc=FINAL if winner else PAPER, mec=edge, mew=1.5, zorder=3
            )
            axes.annotate(
                label,
                (x, y),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=INK if winner or on_front else MUTED,
                fontweight="bold" if winner else "normal",
            )
        axes.margins(0.12, 0.2)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel(
            f"generation, tokens/s at {context_text(int(selection['context']))} ({selection['throughput_mode']})"
        )
        axes.set_ylabel("mean accuracy, search split")
        return to_svg(made, name)


def loss_terms(curves: dict[str, Any], name: str) -> str:
    """Loss terms of one training job, a panel each; validation as dots."""
    train, validation = curves.get("train", {}), curves.get("validation", {})
    keys = [key for key in LOSS_KEYS if train.get(key) and any(value for _, value in train[key])]
    if len(keys) == 2 and "loss" in keys:
        keys.remove("loss")  # with one term the total is the same curve
    with figure(1, max(1, len(keys)), 2.1) as (made, axes_list):
        for axes, key in zip(axes_list, keys):
            axes.plot(*_columns(train[key]), color=FINAL, lw=1.3)
            if validation.get(key):
                axes.plot(*_columns(validation[key]), "o", ms=5, color=ACCENT)
            axes.set_title(LOSS_NAMES[key])
            axes.set_xlabel("step")
            axes.set_ylim(bottom=0)
            quiet_axis(axes, "x")
        return to_svg(made, name)


def candidate_losses(jobs: dict[str, dict[str, Any]], name: str) -> str:
    """Total training loss of the candidates of one stage in one panel."""
    with figure(1, 1, 2.4) as (made, (axes,)):
        for i, (job, curves) in enumerate(jobs.items()):
            axes.plot(*_columns(curves["train"]["loss"]), color=SERIES[i % len(SERIES)], lw=1.3, label=job)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        axes.set_ylim(bottom=0)
        quiet_axis(axes, "x")
        axes.legend(loc="upper right", ncols=min(3, len(jobs)))
        return to_svg(made, name)


def _columns(points: list[list[float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
