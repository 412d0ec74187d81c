"""Checkpoints of strangers: whatever is pickled in them, nothing runs, and one line says what is refused."""

import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from convert.convert_cases import check_one_line, convert
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.convert import global_checkpoint
from megatron_jet.convert.global_checkpoint import GlobalCheckpoint, write_checkpoint
from megatron_jet.model.closed_pickle import closed_pickles, read_metadata
from megatron_jet.training import checkpoint_folder
from megatron_jet.training.checkpoint import load_model, save_model
from megatron_jet.training.parallel import destroy_parallel, init_parallel
from training.training_cases import built, job, run_job, teacher_config, write_models


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "executed"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model checkpoint, made by the converter's writer."""
    path = tmp_path_factory.mktemp("saved") / "model"
    init_parallel(ParallelConfig(), seed=0)
    save_model(built(teacher_config()), path, teacher_config().to_dict())
    destroy_parallel()
    return path


@pytest.fixture
def foreign(saved, tmp_path) -> Path:
    """A copy without checksums: a stranger would write those that fit."""
    path = tmp_path / "model"
    shutil.copytree(saved, path)
    (path / "checksums.json").unlink()
    return path


def poison(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content))


def hidden_in_metadata(path: Path, mark: Path) -> None:
    """A true index with one more thing in it."""
    metadata = FileSystemReader(path).read_metadata()
    metadata.planner_data = {"more": Payload(mark)}
    poison(path / ".metadata", metadata)


PLACES = {
    "the whole index": lambda path, mark: poison(path / ".metadata", Payload(mark)),
    "inside a true index": hidden_in_metadata,
    "common.pt": lambda path, mark: torch.save({"args": Payload(mark)}, path / "common.pt"),
    "common.pt as a bare pickle": lambda path, mark: poison(path / "common.pt", Payload(mark)),
}


@pytest.mark.parametrize("place", PLACES)
def test_nothing_runs_when_a_model_is_loaded(single_rank, foreign, mark, place):
    PLACES[place](foreign, mark)
    with pytest.raises(UserError) as raised:
        load_model(built(teacher_config()), foreign)
    assert "\n" not in str(raised.value) and str(foreign) in str(raised.value)
    assert not mark.exists()


@pytest.mark.parametrize("place", ["the whole index", "inside a true index"])
def test_nothing_runs_when_a_checkpoint_is_read_without_a_model(foreign, mark, place):
    PLACES[place](foreign, mark)
    with pytest.raises(UserError, match=r"posix\.mkdir, which no checkpoint needs"):
        GlobalCheckpoint(foreign)
    assert not mark.exists()


def test_the_command_refuses_in_one_line(foreign, mark, tmp_path, capsys):
    PLACES["inside a true index"](foreign, mark)
    assert convert("export", foreign, tmp_path / "out") == 1
    check_one_line(capsys, ["posix.mkdir", str(foreign)])
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_nothing_runs_that_lies_among_the_tensors(single_rank, tmp_path, mark, monkeypatch):
    """Plain values are pickled into the data files, where torch's planner reads them with an open unpickler."""
    model = built(teacher_config())
    save_model(model, tmp_path / "true")
    source = GlobalCheckpoint(tmp_path / "true")

    def payload(value: list) -> io.BytesIO:
        buffer = io.BytesIO()
        torch.save([Payload(mark)], buffer)
        buffer.seek(0)
        return buffer

    monkeypatch.setattr(global_checkpoint, "_serialized", payload)
    write_checkpoint(tmp_path / "foreign", {key: source.lazy(key) for key in source})
    with pytest.raises(UserError, match="damaged"):
        load_model(model, tmp_path / "foreign")
    assert not mark.exists()


@pytest.mark.parametrize("place", ["index", "values"])
def test_nothing_runs_when_training_goes_on(single_rank, tmp_path, mark, monkeypatch, place):
    """A run directory of somebody else, resumed."""
    case = job(tmp_path, training={"steps": 4})
    write_models(case)
    real = checkpoint_folder.state_to_save
    if place == "values":
        monkeypatch.setattr(
            checkpoint_folder, "state_to_save", lambda *args: {**real(*args), "adam_steps": Payload(mark)}
        )

    def die(row: dict) -> None:
        if row["step"] == 3:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run_job(case, die)
    state = case.out / "checkpoints" / "step-00000002" / "state"
    if place == "index":
        hidden_in_metadata(state, mark)
    (state / "checksums.json").unlink()
    marker = state.parent / "complete.json"
    sizes = {str(f.relative_to(state.parent)): f.stat().st_size for f in state.parent.rglob("*") if f.is_file()}
    plain = checkpoint_folder.read_json_object(marker)
    del plain["hash"], sizes["complete.json"]
    checkpoint_folder.write_json(marker, {**plain, "files": sizes})
    with pytest.raises(UserError, match="no usable checkpoint"):
        run_job(case)
    assert not mark.exists()


def test_an_index_names_no_file_outside_its_directory(foreign):
    metadata = FileSystemReader(foreign).read_metadata()
    place = next(iter(metadata.storage_data.values()))
    place.relative_path = "../elsewhere.distcp"
    poison(foreign / ".metadata", metadata)
    with pytest.raises(UserError, match=r"\.\./elsewhere\.distcp, which lies outside"):
        GlobalCheckpoint(foreign)


def test_true_indexes_are_read_as_torch_reads_them(saved):
    closed, true = read_metadata(saved / ".metadata"), FileSystemReader(saved).read_metadata()
    assert closed.state_dict_metadata == true.state_dict_metadata and closed.storage_data == true.storage_data


def test_the_unpicklers_of_others_are_as_they_were_afterwards(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    before = FileSystemReader.read_metadata, dict(os.environ)
    with closed_pickles():
        assert FileSystemReader.read_metadata is not before[0]
    assert (FileSystemReader.read_metadata, dict(os.environ)) == before
