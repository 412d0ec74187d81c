"""Names of the user's on a terminal: brackets are theirs, not rich's."""

import io

from rich.console import Console

from megatron_jet.evaluation.comparison import table
from megatron_jet.evaluation.result import EvaluationResult, PresetResult, TaskResult

NAMES = ("a[/b]c", "[bold]x", "runs[1]", "\\[x]", "x\\")


def test_brackets_in_names_are_printed_as_they_are():
    for name in NAMES:
        result = EvaluationResult(
            model=name,
            harness="1",
            settings={},
            tasks={name: TaskResult(metrics={"acc": 0.5})},
            presets={name: PresetResult(score=None, parts={name: None}, comparable=name, not_comparable=name)},
        )
        out = io.StringIO()
        Console(file=out, width=200).print(table(result, name, {}))
        assert out.getvalue().count(name) >= 5, out.getvalue()
