"""Runs stages in a process that kills itself at a chosen point, as `kill -9` would."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from megatron.core import parallel_state

from megatron_jet.configs import directories
from megatron_jet.configs.overrides import load_yaml
from megatron_jet.configs.run import RunConfig
from megatron_jet.postnas import pipeline, scoring
from megatron_jet.postnas.processes import rank
from megatron_jet.postnas.stage import StageContext
from megatron_jet.training.trainer import Trainer


@dataclass(frozen=True)
class KillPoint:
    """Where to die.

    Attributes:
        where: "train" (before a step), "score" (before a walk over plans), "save" (inside a save of the trainer, its
            files half-written) or "write" (before a written checkpoint gets its name).
        job: for "train" and "save": name of the job, such as "placement/supernet".
        count: at which step, walk or write.
        on_rank: which process dies.
    """

    where: str
    count: int
    job: str = ""
    on_rank: int = 0


def run_stages(run_dir: str, stages: list[str], kill: KillPoint | None = None) -> None:
    """Run stages in this pool worker, whose world stays as it is."""
    parallel_state.destroy_model_parallel()  # stages set up layouts themselves
    if kill is not None:
        arm(kill)
    config = RunConfig.parse(load_yaml(Path(run_dir) / "config.yaml"))
    for stage in stages:
        pipeline.run_stage(StageContext(Path(run_dir), config), stage)


def arm(kill: KillPoint) -> None:
    """Put the kill in place. The process does not live on, so nothing is put back."""
    calls = [0]

    def die_before(function, matches=lambda *args: True):
        def wrapped(*args, **kwargs):
            if matches(*args):
                calls[0] += 1
                if calls[0] == kill.count and rank() == kill.on_rank:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    if kill.where == "train":
        Trainer.train_step = die_before(Trainer.train_step, lambda trainer, *_: trainer.job.name == kill.job)
    elif kill.where == "save":
        from megatron_jet.training.checkpoint_folder import CheckpointFolder

        folder = kill.job.replace("/", "/jobs/")
        CheckpointFolder._finish = die_before(CheckpointFolder._finish, lambda self, *_: folder in str(self.path))
    elif kill.where == "score":
        scoring.PlanScorer.score = die_before(scoring.PlanScorer.score)
    elif kill.where == "write":
        directories.os.rename = die_before(os.rename)
    else:
        raise ValueError(kill.where)
