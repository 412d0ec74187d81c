"""One prepared directory out of several: what one run over all inputs would make, but for the borders of shards."""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import write_json
from megatron_jet.data.directory import check_output, directory_for
from megatron_jet.data.index import DataIndex, ShardInfo, SourceInfo, read_index
from megatron_jet.data.inputs import TEXT_SUFFIXES
from megatron_jet.data.output import split_infos
from megatron_jet.data.progress import Done, Watch
from megatron_jet.data.shards import check_shard, check_shard_ends, shard_path

EMPTY = hashlib.sha256(b"").hexdigest()
# What all parts have in common, and how to say it.
AGREED = {
    "tokenizer_hash": "prepared with another tokenizer",
    "vocab_size": "prepared for another vocabulary size",
    "end_of_text": "prepared with another end-of-text token",
    "begin_of_text": "prepared with another beginning of texts",
    "seq_length": "prepared with another --seq-length",
    "split_by": "prepared with another rule for splits (earlier versions went by path)",
}


@dataclass(frozen=True)
class Part:
    """A prepared directory and its index."""

    directory: Path
    index: DataIndex


def merge(
    directories: Sequence[Path],
    out: Path,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
    watch: Watch = lambda done: None,
) -> DataIndex:
    """Write the directory `out` with the shards of all parts, all of it or nothing. The parts stay as they are.

    Shards are hard links where the file system has them, else copies, whose checksums are compared.

    Args:
        force: replace an earlier output.
        say: gets lines of news.
        watch: told after every shard how far the work is.

    Raises:
        UserError: parts that do not go together, hold the same documents, or are damaged; an existing `out` that is not
            to be replaced.
    """
    check_output(out, directories, force)
    for directory in directories:
        if sum(directory.resolve() == other.resolve() for other in directories) > 1:
            raise UserError(f"{directory}: given twice; give every part once")
    parts = [Part(directory, read_index(directory)) for directory in directories]
    for part in parts[1:]:
        _check_agreement(parts[0], part)
    sources = _sources(parts)
    inputs = _inputs(parts)
    _check_shards(parts)
    with directory_for(out) as folder:
        check_output(out, directories, force)  # again: another process may have made it until now
        shards, copied = _take_shards(parts, folder, watch)
        index = parts[0].index.model_copy(
            update={"inputs": inputs, "sources": sources, "splits": split_infos(shards, _longest(parts))}
        )
        write_json(folder / "index.json", index.to_dict())
    total = sum(map(len, shards.values()))
    say(f"{len(parts)} parts, {total:,} shards: {total - copied:,} hard links, {copied:,} copies")
    return index


def _check_agreement(first: Part, other: Part) -> None:
    for name, problem in AGREED.items():
        ours, theirs = getattr(first.index, name), getattr(other.index, name)
        if ours != theirs:
            values = "" if name == "tokenizer_hash" else f" ({theirs}, not {ours})"
            raise UserError(
                f"{other.directory}: {problem} than {first.directory}{values}; prepare it again like that one"
            )


def _sources(parts: list[Part]) -> dict[str, SourceInfo]:
    """Of all parts, sorted. Raises UserError when two parts read or score a source in different ways."""
    found: dict[str, tuple[SourceInfo, Part]] = {}
    for part in parts:
        for name, info in part.index.sources.items():
            known, where = found.setdefault(name, (info, part))
            if known != info:
                raise UserError(
                    f"{part.directory}: source '{name}' is {_words(info)}, in {where.directory} {_words(known)}; "
                    "prepare one of them again under another name"
                )
    return {name: info for name, (info, _) in sorted(found.items())}


def _words(info: SourceInfo) -> str:
    choices = "" if info.choices is None else f", {len(info.choices)} choices"
    return f"of packing '{info.packing}' and metric '{info.metric}'{choices}"


def _inputs(parts: list[Part]) -> dict[str, str]:
    """Checksums by input file.

    Raises:
        UserError: a file that two parts have, by its path or, of files with many documents, by its content. Files of
            code and text may well be alike.
    """
    inputs: dict[str, str] = {}
    by_path: dict[str, Part] = {}
    by_content: dict[str, tuple[str, Part]] = {}
    for part in parts:
        for path, checksum in part.index.inputs.items():
            other = by_path.setdefault(path, part)
            if other is not part:
                raise UserError(f"{path}: an input of both {other.directory} and {part.directory}; leave it out of one")
            if not path.endswith(TEXT_SUFFIXES) and checksum != EMPTY:
                same, other = by_content.setdefault(checksum, (path, part))
                if other is not part:
                    raise UserError(
                        f"{path}, an input of {part.directory}, has the same content as {same}, an input of "
                        f"{other.directory}; leave it out of one"
                    )
            inputs[path] = checksum
    return inputs


def _check_shards(parts: list[Part]) -> None:
    """Raise UserError when a shard is missing or cut short, or two are the same."""
    seen: dict[str, Part] = {}
    for part in parts:
        for shard in _shards(part):
            check_shard_ends(part.directory, shard)
            other = seen.setdefault(shard.sha256, part)
            if other is not part:
                raise UserError(
                    f"{part.directory}: its shard {shard.path} is also in {other.directory}; give --stdlib and "
                    "--synthetic to one part only"
                )


def _shards(part: Part) -> list[ShardInfo]:
    return [shard for split in part.index.splits.values() for shard in split.shards]


def _longest(parts: list[Part]) -> dict[tuple[str, str], int]:
    longest: dict[tuple[str, str], int] = {}
    for part in parts:
        for split, info in part.index.splits.items():
            for source, tokens in info.longest.items():
                longest[split, source] = max(longest.get((split, source), 0), tokens)
    return longest


def _take_shards(parts: list[Part], folder: Path, watch: Watch) -> tuple[dict[str, list[ShardInfo]], int]:
    """Link or copy all shards under new numbers. Returns them by split, sorted by source, and how many are copies."""
    every = [
        (name, shard, part) for part in parts for name, split in part.index.splits.items() for shard in split.shards
    ]
    every.sort(key=lambda item: (item[0], item[1].source))  # stable: parts in the order given
    total = sum((part.directory / shard.path).stat().st_size for _, shard, part in every)
    taken: dict[str, list[ShardInfo]] = {}
    numbers: dict[tuple[str, str], int] = {}
    done = tokens = copied = 0
    for split, shard, part in every:
        number = numbers[split, shard.source] = numbers.get((split, shard.source), -1) + 1
        new = shard.model_copy(update={"path": shard_path(split, shard.source, number)})
        (folder / split).mkdir(exist_ok=True)
        copied += _link_or_copy(part.directory / shard.path, folder, new)
        taken.setdefault(split, []).append(new)
        tokens += shard.tokens
        done += (folder / new.path).stat().st_size
        watch(Done(done, total, tokens))
    return taken, copied


def _link_or_copy(origin: Path, folder: Path, shard: ShardInfo) -> bool:
    """Whether it had to be a copy. Raises UserError when the copy is not what the index says."""
    origin = origin.resolve()  # of a link the file, which outlives it
    try:
        os.link(origin, folder / shard.path)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(origin, folder / shard.path)
        try:
            check_shard(folder, shard)
        except UserError:
            raise UserError(f"shard {origin} is damaged; prepare that part again") from None
        return True
    return False
