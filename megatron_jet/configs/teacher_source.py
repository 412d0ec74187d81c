"""Where a run's inputs are: `${VAR}` expansion, the bundled teacher, and the shape of a teacher. No torch."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from megatron_jet.configs.errors import UserError, usage_errors
from megatron_jet.configs.files import home_expanded, read_json
from megatron_jet.configs.hf_format import model_from_hf
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.recipes.known_models import KNOWN_MODELS
from megatron_jet.configs.run import RunConfig, TeacherConfig

BUNDLED = "bundled:"
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def expand_variables(text: str, where: str, environment: Mapping[str, str] = os.environ) -> str:
    """Replace each `${VAR}` by its value.

    Raises:
        UserError: a variable is not set; names it and the config key `where`.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in environment:
            raise UserError(
                f"{where}={text}: the environment variable {name} is not set; export it or override {where}"
            )
        return environment[name]

    return _VARIABLE.sub(value, text)


@usage_errors()
def expand_paths(config: RunConfig, environment: Mapping[str, str] = os.environ) -> RunConfig:
    """The config with `${VAR}` replaced in every path, so that the run directory needs no environment any more."""
    teacher = config.teacher
    tokenizer = teacher.tokenizer and expand_variables(teacher.tokenizer, "teacher.tokenizer", environment)
    path = expand_variables(teacher.path, "teacher.path", environment)
    data = expand_variables(config.data.path, "data.path", environment)
    data = str(home_expanded(data, "data.path")) if data.startswith("~") else data  # nobody after this does
    return config.replace(teacher=TeacherConfig(path=path, tokenizer=tokenizer), data=config.data.replace(path=data))


def resolve_teacher(teacher: TeacherConfig) -> Path:
    """Directory of the teacher in Hugging Face format.

    Raises:
        UserError: an unknown bundled teacher, or a directory that is missing or has no config.json.
    """
    if teacher.path.startswith(BUNDLED):
        return _bundled(teacher.path.removeprefix(BUNDLED))
    path = home_expanded(teacher.path, "teacher.path")
    if not path.is_dir():
        raise UserError(f"teacher.path={teacher.path}: no such directory; give a Hugging Face model directory")
    if not (path / "config.json").is_file():
        raise UserError(f"teacher.path={teacher.path}: no config.json in it; give a Hugging Face model directory")
    return path


def tokenizer_directory(teacher: TeacherConfig) -> Path:
    """Directory of the tokenizer: the teacher's unless another is given. Raises UserError when it is missing."""
    given = teacher.tokenizer
    if given is None or given.startswith(BUNDLED):
        return resolve_teacher(teacher)
    path = home_expanded(given, "teacher.tokenizer")
    if not path.is_dir():
        raise UserError(f"teacher.tokenizer={given}: no such directory")
    return path


def _bundled(name: str) -> Path:
    shelf = Path(__file__).parents[1] / "teachers"
    known = sorted(path.parent.name for path in shelf.glob("*/config.json"))
    if name not in known:
        raise UserError(f"teacher.path={BUNDLED}{name}: no such bundled teacher; known: {', '.join(known) or 'none'}")
    return shelf / name


def teacher_model(teacher: TeacherConfig) -> ModelConfig:
    """Shape of the teacher, from its config.json, or from the known models when it is not on this machine.

    Raises:
        UserError: the teacher is not here and its directory name is not that of a known model.
    """
    name = Path(teacher.path).name
    try:
        path = resolve_teacher(teacher)
    except UserError:
        if name in KNOWN_MODELS:
            return KNOWN_MODELS[name]()
        raise
    return model_from_hf(read_json(path / "config.json"), str(path / "config.json"))
