"""This process among the others, as torchrun or srun say it in the environment. No torch."""

import os
from collections.abc import Mapping

from megatron_jet.configs.errors import UserError

# Left over in a shell, they would make a lone process wait for others.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment_rank(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, world size); (0, 1) where nobody set them.

    Raises:
        UserError: they are no numbers, do not fit together, or nobody says where the others are.
    """
    found = []
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1)):
        text = environment.get(name, str(default))
        if not (text.isascii() and text.isdigit()):
            raise UserError(f"{name}={text} in the environment is no number; unset it, or start with torchrun")
        found.append(int(text))
    rank, size = found
    if not rank < size:
        raise UserError(f"RANK={rank} and WORLD_SIZE={size} in the environment do not fit; unset them, or use torchrun")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "RANK") if name not in environment]
    if size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE is above 1 but {missing[0]} is not set; start the processes with torchrun, or unset "
            "WORLD_SIZE where it was left over"
        )
    return rank, size
