"""Recipes by name. A recipe is a function without arguments that returns one complete RunConfig."""

import importlib
import traceback
from collections.abc import Callable
from pathlib import Path

from megatron_jet.configs.errors import UserError, usage_errors
from megatron_jet.configs.overrides import load_yaml
from megatron_jet.configs.recipes.distill import jet_nemotron_2b_distill, jet_nemotron_4b_distill, tiny_distill
from megatron_jet.configs.recipes.jet_nemotron import jet_nemotron_2b, jet_nemotron_4b
from megatron_jet.configs.recipes.tiny import tiny
from megatron_jet.configs.run import RunConfig

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "jet_nemotron_2b": jet_nemotron_2b,
    "jet_nemotron_4b": jet_nemotron_4b,
    "tiny_distill": tiny_distill,
    "jet_nemotron_2b_distill": jet_nemotron_2b_distill,
    "jet_nemotron_4b_distill": jet_nemotron_4b_distill,
}


@usage_errors()
def load_recipe(name: str) -> RunConfig:
    """A built-in recipe by name, the user's own as `package.module:function`, or a resolved config.yaml.

    Raises:
        UserError: no such recipe, module, function or file, a module or function of the user's that fails, or a
            function that does not return a RunConfig.
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
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:  # ValueError: an empty name
        raise UserError(f"recipe '{name}': cannot import {module_name} ({error})") from None
    except Exception as error:
        raise UserError(f"recipe '{name}': {module_name} fails: {_where(error)}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"recipe '{name}': {module_name} has no function '{function_name}'")
    try:
        config = function()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"recipe '{name}': the function fails: {_where(error)}") from None
    if not isinstance(config, RunConfig):
        raise UserError(f"recipe '{name}': returned {type(config).__name__}, not RunConfig")
    return config


def _where(error: Exception) -> str:
    """An exception of the user's code in one line: type, message, file and line."""
    if isinstance(error, SyntaxError):
        place = f"{error.filename}, line {error.lineno}"
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename}, line {frame.lineno}"
    message = " ".join(str(getattr(error, "msg", None) or error).split())
    return f"{type(error).__name__}: {message} ({place})"
