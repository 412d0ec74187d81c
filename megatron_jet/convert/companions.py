"""The files that travel with a model beside its weights: config, tokenizer, card, licence and modeling code."""

import os
import shutil
from pathlib import Path

from megatron_jet.configs.errors import UserError

MODELING = Path(__file__).parent / "hf"  # the code that hybrids carry
COMPANIONS = "hf"  # folder of a checkpoint that keeps them as they were
CARD = "README.md"

# Names of the files that make a tokenizer and a config, and of the texts that must travel with a model.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")  # one of them is always there
STEMS = ("config", "generation_config", "tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat")
TEXTS = (CARD, "LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


def modeling_files() -> list[Path]:
    """The modeling code, in this tree."""
    return [path for path in sorted(MODELING.glob("*.py")) if path.name != "__init__.py"]


def is_companion(path: Path) -> bool:
    """Whether a file is one of them, by its name."""
    text = path.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken")
    named = path.name.startswith(STEMS) or path.suffix in (".model", ".tiktoken")
    legal = path.name.startswith(TEXTS) and path.suffix in ("", ".md", ".txt")
    return legal or (text and named)


def check_inside(path: Path, directory: Path) -> None:
    """Raise UserError where a file is a link that leads out of a directory."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
        raise UserError(f"{path} is a link that leads out of {directory}; put the file itself there")


def copy_companions(source: Path, out: Path, skip: tuple[str, ...] = (), within: Path | None = None) -> None:
    """Copy them; weights, code and what else lies beside them stay.

    Args:
        within: links must not lead out of this directory: a stranger's checkpoint would put a file of its reader's into
            what he publishes. None: they may, as those of a download cache do.

    Raises:
        UserError: names a link that leads out.
    """
    out.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and is_companion(path) and path.name not in skip:
            if within is not None:
                check_inside(path, within)
            shutil.copyfile(path, out / path.name)
