"""What slurm/postnas.sbatch needs to submit one stage without NeMo-Run: a prelude for the job, and sbatch's options.

    python -m jet_launcher.slurm.plain CLUSTER RUN_DIR STAGE[:CANDIDATE] [RECIPE [key.sub=value ...]]

Prints the prelude's path and then one option a line.
"""

import sys
from pathlib import Path

from jet_launcher.cluster_launch import load_target
from jet_launcher.exit_codes import DONE, FAILED, USAGE
from jet_launcher.options import check_inputs
from jet_launcher.run_directory import RunDirectory, find_run, open_run
from jet_launcher.slurm.experiment import check_path
from jet_launcher.slurm.graph import Job, build_graph
from jet_launcher.slurm.launch import ROOT, Target, job_place
from jet_launcher.slurm.package import ship_code
from jet_launcher.slurm.scripts import JobPlace, sbatch_options, setup_lines, write_scripts
from megatron_jet.configs.candidates import split_target
from megatron_jet.configs.cluster import ClusterConfig
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import write_text
from megatron_jet.configs.overrides import apply_overrides
from megatron_jet.configs.recipes.catalog import load_recipe
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.teacher_source import expand_paths


def plan(cluster_name: str, run_dir: str, target: str, recipe: list[str]) -> list[str]:
    """Ship the code, write prelude and step script. Returns the prelude's path and sbatch's options.

    Raises:
        UserError: unknown cluster, stage or candidate, a run directory that is missing or holds another config.
    """
    chosen = load_target(cluster_name)
    if not isinstance(chosen, Target):
        raise UserError(f"cluster '{cluster_name}' does not run sbatch here; give one with Slurm and a local tunnel")
    run, config = _run(run_dir, recipe)
    check_path("run directory", run.path.resolve())
    job = _job(config, target, chosen.cluster)
    place = job_place(run, chosen.cluster, ship_code(ROOT, run.path.resolve()).path)
    write_scripts([job], chosen.cluster, place)
    prelude = place.cluster_dir / "plain" / f"{job.name}.sh"
    write_text(prelude, setup_lines(job, chosen.cluster, place) + "\n")
    return [str(prelude), *_options(run, job, chosen.cluster, place)]


def _run(run_dir: str, recipe: list[str]) -> tuple[RunDirectory, RunConfig]:
    if not recipe:
        run = find_run(run_dir)
        return run, run.config()
    config = expand_paths(apply_overrides(load_recipe(recipe[0]), recipe[1:]))
    check_inputs(config)
    return open_run(config, Path(run_dir)), config


def _job(config: RunConfig, target: str, cluster: ClusterConfig) -> Job:
    stage, _ = split_target(target)
    config.stage(stage)
    jobs = {job.target: job for job in build_graph(config, check_inputs(config), (stage,), cluster).jobs}
    if target not in jobs:
        raise UserError(f"'{target}' is no job of this run; known: {', '.join(jobs)}")
    return jobs[target]


def _options(run: RunDirectory, job: Job, cluster: ClusterConfig, place: JobPlace) -> list[str]:
    place.log_dir(job).mkdir(parents=True, exist_ok=True)
    options = {
        **sbatch_options(job, cluster),
        "job-name": f"{run.id}.{job.name}",
        "output": str(place.log_dir(job) / f"{job.name}.%j.batch.log"),
    }
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()]


def main(arguments: list[str]) -> int:
    """Command line. One `error:` line for bad input."""
    if len(arguments) < 3:
        print(__doc__, file=sys.stderr)
        return USAGE
    try:
        print("\n".join(plan(arguments[0], arguments[1], arguments[2], arguments[3:])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
