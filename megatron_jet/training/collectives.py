"""Small agreements between all ranks."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_jet.configs import checksums
from megatron_jet.configs.errors import UserError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # of everything that ranks do together; a rank that is later counts as hung


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank: a signal may reach only some, and all must stop after the same step."""
    if dist.get_world_size() == 1:
        return flag
    tensor = torch.tensor(float(flag), device=torch.cuda.current_device())
    dist.all_reduce(tensor)
    return bool(tensor.item())


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on all ranks. What lies in a shared folder is looked at by one rank, so that none disagrees."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_rank_0(action: Callable[[], None]) -> None:
    """Do something on rank 0 alone. When it fails, all ranks raise, so that none waits for the others for ever.

    Raises:
        OSError: on all ranks, what rank 0 met.
    """
    problem = None
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            problem = error.strerror or str(error)
        except UserError as error:
            problem = str(error)
    problem = from_rank_0(problem)
    if problem is not None:
        raise OSError(problem)


def all_ranks(value: Any) -> list:
    """Every rank's value, in order."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_problem(problem: str | None) -> str | None:
    """The first rank's problem that has one, on all ranks."""
    return next((p for p in all_ranks(problem) if p is not None), None)


def record_checksums(directory: Path) -> None:
    """Hash every file of a directory and write the result beside them. Ranks share the work. Collective.

    Raises:
        OSError: on all ranks, what some rank met.
    """
    names = from_rank_0(checksums.files_in(directory) if dist.get_rank() == 0 else None)
    hashes, problem = {}, None
    try:
        own = [
            name for turn, name in enumerate(names) if _writer(name, turn) % dist.get_world_size() == dist.get_rank()
        ]
        hashes = checksums.hash_files(directory, own)
    except (OSError, UserError) as error:
        problem = str(error)
    problem = first_problem(problem)
    if problem is not None:
        raise OSError(problem)
    merged = {name: value for part in all_ranks(hashes) for name, value in part.items()}
    on_rank_0(lambda: checksums.write_checksums(directory, merged))


def verify_checksums(directory: Path) -> None:
    """Check every file of a checkpoint against what was recorded. Ranks share the work. Collective.

    Raises:
        DamagedError: on all ranks, naming a file.
    """
    expected, problem = None, None
    if dist.get_rank() == 0:
        try:
            expected = checksums.read_checksums(directory)
        except checksums.DamagedError as error:
            problem = str(error)
    expected, problem = from_rank_0((expected, problem))
    if problem is not None:
        raise checksums.DamagedError(problem, directory)
    if expected is None:
        return
    own = list(expected)[dist.get_rank() :: dist.get_world_size()]
    problem = first_problem(checksums.first_difference(directory, own, expected))
    if problem is not None:
        raise checksums.damaged(directory, problem)


def _writer(name: str, turn: int) -> int:
    """The rank that wrote a file (`__<rank>_<n>.distcp`), which still has it in memory; `turn` for files of no rank."""
    number = Path(name).name.removeprefix("__").partition("_")[0]
    return int(number) if number.isdigit() else turn
