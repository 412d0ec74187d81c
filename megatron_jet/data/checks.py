"""Whether prepared data have what a run reads of them. Looks at index.json alone, so a login node can ask. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_file, read_json_object
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.stages import SEARCH_STAGES, SELECTION_STAGES, PlacementConfig
from megatron_jet.data.index import BUNDLED_SOURCES, SPLITS, DataIndex, SourceInfo, SplitInfo, split_info

USEFUL_PASSES = 4  # repeating data up to here is almost as good as new data (Muennighoff et al. 2023)


def check_data(config: RunConfig, index: DataIndex, teacher: ModelConfig, tokenizer: Path) -> None:
    """Check what of the data would end a stage of `config`, or spoil it, after days of training.

    Args:
        config: of the run.
        index: of its prepared data.
        teacher: shape of the teacher.
        tokenizer: HF directory of the run's tokenizer.

    Raises:
        UserError: another tokenizer; a split, blended source or objective that is not there; nothing that candidates
            could be ranked by; samples longer than a stage's sequences.
    """
    _check_tokenizer(index, teacher, tokenizer)
    for stage in config.stages:
        for split in splits_of(config, stage):
            split_info(index, split, config.data.path)
        if hasattr(config.stage(stage), "training"):
            check_training(config, index, stage)
    if any(stage in config.stages for stage in SEARCH_STAGES):
        _check_search(config, index)


def bundled_index(teacher: ModelConfig, tokenizer: Path) -> DataIndex:
    """What `check_data` may know of the bundled data before a run makes them: splits and sources, not their sizes."""
    path = tokenizer / "tokenizer.json"
    return DataIndex(
        vocab_size=teacher.vocab_size,
        end_of_text=0,
        seq_length=1,
        tokenizer_hash=hash_file(path) if path.is_file() else "",
        sources=BUNDLED_SOURCES,
        splits={split: SplitInfo(sources=dict.fromkeys(BUNDLED_SOURCES, 1), shards=[]) for split in SPLITS},
    )


def splits_of(config: RunConfig, stage: str) -> tuple[str, ...]:
    """The splits of the data that a stage reads."""
    data = config.data
    if stage == "placement":
        return data.train_split, data.search_split, data.heldout_split
    if stage in SELECTION_STAGES:
        validated = config.stage(stage).training.validation_interval
        return data.train_split, data.search_split, *([data.heldout_split] if validated else [])
    if stage in ("stage1", "stage2"):
        return data.train_split, data.heldout_split
    return (data.heldout_split,) if stage in ("export", "evaluate") else ()


def sources_of(index: DataIndex, split: str, where: str | Path) -> dict[str, SourceInfo]:
    """The sources of one split by name. Raises UserError when there is no such split."""
    return {name: index.sources[name] for name in sorted(split_info(index, split, where).sources)}


def check_training(config: RunConfig, index: DataIndex, stage: str) -> None:
    """Raise UserError when a stage blends a source that is not there, or meets a sample that its sequences cannot hold.

    Samples with answers are never cut, so that the longest one has to fit wherever it is read.
    """
    settings, data = config.stage(stage), config.data
    own = getattr(settings, "blend", None)
    where, blend = ("data.blend", data.blend) if own is None else (f"{stage}.blend", own)
    training = settings.training
    for split in (data.train_split, *([data.heldout_split] if training.validation_interval else [])):
        found = split_info(index, split, data.path)
        for source in blend or {}:
            if source not in found.sources:
                known = ", ".join(sorted(found.sources))
                raise UserError(f"{where}: the data have no source '{source}' in split '{split}'; they have {known}")
        longest = _longest(found, blend)
        if longest is not None and longest[1] > training.seq_length + 1:
            source, tokens = longest
            raise UserError(
                f"{stage}.training.seq_length={training.seq_length}: '{source}' has a sample of {tokens} tokens; "
                f"raise it, or prepare the data with --seq-length {training.seq_length}, which leaves longer ones out"
            )


def repeated_sources(config: RunConfig, index: DataIndex, stages: Sequence[str]) -> list[str]:
    """A line for each stage that reads a source more often than repetition helps."""
    notes = []
    for stage in stages:
        training = getattr(config.stage(stage), "training", None)
        if training is None:
            continue
        tokens = split_info(index, config.data.train_split, config.data.path).sources
        own = getattr(config.stage(stage), "blend", None)
        blend = (config.data.blend if own is None else own) or tokens
        total = sum(blend.values())
        passes = {name: training.tokens * weight / total / max(1, tokens[name]) for name, weight in blend.items()}
        source, most = max(passes.items(), key=lambda item: item[1])
        if most > USEFUL_PASSES:
            notes.append(
                f"{stage} reads source '{source}' ({tokens[source]:,} training tokens) about {most:,.0f} times; more "
                f"than {USEFUL_PASSES} passes teach little"
            )
    return notes


def check_objectives(settings: PlacementConfig, sources: Mapping[str, SourceInfo]) -> None:
    """Raise UserError when an objective is no eval set of the search split.

    Args:
        settings: of the placement stage.
        sources: what the search split holds, by name.
    """
    scored = [name for name, source in sources.items() if source.metric != "loss"]
    for key, used, names in (
        ("objective", settings.budget, scored),
        ("swa_objective", settings.swa_budget, list(sources)),
    ):
        name = getattr(settings, key)
        if used and name not in names:
            why = "has no accuracy" if name in sources else "is not in the search split"
            advice = [f"set placement.{key} to one of them"] if names else []
            if name.endswith("_qa"):
                advice.append(f"prepare the data with {name.removesuffix('_qa')}=FILE.jsonl")
            text = "; ".join([f"known: {', '.join(names) or 'none'}", *([" or ".join(advice)] if advice else [])])
            raise UserError(f"placement.{key}: '{name}' {why}; {text}")


def _check_search(config: RunConfig, index: DataIndex) -> None:
    split = config.data.search_split
    sources = sources_of(index, split, config.data.path)
    if "placement" in config.stages:
        check_objectives(config.placement, sources)
    ranked = next((stage for stage in SELECTION_STAGES if stage in config.stages), None)
    if ranked and all(source.metric == "loss" for source in sources.values()):
        raise UserError(
            f"{config.data.path}: no samples with answers in split '{split}', by which {ranked} ranks candidates; "
            'add jsonl lines {"prompt": ..., "answer": ...} (tools/prepare_data.py)'
        )


def _check_tokenizer(index: DataIndex, teacher: ModelConfig, tokenizer: Path) -> None:
    if index.vocab_size > teacher.vocab_size:
        raise UserError(
            f"the data were tokenised for a vocabulary of {index.vocab_size}, the teacher's has {teacher.vocab_size}; "
            "prepare them with the teacher's tokenizer"
        )
    path = tokenizer / "tokenizer.json"
    if path.is_file() and hash_file(path) != index.tokenizer_hash:
        raise UserError(
            f"the data were prepared with another tokenizer than {path}; prepare them again with --tokenizer "
            f"{tokenizer}, or set teacher.tokenizer to the directory of theirs"
        )
    if path.is_file():
        _check_ids(path, teacher.vocab_size)


def _check_ids(path: Path, vocab_size: int) -> None:
    """Raise UserError when a tokenizer makes ids that the teacher has no embedding for, as preparing does. Data of
    earlier versions were not looked at, and the first such id would end a stage, or be masked out without a word."""
    found = read_json_object(path)
    model = found.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = {}
    if isinstance(vocabulary, dict):
        ids = dict(vocabulary)
    elif isinstance(vocabulary, list):  # Unigram: pairs of token and score
        ids = {str(number): number for number in range(len(vocabulary))}
    added = found.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict):
            ids[str(token.get("content"))] = token.get("id")
    numbers = {token: number for token, number in ids.items() if isinstance(number, int)}
    largest = max(numbers, key=numbers.__getitem__, default=None)
    if largest is not None and numbers[largest] >= vocab_size:
        raise UserError(
            f"{path}: token {largest!r} has id {numbers[largest]}, the teacher's vocabulary ends at {vocab_size - 1}; "
            "set teacher.tokenizer to the teacher's own and prepare the data with it"
        )


def _longest(split: SplitInfo, blend: dict[str, float] | None) -> tuple[str, int] | None:
    """The longest uncut sample among the sources of a blend: source and tokens."""
    read = [(source, tokens) for source, tokens in split.longest.items() if blend is None or blend.get(source)]
    return max(read, key=lambda item: item[1], default=None)
