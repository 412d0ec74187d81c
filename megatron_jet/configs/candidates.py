"""Names of the candidates of selection stages. Each can be a job of its own: `run_stage RUN_DIR STAGE:NAME`."""

import re

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.run import RunConfig

# A name is part of job names, file names and commands.
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


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


def split_target(target: str) -> tuple[str, str | None]:
    """`"stage1"` -> `("stage1", None)`, `"new_block:jet"` -> `("new_block", "jet")`."""
    stage, colon, candidate = target.partition(":")
    if colon and not candidate:
        raise UserError(f"'{target}': write STAGE or STAGE:CANDIDATE")
    return stage, candidate or None
