"""A result beside an earlier one or the paper's numbers, as rows and as a table."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from megatron_jet.evaluation.presets import PRESETS, paper_scores
from megatron_jet.evaluation.result import EvaluationResult, read_scores

PAPER = "paper:"


@dataclass(frozen=True)
class Row:
    """One number; `other` is None where the other side does not have it. Presets in percent, the rest as measured."""

    name: str
    this: float
    other: float | None

    @property
    def difference(self) -> float | None:
        return None if self.other is None else self.this - self.other


def other_scores(against: str) -> dict[str, float]:
    """Numbers to compare with.

    Args:
        against: a result file, or "paper:MODEL".

    Raises:
        UserError: no such file or model.
    """
    if against.startswith(PAPER):
        return paper_scores(against.removeprefix(PAPER))
    return read_scores(Path(against))


def compare(result: EvaluationResult, other: dict[str, float]) -> list[Row]:
    """Every number of a result, presets first, beside the other side's of the same name."""
    return [Row(name, value, other.get(name)) for name, value in result.scores().items()]


def table(result: EvaluationResult, against: str | None = None, other: dict[str, float] | None = None) -> Group:
    """The result for a terminal; with notes on what can be compared where the paper is the other side."""
    # As Text: in a plain string rich takes [/b] of a path for an instruction.
    grid = Table(title=Text(f"{result.model} (lm-evaluation-harness {result.harness})"))
    grid.add_column("score", overflow="fold")
    grid.add_column("this", justify="right")
    if against is not None:
        grid.add_column(Text(against), justify="right", overflow="fold")
        grid.add_column("difference", justify="right")
    for row in compare(result, other or {}):
        digits = 1 if row.name in PRESETS else 4
        cells = [row.name, f"{row.this:.{digits}f}"]
        if against is not None:
            cells += ["-", "-"] if row.other is None else [f"{row.other:.{digits}f}", f"{row.difference:+.{digits}f}"]
        grid.add_row(*map(Text, cells))
    notes = [
        f"{name}: comparable: {preset.comparable}. Not comparable: {preset.not_comparable}."
        for name, preset in result.presets.items()
    ]
    missing = [
        f"{name}: no score, because {', '.join(task for task, part in preset.parts.items() if part is None)} lacks one"
        for name, preset in result.presets.items()
        if preset.score is None
    ]
    return Group(grid, *map(Text, [*missing, *notes]))
