"""What other jobs left in the environment."""

import pytest

from jet_launcher.processes import worker_environment
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.ranks import RANK_VARIABLES, environment_rank

REST = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [({}, (0, 1)), ({"WORLD_SIZE": "1"}, (0, 1)), ({"WORLD_SIZE": "4", "RANK": "3", **REST}, (3, 4))],
)
def test_rank(environment, found):
    assert environment_rank(environment) == found


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE="),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2"),
        ({"WORLD_SIZE": "0"}, "do not fit"),
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", **REST}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", **REST}, "do not fit"),
        ({"RANK": "1.0"}, "RANK=1.0"),
        ({"RANK": "1"}, "do not fit"),
    ],
)
def test_leftovers_are_one_line(environment, message):
    with pytest.raises(UserError, match=message):
        environment_rank(environment)


def test_worker_of_the_launcher_does_not_see_them(tmp_path):
    leftovers = dict.fromkeys(RANK_VARIABLES, "2")
    assert not leftovers.keys() & worker_environment(1, tmp_path, {"PATH": "/bin", **leftovers}).keys()
