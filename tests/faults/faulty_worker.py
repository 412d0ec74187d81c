"""The worker with one fault in it: `JET_WORKER=faulty_worker FAULT=ACTION@PLACE` in front of a launch.

ACTION is TERM, STOP or KILL (that signal, to this process) or NAN (a weight goes bad). PLACE is one of PLACES, with
`:STEP` for those that happen at every step. It happens once, on rank FAULT_RANK (0).
"""

import os
import signal
import sys

from megatron_jet import run_stage
from megatron_jet.training import cpu_backend

cpu_backend.install()

from megatron_jet.convert import hf_export  # noqa: E402
from megatron_jet.postnas import export, scoring  # noqa: E402
from megatron_jet.training.checkpoint_folder import CheckpointFolder  # noqa: E402
from megatron_jet.training.job import TrainResult  # noqa: E402
from megatron_jet.training.trainer import Trainer  # noqa: E402

JOB = "stage1/student"
PLACES = {
    "step": (Trainer, "train_step", lambda self, *_: (self.job.name, self.progress.step + 1)),
    "validate": (Trainer, "validate", lambda self: (self.job.name, self.progress.step)),
    "finish": (Trainer, "finish", lambda self: (self.job.name, self.progress.step)),
    "save": (CheckpointFolder, "save", lambda self, *args: (_job_of(self), args[2].step)),
    "saved": (CheckpointFolder, "prune", lambda self, step, *_: (_job_of(self), step)),
    "result": (TrainResult, "save", lambda self, job: (job.name, self.steps)),
    "score": (scoring.PlanScorer, "score", lambda *_: (JOB, 0)),
    "load": (export, "load_model", lambda *_: (JOB, 0)),
    "export": (hf_export, "write_hf_tensors", lambda *_: (JOB, 0)),
    "compare": (export, "load_for_causal_lm", lambda *_: (JOB, 0)),
}


def _job_of(folder: CheckpointFolder) -> str:
    return "/".join((folder.path.parts[-4], folder.path.parts[-2]))


def arm(fault: str) -> None:
    """Put the fault in place."""
    action, _, place = fault.partition("@")
    place, _, step = place.partition(":")
    owner, name, where = PLACES[place]
    real, happened = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        job, at = where(*args)
        here = job == JOB and (not step or int(step) == at) and os.environ.get("RANK", "0") == RANK
        if not here or happened:
            return real(*args, **kwargs)
        happened.append(fault)
        if action != "NAN":
            os.kill(os.getpid(), signal.Signals[f"SIG{action}"])
            return real(*args, **kwargs)
        returned = real(*args, **kwargs)
        next(p for p in args[0].student[0].parameters() if p.requires_grad).data.view(-1)[0] = float("nan")
        return returned

    setattr(owner, name, wrapped)


RANK = os.environ.get("FAULT_RANK", "0")

if __name__ == "__main__":
    arm(os.environ["FAULT"])
    run_stage.leave(run_stage.main(sys.argv[1:]))
