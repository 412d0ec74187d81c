"""Findings about where full attention goes (paper, section 2.2 and figure 5)."""

from collections.abc import Iterator
from typing import Any

from megatron_jet.evaluation.report.finding import (
    NOISE,
    SHOWS_NOT,
    Finding,
    Report,
    finding,
    judge,
    layers_text,
    losses_alone,
    percent,
    resolution,
    standard_error,
    steps_text,
)

Row = dict[str, Any]  # of placement["comparison"]
# What of the paper's sentence a verdict is about. A short training says nothing about the end of a long one.
HERE_TESTED = {"after": "tested here: whether it learns faster", "before": "tested here: without training of its own"}


def learned_placement(report: Report) -> Finding | None:
    """Figure 5b, on held-out data; after the short stage 1 where the run has one.

    Judged against the best of the uniform placements that have the scores, not the declared one alone: which phase of
    a grid is declared is a matter of luck.
    """
    placement = report["placement"]
    if placement is None:
        return None
    task, rows = placement["objective"], {row["name"]: row for row in placement["comparison"]}
    if "learned" not in rows or "uniform" not in rows:
        return None
    learned, declared = rows["learned"], rows["uniform"]
    when = "after" if learned["after"] and declared["after"] else "before"
    uniform = [row for name, row in rows.items() if name.startswith("uniform") and row[when]]
    # max takes the first of equals: the declared one.
    rival = max(uniform, key=lambda row: row[when]["accuracy"][task])
    error = standard_error(learned[when], rival[when], [task], report["samples"]["placement"])
    lead = learned[when]["accuracy"][task] - rival[when]["accuracy"][task]
    return finding(
        "learned placement",
        f"Learned placement of full attention beats uniform placement (figure 5b); {HERE_TESTED[when]}.",
        " ".join(_comparison_sentences(report, rows, when, uniform, rival)),
        judge(lead, error),
        f"Few layers leave few placements, and a uniform one can hit the right layers. {resolution(error)}",
    )


def _comparison_sentences(
    report: Report, rows: dict[str, Row], when: str, uniform: list[Row], rival: Row
) -> Iterator[str]:
    """What the placements reach, how long they were trained for it, and what that does not say."""
    task, learned, declared = report["placement"]["objective"], rows["learned"], rows["uniform"]
    steps = report["steps"]
    if when == "after":
        moment = f"{steps_text(steps['comparison'])} of training each"
    else:
        moment = f"straight from the supernet {steps_text(steps['placement'])}"

    def score(row: Row) -> str:
        return percent(row[when]["accuracy"][task])

    yield (
        f"Held-out {task} accuracy {moment}: {score(learned)} with full attention in layers "
        f"{layers_text(learned['full'])}, {score(declared)} with the uniform {layers_text(declared['full'])} declared "
        "beforehand."
    )
    if rival is not declared:
        yield f"The best of {len(uniform)} uniform ones is {layers_text(rival['full'])} with {score(rival)}."
    elif len(uniform) > 1:
        yield f"That is the best of {len(uniform)} uniform ones."
    if rows.get("all_linear", {}).get(when):
        yield f"Without full attention: {score(rows['all_linear'])}."
    same = [row for row in uniform if row["full"] == learned["full"]]
    if same:
        yield f"The search chose layers that are evenly spaced{' as declared' if same[0] is declared else ''}."
    ahead = _ahead(task, learned, uniform, when)
    if ahead:
        yield f"A uniform one is ahead in {'; '.join(ahead)}."
    if when == "after":
        yield "So few steps tell how fast a placement learns, not where longer training ends."
    else:
        yield "None of these was trained by itself."


def _ahead(task: str, learned: Row, uniform: list[Row], when: str) -> list[str]:
    """The other scores in which the best uniform placement has more than the learned one, with both figures."""
    found = []
    for other in learned[when]["accuracy"]:
        best = max(uniform, key=lambda row: row[when]["accuracy"][other])
        theirs, ours = (row[when]["accuracy"][other] for row in (best, learned))
        if other != task and theirs > ours:
            found.append(f"{other} ({layers_text(best['full'])}: {percent(theirs)} against {percent(ours)})")
    for other in losses_alone(learned[when]):
        best = min(uniform, key=lambda row: row[when]["loss"][other])
        theirs, ours = (row[when]["loss"][other] for row in (best, learned))
        if theirs < ours:
            found.append(f"{other} loss ({layers_text(best['full'])}: {theirs:.3f} against {ours:.3f} nats)")
    return found


def single_layers(placement: dict[str, Any]) -> list[tuple[float, int]]:
    """Objective accuracy with each single layer full, on the search split, best first."""
    task = placement["objective"]
    rows = [(row["scores"]["accuracy"][task], row["full"][0]) for row in placement["heat_map"]]
    return sorted(rows, key=lambda row: (-row[0], row[1]))


def _moment(report: Report) -> str:
    """Where the scores of the search come from."""
    return f"search split, straight from the supernet {steps_text(report['steps']['placement'])}"


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
        f"{percent(middle)}, no full layer {percent(none)} ({_moment(report)}).",
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
    here += f", which together reach {percent(rival)} against {percent(best)} ({_moment(report)})."
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
        f"answer {losses[second]:.3f}; with layer {first} {losses[first]:.3f}), {_moment(report)}.",
        SHOWS_NOT if first == second else judge(lead, error),
        "In this teacher both abilities need the same layer first." if first == second else resolution(error),
    )
