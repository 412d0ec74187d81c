"""kill -9 of a worker anywhere, one process or two: the rerun ends like a run that was left alone."""

import pytest

import miniature
from kill_points import KillPoint, run_stages
from megatron_jet.configs.files import read_json
from megatron_jet.postnas.stage import strip_measured
from pool import WorkerFailure

STAGES = ["prepare", "placement", "block_selection", "stage1"]
# In the order in which a run reaches them; each attempt dies at the next one.
KILLS = [
    KillPoint("write", 1),  # the imported teacher is complete but has no name yet
    KillPoint("train", 4, "placement/supernet"),  # a step after a checkpoint
    KillPoint("save", 1, "placement/supernet"),  # half-way through the last checkpoint
    KillPoint("score", 2),  # second round of the search
    KillPoint("train", 2, "placement/compare_uniform"),
    KillPoint("train", 1, "block_selection/gated_delta_net"),
    KillPoint("score", 1),  # that candidate is trained but has no scores
    KillPoint("train", 4, "stage1/student"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("kill")
    miniature.write_inputs(path)
    return path


@pytest.fixture(scope="module")
def undisturbed(root, pool):
    """Results of runs that nothing happened to, by number of processes."""
    runs = {}
    for nproc in (1, 2):
        run = open_run(root, f"undisturbed{nproc}")
        pool.run(run_stages, str(run), STAGES, world_size=nproc)
        runs[nproc] = results(run)
    return runs


def open_run(root, name):
    config = miniature.config(root)
    two = config.block_selection.replace(candidates=("gla", "gated_delta_net"))
    declared = config.placement.replace(comparison="declared")
    return miniature.open_run(root, name, placement=declared, block_selection=two, stages=tuple(STAGES))


def results(run) -> dict:
    return {stage: strip_measured(read_json(run / "stages" / stage / "result.json")) for stage in STAGES}


def attempt(pool, run, nproc: int, kill: KillPoint) -> None:
    with pytest.raises(WorkerFailure):
        pool.run(run_stages, str(run), STAGES, kill, world_size=nproc)


def test_one_process_killed_again_and_again(root, pool, undisturbed):
    run = open_run(root, "disturbed1")
    for kill in KILLS:
        attempt(pool, run, 1, kill)
    pool.run(run_stages, str(run), STAGES, world_size=1)
    assert results(run) == undisturbed[1]
    assert not [path for path in run.rglob(".*") if path.name != ".metadata"], "half-written files must not stay"


def test_either_of_two_processes_killed(root, pool, undisturbed):
    run = open_run(root, "disturbed2")
    attempt(pool, run, 2, KillPoint("train", 4, "placement/supernet", on_rank=1))
    attempt(pool, run, 2, KillPoint("score", 2, on_rank=0))
    attempt(pool, run, 2, KillPoint("score", 1, on_rank=1))
    attempt(pool, run, 2, KillPoint("train", 4, "stage1/student", on_rank=0))
    pool.run(run_stages, str(run), STAGES, world_size=2)
    assert results(run) == undisturbed[2]


def test_two_processes_find_what_one_finds(undisturbed):
    """Gradients are summed in another order over two processes, so losses agree to round-off, not bit by bit."""
    one, two = undisturbed[1], undisturbed[2]
    compare(strip_hashes(one["placement"]), strip_hashes(two["placement"]))
    compare(strip_hashes(one["stage1"]), strip_hashes(two["stage1"]))
    for a, b in zip(one["block_selection"]["candidates"], two["block_selection"]["candidates"], strict=True):
        compare(strip_hashes(a), strip_hashes(b))


def strip_hashes(value: dict) -> dict:
    return {key: item for key, item in value.items() if key not in ("inputs_hash", "recipe_hash")}


def compare(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert set(a) == set(b)
        for key in a:
            compare(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            compare(x, y)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)
    else:
        assert a == b
