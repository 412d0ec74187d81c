"""docs/extending.md: a new stage is one file and one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAGE = '''
"""probe: counts the layers of the teacher."""

from megatron_jet.configs.results import Measured, StageResult
from megatron_jet.postnas.stage import common_inputs


class ProbeStage:
    name = "probe"
    kept = ()

    def inputs(self, ctx):
        return common_inputs(ctx, self.name, "prepare")

    def run(self, ctx, inputs_hash):
        ctx.status.phase(f"counting {ctx.teacher.num_layers} layers")
        return StageResult(stage=self.name, inputs_hash=inputs_hash, measured=Measured(seconds=ctx.status.seconds))


PROBE = ProbeStage()
'''
AFTER = '    "prepare": "megatron_jet.postnas.prepare:PREPARE",\n'
LINE = '    "probe": "megatron_jet.postnas.probe:PROBE",\n'


def test_one_file_and_one_line(tmp_path):
    for part in ("megatron_jet", "launcher", "kernels", "slurm"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "megatron_jet" / "postnas" / "probe.py").write_text(STAGE)
    stages = tmp_path / "megatron_jet" / "configs" / "stages.py"
    text = stages.read_text()
    assert text.count(AFTER) == 1
    stages.write_text(text.replace(AFTER, AFTER + LINE))

    def launcher(*arguments):
        command = [sys.executable, str(tmp_path / "launcher" / "postnas.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = launcher("run", "tiny", "--stages", "probe,report", "--output", "runs/a")
    assert "prepare, probe, report" in said and "probe: done" in said
    states = {row["stage"]: row["state"] for row in json.loads(launcher("status", "a", "--json"))["stages"]}
    assert states["probe"] == "done"
    assert "Probe" in (tmp_path / "runs" / "a" / "report.html").read_text()
    assert "probe" in launcher("run", "tiny", "--dryrun")
