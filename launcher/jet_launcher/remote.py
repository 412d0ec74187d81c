"""A cluster behind SSH: the launcher runs once more on the login node, where sbatch and the run directories are.

The checkout goes there as it is (uncommitted changes included), the recipe as a resolved config, the cluster file with
its `${VAR}` in place: they come from the environment of the login node. Later commands on the run are passed on.
Nothing is kept open: every command is one `ssh`.
"""

import io
import json
import re
import secrets
import shlex
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from jet_launcher.options import LaunchOptions
from jet_launcher.provenance import git_state
from jet_launcher.run_directory import RunDirectory, safe_name
from jet_launcher.slurm.package import code_digest, code_files
from megatron_jet.configs.base import StrictModel
from megatron_jet.configs.cluster import TunnelConfig
from megatron_jet.configs.errors import UsageError, UserError
from megatron_jet.configs.files import SCHEMA_VERSION, home_expanded, read_json, write_json, write_text
from megatron_jet.configs.overrides import dump_yaml
from megatron_jet.configs.run import RunConfig

ROOT = Path(__file__).resolve().parents[2]
HOME = "${XDG_CACHE_HOME:-$HOME/.cache}/megatron_jet"
SSH_FAILED = 255
GIT_FILE = "git_state.json"


@dataclass(frozen=True)
class RemoteRun:
    """A run whose directory is on a login node.

    Attributes:
        tunnel: how to get there.
        path: run directory over there.
        code: the launcher's checkout over there.
    """

    tunnel: TunnelConfig
    path: str
    code: str

    def forward(self, command: str, *arguments: str) -> int:
        """Run a launcher command on this run over there; input, output and exit code are passed through."""
        return _launcher(self.tunnel, self.code, [command, self.path, *arguments])


class _Record(StrictModel):
    """remote.json."""

    schema_version: int = SCHEMA_VERSION
    tunnel: TunnelConfig
    path: str = Field(min_length=1)
    code: str = Field(min_length=1)


def remote_of(run: RunDirectory) -> RemoteRun | None:
    """Where a run really is; None when it is here."""
    path = run.path / "remote.json"
    if not path.is_file():
        return None
    record = _Record.parse(read_json(path), str(path))
    return RemoteRun(record.tunnel, record.path, record.code)


def launch_remotely(
    config: RunConfig, stages: tuple[str, ...], options: LaunchOptions, tunnel: TunnelConfig, cluster: dict[str, Any]
) -> int:
    """`run` on a login node. Returns the launcher's exit code from there.

    Args:
        config: with its `${VAR}` in place.
        cluster: the cluster file as it is written, with its `${VAR}` in place.

    Raises:
        UserError: no job_dir in the cluster file, or the login node cannot be reached.
    """
    if not isinstance(cluster.get("job_dir"), str):
        raise UsageError("tunnel.kind=ssh needs job_dir in the cluster file: the directory for runs over there")
    name = options.output.name if options.output else f"{safe_name(config.recipe)}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = f"{_expanded(tunnel, cluster['job_dir'])}/{name}"
    arguments = ["--output", path, "--stages", ",".join(stages), *(["--json"] if options.as_json else [])]
    if options.dryrun:
        return _dry_run(config, cluster, tunnel, arguments)
    code = push_code(tunnel, ROOT)
    result = _run_there(config, cluster, tunnel, code, f"{code}.inputs/{name}", arguments)
    if result == 0:
        _remember(RunDirectory(options.output or options.root / name), config, tunnel, path, code)
        print(f"{name} is on {tunnel.host}; see: python launcher/postnas.py status {name}", file=sys.stderr)
        if options.wait:
            return _launcher(tunnel, code, ["resume", path, "--wait"])
    return result


def _dry_run(config: RunConfig, cluster: dict[str, Any], tunnel: TunnelConfig, arguments: list[str]) -> int:
    """Only the login node knows the values of `${VAR}`. What is copied there goes again at the end."""
    scratch = _expanded(tunnel, f"{HOME}/dryrun-{secrets.token_hex(8)}")
    try:
        code = push_code(tunnel, ROOT, f"{scratch}/code")
        return _run_there(config, cluster, tunnel, code, f"{scratch}/inputs", [*arguments, "--dryrun"])
    finally:
        if _ssh(tunnel, f"rm -rf {shlex.quote(scratch)}").returncode:
            print(f"{tunnel.host}: {scratch} could not be removed", file=sys.stderr)


def _run_there(
    config: RunConfig, cluster: dict[str, Any], tunnel: TunnelConfig, code: str, inputs: str, arguments: list[str]
) -> int:
    """Put recipe and cluster file into the directory `inputs` and call `run` with them. Returns its exit code."""
    here = {key: value for key, value in cluster.items() if key != "tunnel"}
    _send(tunnel, f"{inputs}/config.yaml", dump_yaml(config).encode())
    _send(tunnel, f"{inputs}/cluster.yaml", yaml.safe_dump(here, sort_keys=False).encode())
    command = ["run", f"{inputs}/config.yaml", "--cluster", f"{inputs}/cluster.yaml"]
    return _launcher(tunnel, code, [*command, *arguments])


def push_code(tunnel: TunnelConfig, root: Path, scratch: str | None = None) -> str:
    """Copy the checkout to the login node unless the same content is there. Returns its path over there.

    Args:
        scratch: where to copy it instead of the directory that later submissions look into.
    """
    files = code_files(root)
    target = _expanded(tunnel, f"{HOME}/code-{code_digest(root, files)[:12]}")
    if _ssh(tunnel, f"test -d {shlex.quote(target)}").returncode == 0:
        return target
    target = scratch or target
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name in files:
            tar.add(root / name, arcname=name, recursive=False)
        state = json.dumps(git_state(root)).encode()
        info = tarfile.TarInfo(GIT_FILE)
        info.size = len(state)
        tar.addfile(info, io.BytesIO(state))
    partial = shlex.quote(f"{target}.partial")
    unpack = f"mkdir -p {partial} && tar -xzf - -C {partial} && mv -T {partial} {shlex.quote(target)}"
    _check(_ssh(tunnel, unpack, archive.getvalue()), tunnel, "the code could not be copied")
    return target


def ssh_command(tunnel: TunnelConfig) -> list[str]:
    """ssh with the tunnel's options, up to the host."""
    options = ["-o", "BatchMode=yes"]
    options += ["-p", str(tunnel.port)] if tunnel.port else []
    options += ["-i", str(home_expanded(tunnel.identity, "tunnel.identity"))] if tunnel.identity else []
    return ["ssh", *options, f"{tunnel.user}@{tunnel.host}" if tunnel.user else str(tunnel.host)]


def _launcher(tunnel: TunnelConfig, code: str, arguments: list[str]) -> int:
    words = [tunnel.python, "launcher/postnas.py", *arguments]
    # A login shell: modules, Slurm's commands and the variables of the cluster file come from its profile.
    mark = _mark()
    line = f"cd {shlex.quote(code)} && echo && echo {mark} && exec {shlex.join(words)}"
    command = [*ssh_command(tunnel), f"bash -lc {shlex.quote(line)}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        # What start-up files print is not the launcher's: --json is for programs.
        while (said := process.stdout.readline()) and said.strip() != mark.encode():
            pass
        while said := process.stdout.read1():
            sys.stdout.buffer.write(said)
            sys.stdout.buffer.flush()
    if process.returncode == SSH_FAILED:
        raise UserError(f"ssh to {tunnel.host} failed; try: {shlex.join(ssh_command(tunnel))} true")
    return process.returncode


def _expanded(tunnel: TunnelConfig, path: str) -> str:
    """A path with `${VAR}` replaced by the login node's shell."""
    if not re.fullmatch(r"[A-Za-z0-9_./@+,=~:${}-]+", path) or "$(" in path:
        raise UsageError(
            f"job_dir={path}: on an SSH cluster it may hold letters, digits, ${{VAR}} and _ . / @ + , = - only"
        )
    mark = _mark()
    # Between marks: start-up files of login shells print, before and after. Single quotes keep it from csh.
    line = f'set -u; printf "\\n%s%s%s\\n" {mark} "{path}" {mark}'
    done = _ssh(tunnel, f"bash -lc {shlex.quote(line)}")
    _check(done, tunnel, f"{path} could not be expanded")
    said = done.stdout.decode(errors="replace").split(mark)
    value = said[1] if len(said) == 3 else ""
    if not value.startswith("/") or not value.isprintable():
        shown = " ".join((value or done.stdout.decode(errors="replace")).split())[-200:]
        raise UserError(f"{tunnel.host}: {path} is no absolute path there ({shown or 'nothing was printed'})")
    return value.rstrip("/") or "/"


def _mark() -> str:
    """A word that nothing else prints, to find our part in the output of a login shell."""
    return f"postnas-{secrets.token_hex(8)}"


def _send(tunnel: TunnelConfig, path: str, content: bytes) -> None:
    folder, file = shlex.quote(path.rpartition("/")[0]), shlex.quote(path)
    # For the owner alone: `env` of a cluster file may hold tokens.
    _check(
        _ssh(tunnel, f"umask 077 && mkdir -p {folder} && cat > {file}", content), tunnel, f"{path} could not be written"
    )


def _ssh(tunnel: TunnelConfig, command: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run([*ssh_command(tunnel), command], input=stdin, capture_output=True, timeout=600)
    except FileNotFoundError:
        raise UserError("ssh is not installed here") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"ssh to {tunnel.host}: no answer within 10 minutes") from None


def _check(done: subprocess.CompletedProcess[bytes], tunnel: TunnelConfig, what: str) -> None:
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        raise UserError(f"{tunnel.host}: {what} ({said or f'ssh exit code {done.returncode}'})")


def _remember(run: RunDirectory, config: RunConfig, tunnel: TunnelConfig, path: str, code: str) -> None:
    write_text(run.config_file, dump_yaml(config))
    write_json(run.path / "remote.json", {"tunnel": tunnel.to_dict(), "path": path, "code": code})
