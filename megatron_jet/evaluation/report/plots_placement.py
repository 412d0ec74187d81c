"""Figures about where full attention goes: heat map, learned against uniform, beam."""

from collections.abc import Callable
from typing import Any

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import PercentFormatter

from megatron_jet.evaluation.report.finding import layers_text
from megatron_jet.evaluation.report.plot_style import (
    ACCENT,
    FINAL,
    INK,
    MUTED,
    PAPER,
    RULE,
    SCALE,
    TEACHER,
    figure,
    quiet_axis,
    to_svg,
)

MAX_ANNOTATED = 16  # layers; with more the numbers would not fit into the cells


def heat_map(placement: dict[str, Any]) -> str:
    """One column per layer that is full while all others are linear, one row per score (paper, figure 5a).

    Colour runs from the all-linear model's score (light) to the best single layer's (dark), for every row by itself;
    but two standard errors are the least that gets the darkest colour, so that noise does not look like structure.
    """
    rows = _score_rows(placement)
    layers = [row["full"][0] for row in placement["heat_map"]]
    colors = LinearSegmentedColormap.from_list("report", SCALE)
    with figure(1, 1, 0.75 + 0.42 * len(rows)) as (made, (axes,)):
        for y, (_, values, base, sign, least, text) in enumerate(rows):
            gains = [sign * (value - base) for value in values]
            top = max(*gains, least)
            for x, (gain, value) in enumerate(zip(gains, values)):
                share = min(1.0, max(0.0, gain / top))
                axes.add_patch(_cell(x, y, colors(share)))
                if len(layers) <= MAX_ANNOTATED:
                    ink = PAPER if share > 0.55 else INK
                    axes.text(x, y, text.format(value), ha="center", va="center", fontsize=8, color=ink)
            axes.text(len(layers) - 0.3, y, text.format(base), ha="left", va="center", fontsize=8, color=MUTED)
        axes.text(len(layers) - 0.3, -0.75, "none full", ha="left", va="center", fontsize=8, color=MUTED)
        _mark_chosen(axes, placement, layers)
        axes.set_xlim(-0.6, len(layers) + 0.6)
        axes.set_ylim(len(rows) - 0.4, -1.1)
        axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xlabel("the one layer with full attention")
        axes.grid(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        return to_svg(made, "heat")


def _score_rows(placement: dict[str, Any]) -> list[tuple[str, list[float], float, int, float, str]]:
    """Label, value per layer, value of the all-linear model, sign of a gain, least gain to be dark, format."""
    scores = [row["scores"] for row in placement["heat_map"]]
    base = placement["all_linear"]
    rows = []
    for task in base["accuracy"]:
        values = [100 * score["accuracy"][task] for score in scores]
        noise = 200 * max(row["error"].get(task, 0.0) for row in (base, *scores))
        rows.append((f"{task} accuracy, %", values, 100 * base["accuracy"][task], 1, max(noise, 1e-9), "{:.0f}"))
    for task in base["loss"]:
        if task not in base["accuracy"] or task == placement["swa_objective"]:
            values = [score["loss"][task] for score in scores]
            rows.append((f"{task} loss, nats", values, base["loss"][task], -1, 1e-9, "{:.2f}"))
    return rows


def _cell(x: float, y: float, color: tuple):
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (x - 0.46, y - 0.42), 0.92, 0.84, boxstyle="round,pad=0,rounding_size=0.08", fc=color, ec=RULE, lw=0.6
    )


def _mark_chosen(axes, placement: dict[str, Any], layers: list[int]) -> None:
    for x, layer in enumerate(layers):
        if layer in placement["full"]:
            axes.text(x, -0.75, "full", ha="center", va="center", fontsize=8, color=FINAL, fontweight="bold")
        elif layer in placement["swa"]:
            axes.text(x, -0.75, "window", ha="center", va="center", fontsize=8, color=ACCENT)


def learned_against_uniform(placement: dict[str, Any]) -> str:
    """Held-out objective of every placement, before (ring) and after (disc) the short stage 1 (paper, figure 5b)."""
    rows = placement["comparison"]
    task, other = placement["objective"], placement["swa_objective"]
    with figure(1, 2, 0.9 + 0.26 * len(rows), sharey=True) as (made, panels):
        _comparison_panel(panels[0], rows, lambda s: s["accuracy"][task], f"{task} accuracy, held out")
        panels[0].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _comparison_panel(panels[1], rows, lambda s: s["loss"][other], f"{other} loss, held out (lower is better)")
        labels = [f"{row['name'].replace('_', ' ')}  {_short(row['full'])}" for row in rows]
        panels[0].set_yticks(range(len(rows)), labels)
        panels[0].tick_params(axis="y", labelcolor=INK)
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        return to_svg(made, "uniform")


def _comparison_panel(axes, rows: list[dict[str, Any]], score, label: str) -> None:
    for y, row in enumerate(rows):
        color = FINAL if row["name"] == "learned" else ACCENT if row["name"] == "uniform" else TEACHER
        before = score(row["before"])
        if row["after"] is not None:
            after = score(row["after"])
            axes.plot([before, after], [y, y], color=color, lw=1.2, alpha=0.5, zorder=2)
            axes.plot([after], [y], "o", ms=6.5, color=color, zorder=3)
        axes.plot([before], [y], "o", ms=6.5, mfc=PAPER, mec=color, mew=1.4, zorder=3)
    axes.set_xlabel(label)
    quiet_axis(axes, "x")
    axes.spines["left"].set_visible(False)


def _short(layers: list[int]) -> str:
    return layers_text(layers) if len(layers) <= 6 else f"{len(layers)} layers"


def beam_traces(placement: dict[str, Any]) -> str:
    """Every candidate of every round; those kept are filled and named. Left full attention, right sliding windows."""
    task, other = placement["objective"], placement["swa_objective"]
    panels = [(placement["beam"], lambda scores: scores["accuracy"][task], f"{task} accuracy, search split", True)]
    if placement["swa_beam"]:
        title = f"{other} loss, search split (lower is better)"
        panels.append((placement["swa_beam"], lambda scores: scores["loss"][other], title, False))
    widths = [max(2, len(rounds)) for rounds, *_ in panels]
    with figure(1, len(panels), 2.9, width_ratios=widths) as (made, axes_list):
        for axes, (rounds, value, title, is_accuracy) in zip(axes_list, panels):
            _beam_panel(axes, rounds, value)
            axes.set_title(title)
            if is_accuracy:
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        return to_svg(made, "beam")


def _beam_panel(axes, rounds: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> None:
    scored = [{tuple(c["full"]): value(c["scores"]) for c in beam["candidates"]} for beam in rounds]
    everything = [y for row in scored for y in row.values()]
    spread = max(everything) - min(everything) or 1.0
    for x, (beam, row) in enumerate(zip(rounds, scored)):
        kept = [tuple(full) for full in beam["kept"] if tuple(full) in row]
        rest = [y for full, y in row.items() if full not in kept]
        axes.plot([x] * len(rest), rest, "o", ms=5, mfc=PAPER, mec=TEACHER, mew=1, zorder=2)
        for place, full in enumerate(kept):
            axes.plot([x], [row[full]], "o", ms=6.5, color=FINAL if place == 0 else MUTED, zorder=3)
        heights = spread_out([row[full] for full in kept], 0.075 * spread)
        for full, height in zip(kept, heights):
            axes.text(x + 0.12, height, layers_text(full), fontsize=8, va="center", color=INK)
    axes.set_xticks(range(len(rounds)), [f"round {i + 1}" for i in range(len(rounds))])
    axes.set_xlim(-0.4, len(rounds) - 0.2)
    axes.margins(y=0.1)
    quiet_axis(axes, "x")


def spread_out(heights: list[float], gap: float) -> list[float]:
    """Heights for labels at least `gap` apart, in the order given, as near to the originals as a single pass allows."""
    order = sorted(range(len(heights)), key=heights.__getitem__, reverse=True)
    placed = list(heights)
    for above, below in zip(order, order[1:]):
        placed[below] = min(placed[below], placed[above] - gap)
    return placed
