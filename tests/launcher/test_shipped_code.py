"""The code that ships with a job, and what a run needs from a network."""

import os
import subprocess
from pathlib import Path

import pytest

from jet_launcher import provenance
from jet_launcher.prefetch import Item, fetch, needed, refuse_missing
from jet_launcher.provenance import git_state, record_launch
from jet_launcher.run_directory import RunDirectory
from jet_launcher.slurm import package
from jet_launcher.slurm.package import code_files, ship_code
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.overrides import apply_overrides
from megatron_jet.configs.recipes.catalog import load_recipe


def git(root, *command: str) -> None:
    subprocess.run(["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *command], check=True)


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    for name in ("megatron_jet/a.py", "megatron_jet/gone.py", "tests/test_a.py", "docs/x.md", "kernels/k.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x = 1\n")
    (root / "megatron_jet" / "link.py").symlink_to("../kernels/k.py")
    (root / ".gitignore").write_text("*.bin\n__pycache__/\n")
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-qm", "x")
    (root / "megatron_jet" / "a.py").write_text("x = 2  # not committed\n")
    (root / "megatron_jet" / "new.py").write_text("")
    (root / "megatron_jet" / "gone.py").unlink()
    (root / "big.bin").write_text("ignored")
    return root


def test_working_tree_ships_as_it_is(checkout, tmp_path):
    code = ship_code(checkout, tmp_path / "run")
    names = {str(path.relative_to(code.path)) for path in code.path.rglob("*") if not path.is_dir()}
    assert names == {".gitignore", "megatron_jet/a.py", "megatron_jet/new.py", "megatron_jet/link.py", "kernels/k.py"}
    assert "not committed" in (code.path / "megatron_jet" / "a.py").read_text()
    assert (code.path / "megatron_jet" / "link.py").is_symlink()
    assert (code.path / "megatron_jet" / "link.py").read_text() == "x = 1\n"
    assert code.files == len(names)


def test_provenance_holds_what_is_not_committed(checkout):
    state = git_state(checkout)
    assert len(state["revision"]) == 40 and state["dirty"]
    assert "+x = 2  # not committed" in state["diff"] and "deleted file mode" in state["diff"]
    assert state["untracked"] == ["megatron_jet/new.py"]


def test_checkout_of_somebody_else_has_provenance(checkout, tmp_path):
    """git refuses it unless told otherwise."""
    for path in [checkout, *checkout.rglob("*")]:
        os.chown(path, 4711, 4711, follow_symlinks=False)
    refused = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert "dubious ownership" in refused.stderr
    state = git_state(checkout)
    assert len(state["revision"]) == 40 and "+x = 2" in state["diff"] and "error" not in state
    assert "megatron_jet/new.py" in code_files(checkout) and "big.bin" not in code_files(checkout)


def test_git_that_fails_is_no_checkout_without_changes(checkout, tmp_path, monkeypatch, capsys):
    git_says = tmp_path / "bin" / "git"
    git_says.parent.mkdir()
    git_says.write_text("#!/bin/sh\necho 'fatal: detected dubious ownership' >&2\necho more >&2\nexit 128\n")
    git_says.chmod(0o755)
    monkeypatch.setenv("PATH", f"{git_says.parent}:/usr/bin:/bin")
    state = git_state(checkout)
    assert (state["revision"], state["error"]) == (None, "fatal: detected dubious ownership")
    assert "error" not in git_state(tmp_path), "no checkout at all"
    monkeypatch.setattr(provenance, "ROOT", checkout)
    run = RunDirectory(tmp_path / "run")
    record_launch(run, load_recipe("tiny"), ("prepare",))
    warning = "warning: provenance.json cannot say which code this is: fatal: detected dubious ownership\n"
    assert capsys.readouterr().err == warning
    assert run.provenance()["launches"][0]["git"]["error"] == state["error"]


def test_same_content_ships_once_and_a_change_ships_anew(checkout, tmp_path):
    first = ship_code(checkout, tmp_path / "run")
    assert ship_code(checkout, tmp_path / "run") == first
    (checkout / "megatron_jet" / "a.py").write_text("x = 3\n")
    second = ship_code(checkout, tmp_path / "run")
    assert second.path != first.path
    assert "x = 2" in (first.path / "megatron_jet" / "a.py").read_text(), "jobs in the queue keep their code"
    assert not [path for path in (tmp_path / "run" / "code").iterdir() if path.name.startswith(".")]


def test_checkout_without_git_ships_the_needed_directories(checkout):
    subprocess.run(["rm", "-r", str(checkout / ".git")], check=True)
    (checkout / "megatron_jet" / "__pycache__").mkdir()
    (checkout / "megatron_jet" / "__pycache__" / "a.pyc").write_text("")
    assert code_files(checkout) == ["kernels/k.py", "megatron_jet/a.py", "megatron_jet/link.py", "megatron_jet/new.py"]


def test_large_file_is_named(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "LIMIT_BYTES", 1000)
    (checkout / "weights.pt").write_bytes(b"0" * 2000)
    with pytest.raises(UserError, match=r"the largest file is weights.pt .*\.gitignore"):
        ship_code(checkout, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def paper(tmp_path):
    overrides = [f"teacher.path={tmp_path}/Qwen2.5-1.5B", f"data.path={tmp_path}/data"]
    return apply_overrides(load_recipe("jet_nemotron_2b"), overrides)


def test_prefetch_downloads_what_has_a_repository_and_names_the_rest(tmp_path):
    asked, said = [], []
    left = fetch(needed(paper(tmp_path)), lambda *what: asked.append(what), said.append)
    assert asked == [("Qwen/Qwen2.5-1.5B", tmp_path / "Qwen2.5-1.5B")]
    assert [item.what for item in left] == ["data.path"]
    assert "tools/prepare_data.py" in said[1]


def test_incomplete_download_counts_as_missing(tmp_path):
    teacher = tmp_path / "Qwen2.5-1.5B"
    teacher.mkdir()
    (teacher / "config.json").write_text("{}")
    (teacher / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}'
    )
    (teacher / "m-1.safetensors").touch()
    assert not needed(paper(tmp_path))[0].present
    (teacher / "m-2.safetensors").touch()
    assert needed(paper(tmp_path))[0].present


def test_offline_nodes_refuse_before_anything_is_submitted(tmp_path):
    with pytest.raises(UserError, match=r"no network: teacher.path=.*; data.path=.*tools/prefetch.py jet_nemotron_2b"):
        refuse_missing(paper(tmp_path))
    refuse_missing(load_recipe("tiny"))
    assert needed(load_recipe("tiny")) == []


def test_unknown_teacher_says_what_to_do(tmp_path):
    config = apply_overrides(paper(tmp_path), [f"teacher.path={tmp_path}/Mine"])
    assert needed(config)[0] == Item(
        "teacher.path",
        Path(f"{tmp_path}/Mine"),
        False,
        None,
        "put a Hugging Face directory there, or name it like one of Qwen2.5-1.5B, Qwen2.5-3B, Qwen3-1.7B",
    )
