"""A place to submit from: a teacher without weights, a cluster file and Slurm's commands as scripts."""

import json
import subprocess
import sys
from pathlib import Path

from launcher.fake_slurm import FakeSlurm

ROOT = Path(__file__).parents[2]
POSTNAS = [sys.executable, str(ROOT / "launcher" / "postnas.py")]
TEACHER = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 448,
    "tie_word_embeddings": True,
}
CLUSTER = "nodes: 4\npreflight: {enabled: false}\n"


class ClusterPlace:
    """The current directory of a test.

    Attributes:
        slurm: what Slurm's commands say.
        run: run directory of `plain` and `submit`.
    """

    def __init__(self, folder: Path, slurm: FakeSlurm) -> None:
        self.folder, self.slurm, self.run = folder, slurm, folder / "runs" / "a"
        self.cluster = folder / "mine.yaml"
        self.cluster.write_text(CLUSTER)
        self.teacher = folder / "teacher"
        self.teacher.mkdir()
        (self.teacher / "config.json").write_text(json.dumps(TEACHER))
        (self.teacher / "model.safetensors").touch()  # nothing reads it here

    @property
    def record(self) -> dict:
        return json.loads((self.run / "cluster" / "experiment.json").read_text())

    def plain(self, stage: str = "stage1") -> int:
        """What slurm/postnas.sbatch does, in this process."""
        from jet_launcher.slurm import plain

        recipe = ["tiny_distill", f"teacher.path={self.teacher}"]
        return plain.main([str(self.cluster), str(self.run), stage, *recipe])

    def arguments(self, stages: str = "stage1,stage2") -> list[str]:
        """Of a `run` on this cluster: jobs prepare, stage1, stage2."""
        where = ["--cluster", str(self.cluster), "--output", str(self.run)]
        return ["run", "tiny_distill", *where, "--stages", stages, f"teacher.path={self.teacher}"]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The launcher as a process group of its own: NeMo-Run is imported once per process."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*POSTNAS, *arguments], text=True, start_new_session=True, **pipes)

    def call(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=280)
        return process.returncode, out, err
