"""Findings about where full attention goes (paper, section 2.2 and figure 5)."""

from typing import Any

from megatron_jet.evaluation.report.finding import (
    NOISE,
    SHOWS_NOT,
    Finding,
    Report,
    finding,
    judge,
    layers_text,
    percent,
    resolution,
    standard_error,
)


def learned_placement(report: Report) -> Finding | None:
    """Figure 5b, on held-out data; after the short stage 1 where the run has one."""
    placement = report["placement"]
    if placement is None:
        return None
    task, rows = placement["objective"], {row["name"]: row for row in placement["comparison"]}
    if "learned" not in rows or "uniform" not in rows:
        return None
    pair = (rows["learned"], rows["uniform"])
    when = "after" if all(row["after"] for row in pair) else "before"
    learned, uniform = (row[when]["accuracy"][task] for row in pair)
    error = standard_error(*(row[when] for row in pair), [task], report["samples"]["placement"])
    places = [layers_text(row["full"]) for row in pair]
    moment = "after a short stage 1" if when == "after" else "straight from the supernet"
    here = (
        f"Held-out {task} accuracy {moment}: {percent(learned)} with full attention in layers {places[0]}, "
        f"{percent(uniform)} with the uniform {places[1]}."
    )
    phases = [row["before"]["accuracy"][task] for name, row in rows.items() if name.startswith("uniform")]
    if len(phases) > 1:
        straight = f" Straight from the supernet: learned {percent(rows['learned']['before']['accuracy'][task])},"
        here += (
            f"{straight if when == 'after' else ''} {'the' if when == 'after' else 'The'} {len(phases)} uniform ones "
            f"have {percent(min(phases))} to {percent(max(phases))}."
        )
    if places[0] == places[1]:
        here += " Search and baseline chose the same layers."
    return finding(
        "learned placement",
        "Learned placement of full attention beats uniform placement (figure 5b).",
        here,
        judge(learned - uniform, error),
        f"Few layers leave few placements, and a uniform one can hit the right layers. {resolution(error)}",
    )


def single_layers(placement: dict[str, Any]) -> list[tuple[float, int]]:
    """Objective accuracy with each single layer full, on the search split, best first."""
    task = placement["objective"]
    rows = [(row["scores"]["accuracy"][task], row["full"][0]) for row in placement["heat_map"]]
    return sorted(rows, key=lambda row: (-row[0], row[1]))


def _by_layer(placement: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Scores of the heat map by its one full layer."""
    return {row["full"][0]: row["scores"] for row in placement["heat_map"]}


def few_layers_matter(report: Report) -> Finding | None:
    """Figure 5a."""
    placement = report["placement"]
    if placement is None or len(placement["heat_map"]) < 3:
        return None
    task, rows = placement["objective"], single_layers(placement)
    (best, layer), middle = rows[0], rows[len(rows) // 2][0]
    none = placement["all_linear"]["accuracy"][task]
    scores = _by_layer(placement)
    error = standard_error(scores[layer], scores[rows[len(rows) // 2][1]], [task], report["samples"]["placement"])
    return finding(
        "few layers matter",
        "Only two or three attention layers matter for retrieval (figure 5a).",
        f"With one full layer {task} reaches {percent(best)} (layer {layer}); the median layer gives "
        f"{percent(middle)}, no full layer {percent(none)} (search split).",
        judge(best - middle, error),
        f"The teacher's ability may be spread over many layers, or one full layer is not enough. {resolution(error)}",
    )


def joint_optimum(report: Report) -> Finding | None:
    """The paper's {15, 20} is not made of the two best single layers."""
    placement = report["placement"]
    if placement is None or len(placement["full"]) < 2 or not placement["heat_map"]:
        return None
    task, found = placement["objective"], tuple(sorted(placement["full"]))
    singles = tuple(sorted(layer for _, layer in single_layers(placement)[: len(found)]))
    paper = "The best set of layers is a joint optimum, not the best single layers."
    if singles == found:
        here = f"The search found {layers_text(found)}: the best single layers as well."
        reason = "Where one layer does the work, the greedy choice is right."
        return finding("joint optimum", paper, here, SHOWS_NOT, reason)
    scored = {
        tuple(sorted(candidate["full"])): candidate["scores"]
        for beam in placement["beam"]
        for candidate in beam["candidates"]
    }
    here = f"The search found {layers_text(found)}; the best single layers are {layers_text(singles)}"
    if found not in scored or singles not in scored:
        return finding("joint optimum", paper, f"{here}, which the beam did not score together.", NOISE)
    best, rival = (scored[full]["accuracy"][task] for full in (found, singles))
    here += f", which together reach {percent(rival)} against {percent(best)} (search split)."
    error = standard_error(scored[found], scored[singles], [task], report["samples"]["placement"])
    return finding("joint optimum", paper, here, judge(best - rival, error), resolution(error))


def tasks_differ(report: Report) -> Finding | None:
    """Retrieval places the full layers, multiple choice the windows."""
    placement = report["placement"]
    if placement is None or not placement["heat_map"]:
        return None
    task, other = placement["objective"], placement["swa_objective"]
    if task == other or other not in placement["heat_map"][0]["scores"]["loss"]:
        return None
    first = single_layers(placement)[0][1]
    scores = _by_layer(placement)
    losses = {layer: row["loss"][other] for layer, row in scores.items()}
    second = min(losses, key=lambda layer: (losses[layer], layer))
    error = standard_error(scores[first], scores[second], [task], report["samples"]["placement"])
    lead = scores[first]["accuracy"][task] - scores[second]["accuracy"][task]
    return finding(
        "tasks need different layers",
        "Retrieval and multiple choice depend on different layers.",
        f"{task.capitalize()} is best with layer {first} full ({percent(scores[first]['accuracy'][task])}; with layer "
        f"{second} {percent(scores[second]['accuracy'][task])}), {other} with layer {second} (loss on the correct "
        f"answer {losses[second]:.3f}; with layer {first} {losses[first]:.3f}).",
        SHOWS_NOT if first == second else judge(lead, error),
        "In this teacher both abilities need the same layer first." if first == second else resolution(error),
    )
