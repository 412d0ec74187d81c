"""The candidates of selection stages. Each can be a job of its own: `run_stage RUN_DIR STAGE:NAME`."""

import re
from dataclasses import dataclass
from typing import Any

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.mixers.base import MixerConfig
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.stages import SELECTION_STAGES, GridPoint
from megatron_jet.configs.upstream import last_selection

STATIC = "_static"  # suffix of a mixer's ablation with a static convolution
# A name is part of job names, file names and commands.
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Candidate:
    """A linear mixer with its sizes. An ablation is shown for comparison and cannot win."""

    name: str
    mixer: MixerConfig
    ablation: bool = False

    def to_dict(self) -> dict[str, Any]:
        """What it is, whatever it is called."""
        return {"kind": self.mixer.kind, "config": self.mixer.to_dict(), "ablation": self.ablation}


def candidate_names(config: RunConfig, stage: str) -> tuple[str, ...]:
    """Candidates of a stage in the config's order; empty for stages that select nothing.

    Raises:
        UserError: unknown stage, or a name that cannot be part of a file name.
    """
    settings = config.stage(stage)
    if hasattr(settings, "grid"):
        names = tuple(point.name for point in settings.grid)
    else:
        names = getattr(settings, "candidates", ())
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(f"{stage}: candidate '{name}' may hold letters, digits, '_', '.' and '-' only")
    return names


def named_candidate(config: RunConfig, name: str) -> Candidate:
    """A candidate by its name in the config's mixers; `jet_static` is JetBlock with a static convolution."""
    mixer = config.mixers[name.removesuffix(STATIC)]
    if not name.endswith(STATIC):
        return Candidate(name, mixer)
    if "static_kernel" not in type(mixer).model_fields:
        raise UserError(f"candidate '{name}': only jet has a static variant")
    return Candidate(name, mixer.replace(static_kernel=True), ablation=True)


def resized_candidate(mixer: MixerConfig, point: GridPoint) -> Candidate:
    """A point of the grid of the hardware search, as sizes of a mixer."""
    sizes = {"num_heads": point.heads, "head_dim": point.d_k, "expand_v": point.d_v / point.d_k}
    return Candidate(point.name, mixer.replace(**sizes))


def candidate_recipe(config: RunConfig, stage: str, candidate: Candidate) -> dict[str, Any]:
    """What of a config decides a candidate's result, given the placement. Of several with equal recipes, one trains."""
    settings = config.stage(stage).to_dict()
    return {
        "candidate": candidate.to_dict(),
        "settings": {key: settings[key] for key in ("training", "throughput", "eval", "init")},
    }


def taken_over(config: RunConfig, stage: str) -> tuple[str, ...]:
    """The earlier stages whose equal candidates a selection stage takes over instead of training them again.

    Where stage 1 continues the winner, a result alone does not do: its weights are gone. All train there.
    """
    if "stage1" in config.stages and config.stage1.init == "search" and stage == last_selection(config):
        return ()
    return SELECTION_STAGES[: SELECTION_STAGES.index(stage)]


def split_target(target: str) -> tuple[str, str | None]:
    """`"stage1"` -> `("stage1", None)`, `"new_block:jet"` -> `("new_block", "jet")`."""
    stage, colon, candidate = target.partition(":")
    if colon and not candidate:
        raise UserError(f"'{target}': write STAGE or STAGE:CANDIDATE")
    return stage, candidate or None
