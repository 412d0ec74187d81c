"""Recipes by name. A recipe is a function without arguments that returns one complete RunConfig."""

import importlib
from collections.abc import Callable
from pathlib import Path

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.overrides import load_yaml
from megatron_jet.configs.recipes.jet_nemotron import jet_nemotron_2b, jet_nemotron_4b
from megatron_jet.configs.recipes.tiny import tiny
from megatron_jet.configs.run import RunConfig

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "jet_nemotron_2b": jet_nemotron_2b,
    "jet_nemotron_4b": jet_nemotron_4b,
}


def load_recipe(name: str) -> RunConfig:
    """A built-in recipe by name, the user's own as `package.module:function`, or a resolved config.yaml.

    Raises:
        UserError: no such recipe, module, function or file, or a function that does not return a RunConfig.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        return RunConfig.parse(load_yaml(name), name)
    if ":" in name:
        return _load_function(name)
    raise UserError(
        f"unknown recipe '{name}'; known: {', '.join(RECIPES)}, or give package.module:function or a config.yaml"
    )


def _load_function(name: str) -> RunConfig:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise UserError(f"recipe '{name}': cannot import {module_name} ({error})") from None
    except AttributeError:
        raise UserError(f"recipe '{name}': {module_name} has no function '{function_name}'") from None
    config = function()
    if not isinstance(config, RunConfig):
        raise UserError(f"recipe '{name}': returned {type(config).__name__}, not RunConfig")
    return config
