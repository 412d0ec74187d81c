"""tools/convert.py: existing outputs, a kill at any moment, a disk that fills up."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from convert.convert_cases import SCRIPT, check_one_line, convert, copy_oracle, edit_tensors, load_script, same, visible
from megatron_jet.configs.directories import replaced_directory
from megatron_jet.convert.global_checkpoint import GlobalCheckpoint

NAN_NAME = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def oracle(tmp_path) -> Path:
    return copy_oracle(tmp_path / "hf")


def test_existing_output_needs_force_and_survives_a_failure(oracle, tmp_path, capsys):
    out = tmp_path / "ckpt"
    assert convert("import", oracle, out) == 0
    capsys.readouterr()
    assert convert("import", oracle, out) == 1
    check_one_line(capsys, [str(out), "exists", "--force"])
    edit_tensors(oracle, lambda t: t[NAN_NAME].fill_(float("nan")))
    assert convert("import", oracle, out, "--force") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "hf"], "no temporary directory may stay"
    assert torch.isfinite(GlobalCheckpoint(out).read("decoder.layers.2.mlp.linear_fc1.weight")).all()
    edit_tensors(oracle, lambda t: t[NAN_NAME].fill_(0.25))
    assert convert("import", oracle, out, "--force") == 0
    assert (GlobalCheckpoint(out).read("decoder.layers.2.mlp.linear_fc1.weight")[128:] == 0.25).all()


def run_until(count: int | None, tally: Path, *arguments) -> None:
    """Run the command in a fork that dies, as by kill -9, before its `count`-th access to a file system.

    Without a count it runs to its end and writes to `tally` the kind of each.
    """
    child = os.fork()
    if child == 0:
        seen = []

        def hook(event: str, details: tuple) -> None:
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
                seen.append(event)
                if len(seen) == count:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        code = 1
        try:
            code = convert(*arguments)
            tally.write_text(json.dumps(seen))
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) if count else os.WEXITSTATUS(status) == 0


def moments(tally: Path, among: int) -> list[int]:
    """Some moments all over the command, and those before and after its last renames."""
    seen = json.loads(tally.read_text())
    renames = [i for i, event in enumerate(seen, 1) if event == "os.rename"][-3:]
    return sorted({*range(1, len(seen), len(seen) // among), *renames, *(i + 1 for i in renames)})


def is_complete(out: Path, like: Path) -> bool:
    """Is this a whole export with the weights of another directory?"""
    return same(out, like) and {"config.json", "README.md", "modeling_megatron_jet.py"} <= visible(out)


def test_a_killed_export_leaves_nothing_that_looks_complete(oracle, tmp_path, capsys):
    """Killed anywhere, there is no output or all of it; and the next attempt leaves no trace of the killed one."""
    ckpt, out, tally = tmp_path / "ckpt", tmp_path / "out", tmp_path / "tally"
    assert convert("import", oracle, ckpt) == 0
    export = ("export", ckpt, out, "--shard-bytes", 60_000)
    run_until(None, tally, *export)
    shutil.rmtree(out)
    unfinished = 0
    for moment in moments(tally, among=8):
        run_until(moment, tally, *export)
        if out.exists():
            assert is_complete(out, oracle)
            shutil.rmtree(out)
        else:
            unfinished += 1
            assert visible(tmp_path) == {"hf", "ckpt", "tally"}
    assert unfinished >= 8, "the kills must have come while it was writing"
    assert convert(*export) == 0 and is_complete(out, oracle)
    assert set(os.listdir(tmp_path)) == {"hf", "ckpt", "tally", "out"}, "earlier attempts must not stay"


def test_a_killed_replacement_leaves_the_old_output_or_the_new_one(oracle, tmp_path, capsys):
    ckpt, out, old, tally = (tmp_path / name for name in ("ckpt", "out", "old", "tally"))
    assert convert("import", oracle, ckpt) == 0 and convert("export", ckpt, out) == 0
    shutil.copytree(out, old)
    edit_tensors(oracle, lambda t: t[NAN_NAME].fill_(0.25))
    assert convert("import", oracle, ckpt, "--force") == 0
    replace = ("export", ckpt, out, "--force")
    run_until(None, tally, *replace)
    found = []
    for moment in moments(tally, among=2):
        for path in (out, *tmp_path.glob(".*")):  # what a kill leaves would shift the next one
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(old, out)
        run_until(moment, tally, *replace)
        found.append("none" if not out.exists() else "old" if is_complete(out, old) else "new")
        assert found[-1] != "new" or is_complete(out, oracle)
    # Between the two renames there is none; then the next attempt puts the old one back before it starts.
    assert found[0] == "old" and found.count("none") == 1 and found[-1] == "new"
    assert convert(*replace) == 0 and is_complete(out, oracle)
    assert set(os.listdir(tmp_path)) == {"hf", "ckpt", "old", "tally", "out"}


def test_the_old_directory_comes_back_when_the_kill_fell_between_the_renames(tmp_path):
    (tmp_path / ".out.partial-1.old").mkdir()
    (tmp_path / ".out.partial-1.old" / "weights").write_text("old")
    (tmp_path / ".out.partial-1").mkdir()
    with pytest.raises(RuntimeError), replaced_directory(tmp_path / "out"):
        raise RuntimeError
    assert (tmp_path / "out" / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_ctrl_c_leaves_nothing(oracle, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_jet.convert.hf_import.join", interrupted)
    assert convert("import", oracle, tmp_path / "ckpt") == 75
    check_one_line(capsys, ["interrupted", "nothing was written"])
    assert os.listdir(tmp_path) == ["hf"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("write", [2, 5, 60])
def test_a_signal_inside_the_file_of_a_tensor_is_no_full_disk(number, write, oracle, tmp_path, monkeypatch, capsys):
    """Large checkpoints have a file per tensor, whose writer raises its own error when it is left half-way."""
    create_stream, writes = FileSystem.create_stream, []

    class Stream:
        def __init__(self, stream):
            self.stream = stream

        def __getattr__(self, name: str):
            return getattr(self.stream, name)

        def write(self, data) -> int:
            writes.append(len(data))
            if len(writes) == write:
                os.kill(os.getpid(), number)
            return self.stream.write(data)

    @contextmanager
    def spied(self, path, mode):
        with create_stream(self, path, mode) as stream:
            yield Stream(stream)

    monkeypatch.setattr(FileSystem, "create_stream", spied)
    monkeypatch.setattr("megatron_jet.convert.global_checkpoint.SINGLE_FILE_BYTES", 0)
    before = signal.signal(number, signal.SIG_DFL)  # nohup may have set it otherwise
    try:
        load_script().stop_on_signals()
        assert convert("import", oracle, tmp_path / "ckpt") == 75
    finally:
        signal.signal(number, before)
    check_one_line(capsys, ["interrupted", "nothing was written"])
    assert len(writes) >= write and os.listdir(tmp_path) == ["hf"]


def test_a_terminal_that_closes_does_not_end_what_nohup_started():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        load_script().stop_on_signals()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


KILLED_AT_IMPORT = """
import os, runpy, sys

number, script = int(sys.argv.pop(1)), sys.argv.pop(1)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), number)

sys.meta_path.insert(0, Finder())
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_command_starts_is_one_line(number, oracle, tmp_path):
    arguments = [str(int(number)), str(SCRIPT), "import", str(oracle), str(tmp_path / "ckpt")]
    run = subprocess.run(
        [sys.executable, "-c", KILLED_AT_IMPORT, *arguments],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # as of a command in the foreground
    )
    assert (run.returncode, run.stderr) == (75, "error: interrupted; nothing was written\n")
    assert os.listdir(tmp_path) == ["hf"]


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[None]:
    """A file system of `size` bytes at `path`; where mounting is not allowed, a limit on the size of a file."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if mounted:
            subprocess.run(["umount", str(path)], check=True)
        shutil.rmtree(path)


@pytest.mark.parametrize(("command", "single_file"), [("import", True), ("import", False), ("export", True)])
def test_a_full_disk_is_one_line_and_leaves_nothing(command, single_file, oracle, tmp_path, capsys, monkeypatch):
    """It fills up at the first byte, among the weights, and among the files beside them."""
    if not single_file:
        monkeypatch.setattr("megatron_jet.convert.global_checkpoint.SINGLE_FILE_BYTES", 0)
    source = oracle
    if command == "export":
        assert convert("import", oracle, tmp_path / "ckpt") == 0
        source = tmp_path / "ckpt"
    capsys.readouterr()
    weights = (oracle / "model.safetensors").stat().st_size
    codes = []
    for size in (4096, weights // 2, weights + 8192, weights + 40_000, 2 * weights + 400_000):
        disk = tmp_path / "disk"
        with small_disk(disk, size):
            codes.append(convert(command, source, disk / "out"))
            if codes[-1] == 0:
                assert visible(disk) == {"out"}
                break
            assert os.listdir(disk) == []
        check_one_line(capsys, ["out", "cannot be written (", ")"])
    assert codes[0] == codes[1] == 1 and codes[-1] == 0


def test_a_failed_write_of_the_disk_is_reported(oracle, tmp_path, capsys, monkeypatch):
    """Delayed allocation: the disk may be full only when the data goes there."""

    def fails(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_jet.configs.directories.os.fsync", fails)
    assert convert("import", oracle, tmp_path / "ckpt") == 1
    check_one_line(capsys, ["ckpt", "cannot be written (No space left on device)"])
    assert os.listdir(tmp_path) == ["hf"]


def test_every_file_has_reached_the_disk_before_the_directory_gets_its_name(oracle, tmp_path, monkeypatch):
    synced: set[int] = set()
    fsync, rename = os.fsync, os.rename

    def record(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def check(source, target) -> None:
        for path in Path(source).rglob("*"):
            assert path.stat().st_ino in synced, path
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr("megatron_jet.configs.directories.os.rename", check)
    assert convert("import", oracle, tmp_path / "ckpt") == 0
    assert convert("export", tmp_path / "ckpt", tmp_path / "out") == 0
