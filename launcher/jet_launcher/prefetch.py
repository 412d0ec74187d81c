"""What a run needs that compute nodes without a network cannot fetch: teacher, tokenizer, data."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_jet.configs.errors import UserError, usage_errors
from megatron_jet.configs.files import home_expanded, read_json_object
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.teacher_source import BUNDLED

# Hub repositories of the teachers that recipes name by directory.
HUB = {"Qwen2.5-1.5B": "Qwen/Qwen2.5-1.5B", "Qwen2.5-3B": "Qwen/Qwen2.5-3B", "Qwen3-1.7B": "Qwen/Qwen3-1.7B"}
# Weights in safetensors, configs and tokenizer; no pickles, no code.
PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "LICENSE*", "README.md")


@dataclass(frozen=True)
class Item:
    """One thing that has to be on the shared file system.

    Attributes:
        what: the config key.
        path: where the run expects it.
        present: whether it is there.
        repository: where it comes from; None: a person has to make it.
        hint: how.
    """

    what: str
    path: Path
    present: bool
    repository: str | None = None
    hint: str = ""


def needed(config: RunConfig) -> list[Item]:
    """Everything that a run reads from outside of its code and run directory. Paths are expanded already."""
    items = []
    paths = {"teacher.path": config.teacher.path, "teacher.tokenizer": config.teacher.tokenizer}
    for what, text in paths.items():
        if text is None or text.startswith(BUNDLED):
            continue
        path = home_expanded(text, what)
        marker = "config.json" if what == "teacher.path" else "tokenizer.json"
        repository = HUB.get(path.name)
        hint = "" if repository else f"put a Hugging Face directory there, or name it like one of {', '.join(HUB)}"
        items.append(Item(what, path, _complete(path, marker), repository, hint))
    if config.data.path != "bundled":
        path = home_expanded(config.data.path, "data.path")
        hint = f"make it: python tools/prepare_data.py FILES {path} --tokenizer {config.teacher.path}"
        items.append(Item("data.path", path, (path / "index.json").is_file(), hint=hint))
    return items


def fetch(items: list[Item], download: Callable[[str, Path], None], say: Callable[[str], None]) -> list[Item]:
    """Download what is missing and has a repository. Returns what is still missing after that."""
    left = []
    for item in items:
        if item.present:
            say(f"{item.what}: {item.path} is there")
        elif item.repository is None:
            say(f"{item.what}: {item.path} is missing; {item.hint}")
            left.append(item)
        else:
            say(f"{item.what}: {item.repository} -> {item.path}")
            download(item.repository, item.path)
    return left


def hub_download(repository: str, path: Path) -> None:
    """Download a repository into `path`; interrupted downloads continue.

    Raises:
        UserError: huggingface_hub is missing, or the Hub cannot be reached.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError("prefetch needs huggingface_hub: pip install 'megatron-jet[train]'") from None
    try:
        snapshot_download(repository, local_dir=path, allow_patterns=list(PATTERNS))
    except Exception as error:  # the Hub's client raises errors of several libraries
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{repository}: cannot be downloaded ({reason}); run this where there is a network") from None


@usage_errors()
def refuse_missing(config: RunConfig) -> None:
    """Raise UserError when a job would need a network to get its inputs."""
    missing = [item for item in needed(config) if not item.present]
    if missing:
        names = "; ".join(f"{item.what}={item.path}" for item in missing)
        raise UserError(
            f"missing here, and compute nodes have no network: {names}. "
            f"On a machine with one: python tools/prefetch.py {config.recipe}"
        )


def _complete(path: Path, marker: str) -> bool:
    """A directory with its marker file and, where that is a model's config, all of its weights."""
    if not (path / marker).is_file():
        return False
    if marker != "config.json" or (path / "model.safetensors").is_file():
        return True
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return False  # a download that stopped after the small files
    try:
        shards = read_json_object(index).get("weight_map")
    except UserError:
        return False  # a download that stopped inside of it
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        return False
    return bool(shards) and all((path / shard).is_file() for shard in set(shards.values()))
