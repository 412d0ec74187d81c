"""From a config to jobs: dependencies, sizes, costs."""

import pytest

from jet_launcher.slurm.graph import build_graph, graph_text
from megatron_jet.configs.candidates import candidate_names, split_target
from megatron_jet.configs.cluster import ClusterConfig
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.overrides import apply_overrides
from megatron_jet.configs.recipes.catalog import load_recipe
from megatron_jet.configs.teacher_source import teacher_model

BIG = ClusterConfig(nodes=4, gpus_per_node=8, exclusive=True)


@pytest.fixture(scope="module")
def paper():
    config = load_recipe("jet_nemotron_2b")
    return config, teacher_model(config.teacher)


def test_paper_run_has_one_job_per_stage_and_candidate(paper):
    config, teacher = paper
    graph = build_graph(config, teacher, config.stages, BIG)
    names = [job.name for job in graph.jobs]
    assert len(names) == len(set(names)) == 10 + 3 + 2 + 9
    by_name = {job.name: job for job in graph.jobs}
    for i, job in enumerate(graph.jobs):
        assert set(job.depends) <= set(names[:i]), "a job follows those it depends on"
    candidates = [job for job in graph.jobs if job.target.startswith("hardware_search:")]
    assert {job.depends for job in candidates} == {("new_block",)}
    assert by_name["hardware_search"].depends == tuple(job.name for job in candidates)
    assert by_name["stage1"].depends == ("hardware_search",)
    assert (by_name["stage1"].nodes, by_name["stage1"].nproc, by_name["stage1"].gpus) == (4, 8, 8)
    assert (by_name["export"].nodes, by_name["export"].nproc, by_name["export"].gpus) == (1, 1, 8), "whole nodes"
    assert by_name["hardware_search-96x256x12"].target == "hardware_search:96x256x12"


def test_table_stands_next_to_the_papers_hours(paper):
    config, teacher = paper
    text = graph_text(build_graph(config, teacher, config.stages, BIG))
    rows = {line.split()[0]: line.split() for line in text.rpartition("\n\n")[2].splitlines()}
    paper_hours = {stage: rows[stage][-5] for stage in rows if stage in config.stages}  # then memory and disk
    assert paper_hours == {
        "placement": "808",
        "block_selection": "3,120",
        "new_block": "624",
        "hardware_search": "5,616",
        "stage1": "624",
        "stage2": "7,536",
    }
    assert "TP1 PP1 DP32" in text
    assert "350.000B" in text


def test_tokens_and_hours_are_those_of_the_estimate(paper):
    config, teacher = paper
    graph = build_graph(config, teacher, config.stages, BIG)
    for stage in graph.estimate.stages:
        if stage.jobs:
            jobs = graph.of_stage(stage.stage)
            assert sum(job.gpu_hours or 0 for job in jobs) == pytest.approx(stage.gpu_hours)
            assert sum(job.tokens for job in jobs) == pytest.approx(stage.tokens, abs=len(jobs))


@pytest.mark.parametrize("init", ["search", "teacher"])
def test_reused_candidates_are_shown_and_cost_nothing(paper, init):
    """Where stage 1 continues the winner, the last search needs the weights of all its candidates, and trains them."""
    config, teacher = paper
    assert config.stage1.init == "search"
    config = config.replace(stage1=config.stage1.replace(init=init))
    graph = build_graph(config, teacher, config.stages, BIG)
    reused = {job.name: job.reused_from for job in graph.jobs if job.reused_from}
    of_sizes = {} if init == "search" else {"hardware_search-192x384x4": "block_selection"}
    assert reused == dict.fromkeys(("new_block-gated_delta_net", "new_block-jet"), "block_selection") | of_sizes
    assert all((job.tokens, job.gpu_hours) == (0, 0) for job in graph.jobs if job.reused_from)
    text = graph_text(graph)
    assert "reused from block_selection" in text and "0 + 2 reused" in text
    assert ("8 + 1 reused" in text) == (init == "teacher")


def test_times_that_do_not_fit_are_noted(paper):
    """Checkpoints further apart than the time limit, and a warning too short to write one."""
    config, teacher = paper
    graph = build_graph(config, teacher, config.stages, BIG)
    assert graph.notes == ()
    between = [job.checkpoint_seconds for job in graph.jobs if job.checkpoint_seconds]
    assert 600 < min(between) < max(between) < 1800, "every 10 to 30 minutes by the forecast"
    sparse = apply_overrides(config, ["stage2.training.checkpoint_interval=10000"])
    hasty = ClusterConfig(nodes=4, gpus_per_node=8, time_limit="04:00:00", early_warning_seconds=20)
    graph = build_graph(sparse, teacher, config.stages, hasty)
    assert len(graph.notes) == 2
    assert "stage2: about 6.3 h between checkpoints, longer than time_limit=04:00:00" in graph.notes[0]
    assert "stage2: a checkpoint has 25.6 GiB; at 1 GB/s, early_warning_seconds=20 is less than twice" in graph.notes[1]
    assert all(f"note: {note}" in graph_text(graph) for note in graph.notes)


def test_finished_jobs_are_left_out_and_nobody_waits_for_them(paper):
    config, teacher = paper
    graph = build_graph(config, teacher, ("placement", "block_selection"), BIG)
    left = graph.without({"placement", "block_selection-gla"})
    assert [job.name for job in left.jobs] == [
        "block_selection-gated_delta_net",
        "block_selection-jet",
        "block_selection",
    ]
    assert left.jobs[0].depends == ()
    assert left.jobs[2].depends == ("block_selection-gated_delta_net", "block_selection-jet")


def test_what_does_not_fit_the_cluster_is_named(paper):
    config, teacher = paper
    with pytest.raises(
        UserError, match=r"placement.resources.nodes=4, .*: the cluster file gives a job 2 nodes at most"
    ):
        build_graph(config, teacher, config.stages, ClusterConfig(nodes=2, gpus_per_node=8))
    with pytest.raises(UserError, match="nproc=8: nodes of this cluster have gpus_per_node=4"):
        build_graph(config, teacher, ("report",), ClusterConfig(nodes=4, gpus_per_node=4))


def test_gpus_follow_the_processes_on_shared_nodes(paper):
    config, teacher = paper
    jobs = build_graph(config, teacher, ("stage1", "export"), ClusterConfig(nodes=4, gpus_per_node=8)).jobs
    assert [job.gpus for job in jobs] == [8, 1]
    jobs = build_graph(config, teacher, ("stage1", "export"), ClusterConfig(nodes=4)).jobs
    assert [job.gpus for job in jobs] == [0, 0]


def test_candidate_names(paper):
    config, _ = paper
    assert candidate_names(config, "block_selection") == ("gla", "gated_delta_net", "jet")
    assert candidate_names(config, "hardware_search")[0] == "256x288x4"
    assert candidate_names(config, "stage1") == () == candidate_names(config, "export")
    config = apply_overrides(config, ["new_block.candidates=[jet_static]"])
    assert candidate_names(config, "new_block") == ("jet_static",)
    assert split_target("new_block:jet") == ("new_block", "jet")
    assert split_target("export") == ("export", None)
    with pytest.raises(UserError, match="STAGE:CANDIDATE"):
        split_target("new_block:")
