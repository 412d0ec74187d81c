"""Loss curves of a run, from the metrics.jsonl files of its training jobs."""

import json
from pathlib import Path
from typing import Any

MAX_POINTS = 240  # per curve in the report; longer ones are averaged over equal stretches of steps
LOSS_KEYS = ("loss", "feature", "kl", "cross_entropy")

# Losses by name: [[step, value], ...].
Curve = dict[str, list[list[float]]]


def read_curves(run_dir: Path) -> dict[str, dict[str, Curve]]:
    """Curves of every training job: `{"stage1/student": {"train": {"kl": [[step, value], ...]}, "validation": ...}}`.

    Only losses are read: what a clock gives (tokens per second, memory) would differ from run to run.
    """
    curves = {}
    for path in sorted(run_dir.glob("stages/*/**/metrics.jsonl")):
        job = path.parent.relative_to(run_dir / "stages")
        name = "/".join(part for part in job.parts if part != "jobs")
        splits = _read(path) if path.is_file() else {}
        if splits:
            curves[name] = {split: _thinned(curve) for split, curve in splits.items()}
    return curves


def _read(path: Path) -> dict[str, Curve]:
    splits: dict[str, Curve] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        row = _row(line)
        for key in LOSS_KEYS:
            if _is_number(row.get(key)):
                points = splits.setdefault(str(row.get("split", "train")), {}).setdefault(key, [])
                points.append([row["step"], row[key]])
    return splits


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}  # the last line of a job that was killed, or is writing now
    return row if isinstance(row, dict) and _is_number(row.get("step")) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _thinned(curve: Curve) -> Curve:
    return {key: thin(points, MAX_POINTS) for key, points in curve.items()}


def thin(points: list[list[float]], limit: int) -> list[list[float]]:
    """At most `limit` points: means of step and value over stretches of equal numbers of points."""
    if len(points) <= limit:
        return points
    edges = [round(i * len(points) / limit) for i in range(limit + 1)]
    stretches = [points[start:end] for start, end in zip(edges, edges[1:])]
    return [[sum(p[i] for p in stretch) / len(stretch) for i in (0, 1)] for stretch in stretches]
