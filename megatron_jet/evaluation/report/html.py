"""report.html: one file with figures and style inside, from the dict that `collect` makes."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from megatron_jet.configs.estimate_text import format_count
from megatron_jet.evaluation.report import plots_models, plots_placement
from megatron_jet.evaluation.report.finding import (
    layers_text,
    losses_alone,
    mean_accuracy,
    percent,
    steps_text,
    timed_speed,
)
from megatron_jet.evaluation.report.plots_models import candidate_speed, context_text

HERE = Path(__file__).parent
STAGE_TITLES = {
    "prepare": "Teacher and data",
    "placement": "Placement",
    "block_selection": "Block selection",
    "new_block": "New block",
    "hardware_search": "Hardware search",
    "stage1": "Stage 1",
    "stage2": "Stage 2",
    "export": "Export",
    "evaluate": "Evaluation",
    "report": "Report",
}
LAYER_NAMES = {
    "attn": "full attention",
    "swa": "sliding window",
    "jet": "JetBlock",
    "gated_delta_net": "Gated DeltaNet",
    "gla": "GLA",
}


def render(report: dict[str, Any]) -> str:
    """The page. `report` is what `collect` returns."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "bytes": size_text,
        "points": lambda value: signed(100 * value, 1),
        "signed": signed,
        "count": format_count,
        "duration": duration,
        "layers": layers_text,
        "mean_accuracy": mean_accuracy,
        "losses_alone": losses_alone,
        "after_steps": steps_text,
        "context": lambda tokens: context_text(int(tokens)),
        "speed": lambda value: "–" if value is None else f"{value:,.0f}",
        "ratio": ratio_text,
        "layer_name": layer_name,
    }
    titles = {row["stage"]: row["stage"].replace("_", " ").capitalize() for row in report["stages"]} | STAGE_TITLES
    environment.globals |= {"candidate_speed": candidate_speed, "timed_speed": timed_speed, "stage_titles": titles}
    page = environment.get_template("page.html.j2")
    return page.render(
        report=report,
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        figures={name: Markup(svg) for name, svg in figures(report).items()},
        tiles=tiles(report),
        legend=legend(report),
        max_seconds=max((row["measured"]["seconds"] or 0.0 for row in report["stages"]), default=0.0) or 1.0,
    )


def figures(report: dict[str, Any]) -> dict[str, str]:
    """Every figure that the run has data for, as SVG."""
    made: dict[str, str] = {}
    placement, comparison = report["placement"], report["comparison"]
    if placement is not None:
        made |= _placement_figures(placement)
    if comparison is not None and comparison["measured"]["generation_tokens_per_second"]:
        made["speed"] = plots_models.throughput(comparison)
    search = report["hardware_search"]
    if search is not None and len(search["candidates"]) > 1:
        made["pareto"] = plots_models.pareto(search, "pareto")
    for stage in ("block_selection", "new_block", "hardware_search"):
        jobs = candidate_curves(report, stage)
        if jobs:
            made[f"losses_{stage}"] = plots_models.candidate_losses(jobs, f"losses-{stage}")
    for job, curves in report["curves"].items():
        stage = job.partition("/")[0]
        if (stage in ("stage1", "stage2") or job == "placement/supernet") and curves.get("train", {}).get("loss"):
            made[f"curve_{stage}"] = plots_models.loss_terms(curves, f"curve-{stage}")
    return made


def candidate_curves(report: dict[str, Any], stage: str) -> dict[str, dict[str, Any]]:
    """Curves of a stage's candidates by name; of those taken over, the curves of the job that trained them."""
    jobs = {
        job.partition("/")[2]: curves
        for job, curves in report["curves"].items()
        if job.startswith(f"{stage}/") and curves.get("train", {}).get("loss")
    }
    for candidate in report[stage]["candidates"] if report[stage] is not None else ():
        origin = candidate["reused_from"] and report[candidate["reused_from"]]
        for other in origin["candidates"] if origin else ():
            job = f"{candidate['reused_from']}/{other['name']}"
            if other["recipe_hash"] == candidate["recipe_hash"] and job in report["curves"]:
                jobs[candidate["name"]] = report["curves"][job]
    return dict(sorted(jobs.items()))


def _placement_figures(placement: dict[str, Any]) -> dict[str, str]:
    made = {}
    if placement["heat_map"]:
        made["heat"] = plots_placement.heat_map(placement)
    if placement["comparison"]:
        made["uniform"] = plots_placement.learned_against_uniform(placement)
    if placement["beam"]:
        made["beam"] = plots_placement.beam_traces(placement)
    return made


def tiles(report: dict[str, Any]) -> list[dict[str, str]]:
    """The four figures at the top, as far as the run has them: value, what it is, and what it is compared with."""
    made = []
    comparison, final = report["comparison"], report["final"]
    if comparison is not None and comparison["accuracy"]:
        pairs = comparison["accuracy"].values()
        teacher, ours = (sum(pair[side] for pair in pairs) / len(pairs) for side in ("teacher", "final"))
        note = f"teacher {percent(teacher)}"
        for task, pair in comparison["loss"].items():
            if task not in comparison["accuracy"]:  # what an average of tasks near 100% hides
                note += f"; {task} loss {pair['final']:.3f}, teacher {pair['teacher']:.3f} nats"
        made.append(_tile(percent(ours), f"mean of {', '.join(comparison['accuracy'])}, held out", note))
    if comparison is not None:
        context = "65536" if "65536" in comparison["cache_bytes"] else max(comparison["cache_bytes"], key=int)
        cache = comparison["cache_bytes"][context]
        smaller = ratio_text(cache["teacher"] / cache["final"])
        note = f"{size_text(cache['final'])} instead of {size_text(cache['teacher'])}"
        made.append(_tile(smaller, f"smaller cache at {context_text(int(context))}", note))
        speeds = comparison["measured"]["generation_tokens_per_second"]
        if speeds:
            longest = max(speeds, key=int)
            pair = speeds[longest]
            note = f"{pair['final']:,.0f} instead of {pair['teacher']:,.0f} tokens/s"
            made.append(_tile(ratio_text(pair["ratio"]), f"generation speed at {context_text(int(longest))}", note))
    if final is not None:
        full = sum(entry == "attn" for entry in final["plan"])
        made.append(_tile(f"{full} of {len(final['plan'])}", "layers keep full attention", _layers_note(report)))
    return made


def _tile(value: str, label: str, note: str) -> dict[str, str]:
    return {"value": value, "label": label, "note": note}


def _layers_note(report: dict[str, Any]) -> str:
    placement = report["placement"]
    return f"layers {layers_text(placement['full'])}, found by search" if placement is not None else ""


def legend(report: dict[str, Any]) -> list[str]:
    """Kinds of layers that the page shows, in a fixed order."""
    plans = [model["plan"] for model in (report["teacher"], report["final"]) if model is not None]
    kinds = {entry.partition(":")[0] for plan in plans for entry in plan}
    return [kind for kind in LAYER_NAMES if kind in kinds] + sorted(kinds - set(LAYER_NAMES))


def layer_name(entry: str) -> str:
    """`swa:64` -> `sliding window of 64`."""
    kind, _, window = entry.partition(":")
    name = LAYER_NAMES.get(kind, kind)
    return f"{name} of {window}" if window else name


def size_text(count: float) -> str:
    """`16 KiB`, `8.0 MiB`, `1.75 GiB`: three significant digits."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    unit = 0
    while count >= 1024 and unit < len(units) - 1:
        count, unit = count / 1024, unit + 1
    digits = 0 if count >= 100 or count == int(count) else 1 if count >= 10 else 2
    return f"{count:.{digits}f} {units[unit]}"


def duration(seconds: float) -> str:
    """`8 s`, `2 min 28 s`, `3 h 5 min`, `2 days 4 h`."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    steps = ((3600, 60, 1, "min", "s"), (48 * 3600, 3600, 60, "h", "min"), (float("inf"), 86400, 3600, "days", "h"))
    large, small, large_name, small_name = next(step[1:] for step in steps if seconds < step[0])
    count, rest = divmod(round(seconds / small), large // small)
    return f"{count} {large_name} {rest} {small_name}" if rest else f"{count} {large_name}"


def signed(value: float, digits: int = 3) -> str:
    """`+0.016`, `−1.5`, `0.000`, with a real minus sign."""
    text = f"{abs(value):.{digits}f}"
    return text if not float(text) else f"{'+' if value > 0 else '−'}{text}"


def ratio_text(value: float) -> str:
    """`11.4×`, `1.08×`, `47×`."""
    digits = 2 if value < 10 else 1 if value < 30 else 0
    return f"{value:.{digits}f}×"
