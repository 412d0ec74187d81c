"""The paper's evaluation groups as harness tasks, what of them can be compared with the paper, and its numbers.

Tasks, metrics and lengths are those of the evaluation configs published with the models; shots are the paper's. The
authors ran their own fork of the harness, so a difference of a few tenths of a point is not evidence of anything.
"""

from dataclasses import dataclass

from megatron_jet.configs.errors import UserError, usage_errors


@dataclass(frozen=True)
class TaskScore:
    """One number of a harness result.

    Attributes:
        task: harness task or group.
        metric: harness metric and filter, for example "acc_norm,none". A fraction, not a percentage.
        num_fewshot: examples in the prompt; None: as the task says.
    """

    task: str
    metric: str
    num_fewshot: int | None = None


@dataclass(frozen=True)
class Preset:
    """A column of the paper's tables: the plain mean of some harness scores.

    Attributes:
        name: as given on the command line.
        column: key in `PAPER_SCORES`.
        scores: what the mean is taken of.
        comparable: what equals the paper's protocol.
        not_comparable: what does not, or is unknown.
        max_length: tokens to which prompts are cut (from the left).
        max_new_tokens: generation limit of tasks that set none.
        runs_code: executes programs that the model wrote.
    """

    name: str
    column: str
    scores: tuple[TaskScore, ...]
    comparable: str
    not_comparable: str
    max_length: int = 4096
    max_new_tokens: int = 256
    runs_code: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """Harness names, each once."""
        return tuple(dict.fromkeys(score.task for score in self.scores))

    @property
    def num_fewshot(self) -> dict[str, int]:
        """Shots by task, where the preset sets them."""
        return {score.task: score.num_fewshot for score in self.scores if score.num_fewshot is not None}


def _scores(metric: str, *tasks: str, num_fewshot: int | None = None) -> tuple[TaskScore, ...]:
    return tuple(TaskScore(task, metric, num_fewshot) for task in tasks)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "paper-mmlu",
            "mmlu",
            _scores("acc,none", "mmlu", num_fewshot=0),
            comparable="task, 0 shots and metric (accuracy over all questions)",
            not_comparable="nothing known",
        ),
        Preset(
            "paper-mmlu-pro",
            "mmlu_pro",
            _scores("exact_match,custom-extract", "mmlu_pro", num_fewshot=5),
            comparable="task, 5 shots and metric (exact match of the letter in the generated reasoning)",
            not_comparable="version of the task in the authors' fork",
            max_new_tokens=2048,
        ),
        Preset(
            "paper-bbh",
            "bbh",
            _scores("exact_match,get-answer", "bbh"),
            comparable="task and metric; 3 shots with reasoning, as the task's own default",
            not_comparable="the paper states no shots for BBH",
            max_new_tokens=1024,
        ),
        Preset(
            "paper-math",
            "math",
            (
                TaskScore("gsm8k", "exact_match,flexible-extract", 4),
                TaskScore("hendrycks_math", "exact_match,none", 4),
                TaskScore("mathqa", "acc_norm,none", 0),
                TaskScore("mmlu_stem", "acc,none", 0),
                TaskScore("gpqa_main_generative_n_shot", "exact_match,flexible-extract", 5),
            ),
            comparable="tasks, shots and metrics; the column is the mean of the five",
            not_comparable="which examples are in the GSM8K, MATH and GPQA prompts: they are drawn by a seed",
            max_new_tokens=1024,
        ),
        Preset(
            "paper-commonsense",
            "commonsense",
            (
                *_scores("acc_norm,none", "arc_challenge", "arc_easy", "piqa", "openbookqa", num_fewshot=0),
                *_scores("acc,none", "winogrande", "boolq", "truthfulqa_mc2", num_fewshot=0),
            ),
            comparable="tasks, 0 shots and metrics (acc_norm for ARC, PIQA and OpenBookQA, acc for the others)",
            not_comparable="TruthfulQA's own prompt holds six fixed examples, here as in the paper",
        ),
        Preset(
            "paper-retrieval",
            "retrieval",
            _scores("contains,none", "fda", "swde", "squad_completion", num_fewshot=0),
            comparable="tasks, 0 shots and metric (the answer is contained in the continuation)",
            not_comparable="nothing known",
        ),
        Preset(
            "paper-code",
            "code",
            (
                *_scores("pass@1,create_test", "humaneval", "humaneval_plus", num_fewshot=0),
                *_scores("pass_at_1,none", "mbpp", "mbpp_plus", num_fewshot=3),
                *_scores("pass@5,create_test", "cruxeval_input_cot", "cruxeval_output_cot"),
            ),
            comparable="CRUXEval with reasoning, pass@5 of 10 samples, is close: prompts may differ",
            not_comparable="the paper's MBPP and HumanEval are EvalPlus with a chat prompt, which the harness does not "
            "have; its own tasks stand in and give other numbers, so the column is not comparable",
            max_new_tokens=2048,
            runs_code=True,
        ),
        Preset(
            "paper-longbench",
            "longbench",
            tuple(
                TaskScore(f"longbench_{group}", "score,none", 0)
                for group in ("code", "fewshot", "summarization", "single", "multi")
            ),
            comparable="LongBench's five groups (code, few-shot, summarisation, one document, several documents) "
            "without cutting prompts; the column is their mean",
            not_comparable="whether the paper's groups hold LongBench's Chinese tasks, as the harness's do, is unknown",
            max_length=262144,
            max_new_tokens=512,
        ),
    )
}

# Percent. Paper (arXiv 2508.15884v3), main tables.
PAPER_SCORES: dict[str, dict[str, float]] = {
    model: dict(
        zip(("mmlu", "mmlu_pro", "bbh", "math", "commonsense", "retrieval", "code", "longbench"), row, strict=True)
    )
    for model, row in {
        "jet_nemotron_2b": (60.8, 39.0, 58.3, 49.6, 62.0, 74.2, 59.5, 41.1),
        "jet_nemotron_4b": (65.2, 44.2, 65.0, 51.3, 64.7, 76.2, 63.5, 43.9),
        "qwen3_1.7b": (60.3, 37.8, 54.2, 42.3, 60.0, 76.1, 58.9, 42.2),
        "qwen2.5_1.5b": (59.5, 28.9, 44.1, 38.4, 59.4, 72.4, 52.0, 39.1),
    }.items()
}


@usage_errors()
def find_preset(name: str) -> Preset:
    """A preset by name. Raises UserError that lists them."""
    if name not in PRESETS:
        raise UserError(f"no preset '{name}'; there are {', '.join(PRESETS)}")
    return PRESETS[name]


@usage_errors()
def paper_scores(model: str) -> dict[str, float]:
    """The paper's scores of a model, in percent by preset name. Raises UserError that lists the models."""
    if model not in PAPER_SCORES:
        raise UserError(f"the paper's numbers are known for {', '.join(PAPER_SCORES)}, not for '{model}'")
    return {preset.name: PAPER_SCORES[model][preset.column] for preset in PRESETS.values()}
