"""A cluster behind SSH, with an `ssh` that runs the command here under another HOME."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jet_launcher.cli import main
from jet_launcher.clusters import ssh_tunnel
from jet_launcher.remote import RemoteRun, _expanded, _send, push_code, ssh_command
from megatron_jet.configs.cluster import TunnelConfig
from megatron_jet.configs.errors import UserError

TUNNEL = TunnelConfig(kind="ssh", host="login", user="me", port=2222, identity="~/.ssh/key")
FAKE_SSH = """#!/bin/bash
echo "$*" >> "$SSH_CALLS"
[ -n "$SSH_DOWN" ] && { echo "ssh: connect to host login port 22: No route to host" >&2; exit 255; }
while [ "${1:0:1}" = - ]; do shift 2; done
shift
cd "$SSH_HOME" && HOME="$SSH_HOME" exec bash -c "$*"
"""


@pytest.fixture
def login(tmp_path, monkeypatch):
    """The login node's home directory."""
    home = tmp_path / "home"
    (tmp_path / "bin").mkdir()
    home.mkdir()
    (tmp_path / "bin" / "ssh").write_text(FAKE_SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SSH_HOME", str(home))
    monkeypatch.setenv("SSH_CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return home


@pytest.fixture
def checkout(tmp_path):
    """A small git checkout with an uncommitted change."""
    root = tmp_path / "checkout"
    (root / "launcher").mkdir(parents=True)
    (root / "launcher" / "postnas.py").write_text("import sys; print('here', *sys.argv[1:]); sys.exit(3)\n")
    (root / ".gitignore").write_text("data.bin\n")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    (root / "new.py").write_text("x = 1\n")
    (root / "data.bin").write_text("big")
    return root


def test_options_of_the_tunnel_reach_ssh():
    words = ssh_command(TUNNEL)
    assert words[-1] == "me@login"
    assert words[words.index("-p") :][:2] == ["-p", "2222"]
    assert words[words.index("-i") + 1] == str(Path("~/.ssh/key").expanduser())
    assert "BatchMode=yes" in words


def test_code_goes_over_once_with_uncommitted_files(login, checkout, tmp_path):
    code = push_code(TUNNEL, checkout)
    assert Path(code).is_relative_to(login)
    assert (Path(code) / "new.py").read_text() == "x = 1\n"
    assert not (Path(code) / "data.bin").exists(), "git ignores it"
    assert "new.py" in json.loads((Path(code) / "git_state.json").read_text())["untracked"]
    before = (tmp_path / "calls").read_text().count("tar -xzf")
    assert push_code(TUNNEL, checkout) == code
    assert (tmp_path / "calls").read_text().count("tar -xzf") == before == 1
    (checkout / "new.py").write_text("x = 2\n")
    assert push_code(TUNNEL, checkout) != code


def test_commands_are_passed_on_with_their_exit_code(login, checkout, capfd):
    run = RemoteRun(TUNNEL, "/over there/run", push_code(TUNNEL, checkout))
    assert run.forward("status", "--json") == 3
    assert capfd.readouterr().out == "here status /over there/run --json\n"


def test_unreachable_login_node_is_one_line(login, checkout, monkeypatch):
    monkeypatch.setenv("SSH_DOWN", "1")
    with pytest.raises(UserError, match="ssh to login failed"):
        RemoteRun(TUNNEL, "/r", "/c").forward("status")
    with pytest.raises(UserError, match="login: .*No route to host"):
        push_code(TUNNEL, checkout)


def test_dry_run_happens_on_the_login_node_with_its_environment(login, tmp_path, monkeypatch, capfd):
    """The whole way: this checkout, the resolved recipe and the cluster file go over, the scripts come back."""
    monkeypatch.chdir(tmp_path)
    python = tmp_path / "python"  # this checkout's own path may have a space in it, which cluster files refuse
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    cluster = tmp_path / "far.yaml"
    cluster.write_text(
        f"tunnel: {{kind: ssh, host: login, python: {python}}}\njob_dir: ${{HOME}}/runs\nnodes: 4\ngpus_per_node: 8\n"
    )
    assert ssh_tunnel(str(cluster)).host == "login"
    arguments = ["run", "jet_nemotron_2b", "--cluster", str(cluster), "--stages", "stage1", "--dryrun", "--json"]
    assert main(arguments) == 0
    plan = json.loads(capfd.readouterr().out)
    assert Path(plan["run"]).parent == login / "runs", "${HOME} is the login node's"
    assert f"export POSTNAS_RUN_DIR={login}/runs/" in plan["scripts"]["stage1"]
    assert not (tmp_path / "runs").exists()
    assert [path for path in login.rglob("*") if path.is_file()] == [], "a dry run leaves nothing behind"


def test_inputs_are_for_their_owner_alone(login):
    _send(TUNNEL, f"{login}/in puts/cluster.yaml", b"env: {TOKEN: secret}")
    path = login / "in puts" / "cluster.yaml"
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("env: {TOKEN: secret}", 0o600)


def test_job_dir_is_needed(login, tmp_path):
    (tmp_path / "far.yaml").write_text("tunnel: {kind: ssh, host: login}\n")
    assert main(["run", "jet_nemotron_2b", "--cluster", str(tmp_path / "far.yaml"), "--dryrun"]) == 2


NOISE = {
    "profile": (".bash_profile", "echo Welcome to Example HPC; echo"),
    "without_a_line_break": (".bash_profile", "printf 'quota: 3 GB '"),
    "path_like": (".bash_profile", "echo /scratch/me"),
    "bashrc": (".bash_profile", '. ~/.bashrc 2> /dev/null; echo \'{"module": "loaded"}\''),
}


@pytest.mark.parametrize("case", NOISE)
def test_what_start_up_files_print_is_nobody_s_answer(login, checkout, capfd, case):
    name, line = NOISE[case]
    (login / name).write_text(line + "\n")
    assert _expanded(TUNNEL, "${HOME}/runs/") == f"{login}/runs"
    code = push_code(TUNNEL, checkout)
    assert Path(code).is_relative_to(login / ".cache")
    capfd.readouterr()
    assert RemoteRun(TUNNEL, "/r", code).forward("status", "--json") == 3
    assert capfd.readouterr().out == "here status /r --json\n"


@pytest.mark.parametrize("path", ["runs", "${HOME}/../x/${EMPTY}"])
def test_path_over_there_must_be_absolute(login, monkeypatch, path):
    monkeypatch.setenv("EMPTY", "a\nb")
    with pytest.raises(UserError, match=r"^login: .* is no absolute path there \("):
        _expanded(TUNNEL, path)
    (login / ".bash_profile").write_text("exec true\n")
    with pytest.raises(UserError, match=r"is no absolute path there \(nothing was printed\)"):
        _expanded(TUNNEL, "${HOME}/runs")
