"""From a stage's name to the object that does it. The list is `STAGES` in configs/stages.py."""

import importlib

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.stages import STAGES
from megatron_jet.postnas.stage import Stage


def stage_named(name: str) -> Stage:
    """A stage by name. Raises UserError for an unknown one."""
    if name not in STAGES:
        raise UserError(f"unknown stage '{name}'; known: {', '.join(STAGES)}")
    module, _, attribute = STAGES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
