"""Findings about blocks, sizes and the final model (paper, sections 2.3 to 2.5 and 3)."""

from typing import Any

from megatron_jet.evaluation.report.finding import (
    SHOWS,
    SHOWS_NOT,
    Finding,
    Report,
    finding,
    judge,
    mean_accuracy,
    percent,
    resolution,
    standard_error,
    steps_text,
    timed_speed,
)

KEPT = 0.02  # mean accuracy that a hybrid may lose and still count as equal to its teacher
NEAR = 0.06  # spread of throughputs that counts as equal: twice the tie of the hardware search


def _scores(selection: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Scores by candidate."""
    return {candidate["name"]: candidate["scores"] for candidate in selection["candidates"]} if selection else {}


def _error(report: Report, stage: str, first: str, second: str) -> float:
    """Of the difference of two candidates' mean accuracies."""
    scores = _scores(report[stage])
    return standard_error(scores[first], scores[second], list(scores[first]["accuracy"]), report["samples"][stage])


def _moment(report: Report, stage: str) -> str:
    """What a candidate's scores come from."""
    return f"search split, {steps_text(report['steps'][stage])}"


def known_blocks(report: Report) -> Finding | None:
    """Block selection among the blocks that existed before."""
    known = {
        name: mean_accuracy(scores) for name, scores in _scores(report["block_selection"]).items() if name != "jet"
    }
    if "gated_delta_net" not in known or len(known) < 2:
        return None
    ours = known.pop("gated_delta_net")
    rival = max(known, key=known.__getitem__)
    error = _error(report, "block_selection", "gated_delta_net", rival)
    return finding(
        "block selection",
        "Of the known linear blocks, Gated DeltaNet is the most accurate after equal training.",
        f"Mean accuracy {percent(ours)}; the best other known block, {rival}, {percent(known[rival])} "
        f"({_moment(report, 'block_selection')}).",
        judge(ours - known[rival], error),
        f"Blocks that start closer to the teacher lead while training is short. {resolution(error)}",
    )


def _versus(report: Report, name: str, paper: str, other: str, other_text: str, why_not: str) -> Finding | None:
    """JetBlock against another candidate that was trained alike."""
    stage = "new_block" if report["new_block"] is not None else "block_selection"
    scores = _scores(report[stage])
    if "jet" not in scores or other not in scores:
        return None
    jet, rival = (mean_accuracy(scores[candidate]) for candidate in ("jet", other))
    error = _error(report, stage, "jet", other)
    here = f"Mean accuracy {percent(jet)} for JetBlock, {percent(rival)} {other_text} ({_moment(report, stage)})."
    return finding(name, paper, here, judge(jet - rival, error), f"{why_not} {resolution(error)}")


def new_block(report: Report) -> Finding | None:
    """JetBlock against the winner before it."""
    paper = "JetBlock is more accurate than Gated DeltaNet at about the same cost."
    why_not = "The dynamic kernel starts as a static one and needs tokens to become useful."
    return _versus(report, "JetBlock", paper, "gated_delta_net", "for Gated DeltaNet", why_not)


def dynamic_kernel(report: Report) -> Finding | None:
    """JetBlock against itself with the kernel generator switched off."""
    paper = "What JetBlock adds is the kernel that depends on the token."
    why_not = "The generator starts at zero, so that both begin as the same static convolution."
    return _versus(report, "dynamic convolution", paper, "jet_static", "with a static kernel", why_not)


def equal_cache(report: Report) -> Finding | None:
    """Hardware-aware search, accuracy side (paper, table 2)."""
    search = report["hardware_search"]
    if search is None or len(search["candidates"]) < 2:
        return None
    scores = {name: mean_accuracy(row) for name, row in _scores(search).items()}
    by_size = sorted(search["candidates"], key=lambda candidate: (candidate["params"], candidate["name"]))
    small, large = by_size[0]["name"], by_size[-1]["name"]
    error = _error(report, "hardware_search", small, large)
    return finding(
        "sizes at equal cache",
        "At constant cache size more parameters give more accuracy (table 2).",
        f"Mean accuracy {percent(min(scores.values()))} to {percent(max(scores.values()))} over {len(scores)} sizes "
        f"with the same state. Fewest parameters ({small}): {percent(scores[small])}; most ({large}): "
        f"{percent(scores[large])}; chosen: {search['winner']} ({_moment(report, 'hardware_search')}).",
        judge(scores[large] - scores[small], error),
        f"Sizes unlike the teacher's heads start from fewer copied weights, which short training does not make up for. "
        f"{resolution(error)}",
    )


def accuracy_kept(report: Report) -> Finding | None:
    """The final model against the teacher, held out."""
    comparison = report["comparison"]
    if comparison is None or not comparison["accuracy"]:
        return None
    pairs = comparison["accuracy"]
    teacher, final = (sum(pair[side] for pair in pairs.values()) / len(pairs) for side in ("teacher", "final"))
    error = standard_error(*comparison["scores"].values(), list(pairs), report["samples"]["evaluate"])
    tasks = ", ".join(f"{task} {percent(p['teacher'])} to {percent(p['final'])}" for task, p in pairs.items())
    losses = {task: pair for task, pair in comparison["loss"].items() if task not in pairs}
    texts = "".join(
        f" Loss on {task} {pair['teacher']:.3f} to {pair['final']:.3f} nats per token." for task, pair in losses.items()
    )
    return finding(
        "accuracy kept",
        "The hybrid keeps the teacher's accuracy.",
        f"Held-out mean accuracy {percent(teacher)} for the teacher, {percent(final)} for the hybrid "
        f"{_trained(report)} ({tasks}).{texts}",
        judge(final - teacher + KEPT, error),
        f"Kept means less than {100 * KEPT:.0f} points lost. The paper trains on 400 billion tokens after the search; "
        f"this run says how many it had under Cost. {resolution(error)}",
    )


def _trained(report: Report) -> str:
    """How long the final model was trained after the search."""
    stages = [stage for stage in ("stage1", "stage2") if report[stage] is not None]
    names = " and ".join(stage.removeprefix("stage") for stage in stages)
    steps = sum(report["steps"][stage] for stage in stages) if stages else None
    return f"{steps_text(steps)} of stage {names}" if stages else steps_text(steps)


def faster_with_context(report: Report) -> Finding | None:
    """Generation speed against the teacher, as measured on this device."""
    comparison = report["comparison"]
    speeds = comparison and comparison["measured"]["generation_tokens_per_second"]
    if not speeds:
        return None
    contexts = sorted(speeds, key=int)
    first, last = (speeds[context]["ratio"] for context in (contexts[0], contexts[-1]))
    here = f"On this device {first:.2f} times the teacher's speed at {int(contexts[0]):,} tokens of context"
    here += f", {last:.2f} times at {int(contexts[-1]):,}." if len(contexts) > 1 else "."
    grows = last > first or len(contexts) == 1
    return finding(
        "generation speed",
        "Generation is faster than the teacher's, and the more so the longer the context.",
        here,
        SHOWS if last > 1 and grows else SHOWS_NOT,
        "At short contexts and small sizes the cost per step is overhead, not cache traffic.",
    )


def equal_speed(report: Report) -> Finding | None:
    """Hardware-aware search, speed side (paper, table 2)."""
    search = report["hardware_search"]
    if search is None or len(search["candidates"]) < 2:
        return None
    context = search["context"]
    speeds = [timed_speed(search, candidate) for candidate in search["candidates"]]
    if None in speeds:
        return None
    spread = max(speeds) / min(speeds) - 1
    return finding(
        "speed at equal cache",
        "At constant cache size generation speed hardly depends on widths and heads (table 2).",
        f"Timed here at {int(context):,} tokens of context, the fastest of {len(speeds)} sizes generates {spread:.1%} "
        "faster than the slowest.",
        SHOWS if spread <= NEAR else SHOWS_NOT,
        "On a small model the projections, which do depend on the sizes, weigh more than the state; and on a machine "
        "that does other work, too, timings differ by more than sizes do.",
    )
