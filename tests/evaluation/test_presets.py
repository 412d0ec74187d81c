"""The paper's groups: they name tasks the harness has, and their columns are the means the paper takes."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from megatron_jet.configs.errors import UserError
from megatron_jet.evaluation.comparison import compare, other_scores, table
from megatron_jet.evaluation.harness import _load_tasks, preset_result, task_results
from megatron_jet.evaluation.presets import PAPER_SCORES, PRESETS, find_preset
from megatron_jet.evaluation.result import EvaluationResult, TaskResult

HARNESS_TASKS = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"
# Where the tasks of the presets lie: reading all of the harness's thousands takes long.
FOLDERS = (
    *("arc", "bbh", "cruxeval", "fda", "gpqa", "gsm8k", "hendrycks_math", "humaneval", "longbench", "mathqa", "mbpp"),
    *("mmlu", "mmlu_pro", "openbookqa", "piqa", "squad_completion", "super_glue", "swde", "truthfulqa", "winogrande"),
)


def result_of(values: dict[str, dict[str, float]], preset: str | None = None) -> EvaluationResult:
    tasks = {name: TaskResult(metrics=metrics) for name, metrics in values.items()}
    presets = {preset: preset_result(find_preset(preset), tasks)} if preset else {}
    return EvaluationResult(model="model", harness="0.4", settings={}, tasks=tasks, presets=presets)


def test_presets_name_tasks_of_the_harness():
    names = set()
    for folder in FOLDERS:
        for path in (HARNESS_TASKS / folder).rglob("*.yaml"):
            names |= set(re.findall(r"^(?:task|group): *([\w-]+)$", path.read_text(encoding="utf-8"), re.MULTILINE))
    for preset in PRESETS.values():
        assert set(preset.tasks) <= names, preset.name


def test_every_column_of_the_paper_has_a_preset():
    columns = {preset.column for preset in PRESETS.values()}
    assert all(set(row) == columns for row in PAPER_SCORES.values())
    assert all(preset.comparable and preset.not_comparable for preset in PRESETS.values())


def test_a_column_is_the_mean_of_its_tasks_in_percent():
    values = {"fda": {"contains,none": 0.5}, "swde": {"contains,none": 0.7}, "squad_completion": {"contains,none": 0.9}}
    result = result_of(values, "paper-retrieval")
    assert result.presets["paper-retrieval"].score == pytest.approx(70.0)
    rows = {row.name: row for row in compare(result, other_scores("paper:jet_nemotron_2b"))}
    assert rows["paper-retrieval"].other == 74.2
    assert rows["paper-retrieval"].difference == pytest.approx(-4.2)
    assert rows["fda contains"].difference is None
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(result, "paper:jet_nemotron_2b", other_scores("paper:jet_nemotron_2b")))
    text = console.export_text()
    assert "-4.2" in text
    assert "Not comparable" in text


def test_a_missing_metric_leaves_the_column_without_a_score():
    result = result_of({"fda": {"contains,none": 0.5}, "swde": {"acc,none": 0.7}}, "paper-retrieval")
    preset = result.presets["paper-retrieval"]
    assert preset.score is None
    assert preset.parts == {"fda": 50.0, "swde": None, "squad_completion": None}
    assert "paper-retrieval" not in result.scores()


def test_shots_of_a_preset_reach_the_tasks_below_its_groups():
    class Task:
        def __init__(self, shots):
            self.shots = shots

        def get_config(self, key):
            return self.shots

        def set_config(self, key, value):
            self.shots = value

        def set_fewshot_seed(self, seed):
            self.seed = seed

    class Manager:
        tasks = {"gsm8k": Task(5), "hendrycks_math_algebra": Task(None), "mathqa": Task(None), "mmlu_x": Task(None)}

        def load(self, names):
            groups = {"hendrycks_math": ["hendrycks_math_algebra"], "mmlu_stem": ["deep"], "deep": ["mmlu_x"]}
            return {"tasks": self.tasks, "groups": {}, "group_map": groups}

    _load_tasks(Manager(), ["gsm8k"], find_preset("paper-math"), options=None)
    assert {name: task.shots for name, task in Manager.tasks.items()} == {
        "gsm8k": 4,
        "hendrycks_math_algebra": 4,
        "mathqa": 0,
        "mmlu_x": 0,
    }


def test_harness_results_become_ours():
    raw = {
        "results": {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": "N/A"}},
        "n-shot": {"arc": 5},
        "n-samples": {"arc": {"original": 9, "effective": 4}},
        "versions": {"arc": 1.0},
    }
    assert task_results(raw)["arc"] == TaskResult(
        metrics={"acc,none": 0.5}, stderr={"acc,none": 0.1}, num_fewshot=5, samples=4, version="1.0"
    )


def test_an_unknown_model_of_the_paper():
    with pytest.raises(UserError, match="jet_nemotron_4b"):
        other_scores("paper:gpt")
