"""provenance.json: which code, which versions, which machine, which command."""

import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from jet_launcher.git import ask_git
from jet_launcher.run_directory import RunDirectory
from megatron_jet.configs.files import hash_json, read_json, write_json
from megatron_jet.configs.run import RunConfig

ROOT = Path(__file__).resolve().parents[2]
MAX_DIFF_CHARACTERS = 400_000
RECORDED_VARIABLES = ("OMP_NUM_THREADS", "JET_KERNELS", "JET_WORKER", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")


def record_launch(run: RunDirectory, config: RunConfig, stages: tuple[str, ...]) -> None:
    """Add this launch to provenance.json. Every launch has its own record: later code may continue a run."""
    provenance = run.provenance()
    git = git_state(ROOT)
    if "error" in git:
        print(f"warning: provenance.json cannot say which code this is: {git['error']}", file=sys.stderr)
    provenance.setdefault("config_hash", hash_json(config.to_dict()))
    provenance.setdefault("launches", []).append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "stages": list(stages),
            "git": git,
            "python": platform.python_version(),
            "packages": package_versions(),
            "hardware": hardware(),
            "environment": {name: os.environ[name] for name in RECORDED_VARIABLES if name in os.environ},
        }
    )
    write_json(run.provenance_file, provenance)


def last_stages(run: RunDirectory) -> str | None:
    """The stages of the last launch, as --stages takes them; None when there was none."""
    launches = run.provenance().get("launches", [])
    return ",".join(launches[-1].get("stages", [])) or None if launches else None


def git_state(root: Path) -> dict[str, Any]:
    """Revision, uncommitted changes as a diff, and untracked files.

    `revision` is None outside a checkout, and where git refuses: `error` says why then.
    """
    copied = root / "git_state.json"
    if copied.is_file():
        return read_json(copied)  # a copy of a checkout: as it was where it was copied
    nothing = {"revision": None, "dirty": None, "diff": "", "untracked": []}
    revision = ask_git(root, "rev-parse", "HEAD")
    if revision.error:
        return {**nothing, "error": revision.error} if (root / ".git").exists() else nothing
    answers = [ask_git(root, "diff", "HEAD"), ask_git(root, "ls-files", "--others", "--exclude-standard")]
    diff, untracked = (answer.text for answer in answers)
    state = {"revision": revision.text.strip(), "dirty": bool(diff), "diff": diff[:MAX_DIFF_CHARACTERS]}
    if len(diff) > MAX_DIFF_CHARACTERS:
        state["diff_cut"] = f"first {MAX_DIFF_CHARACTERS} of {len(diff)} characters"
    errors = [answer.error for answer in answers if answer.error]
    if errors:
        state |= {"dirty": bool(diff) or None, "error": "; ".join(errors)}
    return {**state, "untracked": untracked.splitlines()}


def package_versions() -> dict[str, str]:
    """Versions of all installed distributions, by name."""
    found = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def own_version() -> str:
    """Version of Megatron-Jet, or `uninstalled` when it runs from a checkout without installation."""
    try:
        return version("megatron-jet")
    except PackageNotFoundError:
        return "uninstalled"


def hardware() -> dict[str, Any]:
    """Host, CPU, memory and GPUs, from the system's own files."""
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "gpus": gpus(),
    }


def gpus() -> list[str]:
    """Names of the GPUs that nvidia-smi lists; none where there is no driver."""
    try:
        result = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in result.stdout.splitlines() if line.strip()] if result.returncode == 0 else []


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None
