"""Which stages a stage takes its inputs from. The stages read them; the launcher checks that they are there."""

from collections.abc import Callable, Sequence

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.stages import SELECTION_STAGES


def last_selection(config: RunConfig, before: str | None = None) -> str | None:
    """The last selection stage that the run has (before another one): its winner is the mixer so far."""
    stages = SELECTION_STAGES[: SELECTION_STAGES.index(before)] if before else SELECTION_STAGES
    return next((stage for stage in reversed(stages) if stage in config.stages), None)


def final_stage(config: RunConfig) -> str:
    """The last training stage that the run has."""
    return "stage2" if "stage2" in config.stages else "stage1"


def upstream_stages(config: RunConfig, stage: str) -> tuple[str, ...]:
    """The stages whose results a stage reads itself, in order. The report takes what there is and needs none."""
    found = {
        "prepare": (),
        "placement": ("prepare",),
        "block_selection": ("prepare", "placement"),
        "new_block": ("prepare", "placement"),
        "hardware_search": ("prepare", "placement", _selection_to_resize(config)),
        "stage1": ("prepare", *_search(config)),
        "stage2": ("prepare", *_search(config), "stage1"),
        "export": ("prepare", *_search(config)[:1], final_stage(config)),
        "evaluate": ("prepare", final_stage(config), "export"),
        "report": (),
    }.get(stage, ("prepare",))
    return tuple(name for name in found if name is not None)


def check_upstream(config: RunConfig, stages: Sequence[str], finished: Callable[[str], bool]) -> None:
    """Raise UserError when a stage needs another that is neither asked for nor finished."""
    for stage in stages:
        missing = [name for name in upstream_stages(config, stage) if name not in stages and not finished(name)]
        if missing:
            raise UserError(
                f"stages: {stage} needs {', '.join(missing)}; add what is missing to --stages, or give the run that "
                "has it (--output DIR, or `resume RUN --stages`)"
            )


def _search(config: RunConfig) -> tuple[str | None, ...]:
    """Where the student's architecture comes from."""
    return () if config.student_plan is not None else ("placement", last_selection(config))


def _selection_to_resize(config: RunConfig) -> str | None:
    return None if config.hardware_search.mixer else last_selection(config, before="hardware_search")
