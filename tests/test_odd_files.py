"""Every JSON and YAML file that the project reads, damaged in every way: one line that names it, or no harm.

A new reader is a row of READERS. What is read through `read_json_object` and `StrictModel.parse` passes by itself.
"""

import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from fake_run import other_results, selections, training_stages, write_fake_run
from jet_launcher.clean import _named_checkpoints
from jet_launcher.clusters import load_cluster
from jet_launcher.commands import list_command
from jet_launcher.forecast import _seconds_taken
from jet_launcher.prefetch import needed
from jet_launcher.progress import describe, describe_end
from jet_launcher.provenance import git_state, last_stages
from jet_launcher.remote import remote_of
from jet_launcher.run_directory import RunDirectory
from jet_launcher.slurm.record import SubmissionLog, read_record
from jet_launcher.stage_status import read_stage, read_status, run_state
from launcher.cluster_place import TEACHER
from megatron_jet.configs.cluster import ClusterConfig
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.hf_format import model_from_hf
from megatron_jet.configs.lock import _read
from megatron_jet.configs.overrides import dump_yaml
from megatron_jet.configs.provenance import read_provenance
from megatron_jet.configs.recipes.catalog import load_recipe
from megatron_jet.configs.recipes.tiny import tiny
from megatron_jet.configs.results import result_type
from megatron_jet.configs.run import RunConfig, TeacherConfig
from megatron_jet.configs.teacher_source import teacher_model
from megatron_jet.data.index import read_index

SHA = "0" * 64
# Keys of a run's config below which it looks as elsewhere, or has plain fields only (test_values.py walks those).
ALIKE = {"new_block", "hardware_search", "stage1", "compare_training", "optimizer", "throughput"}
INDEX = {
    "schema_version": 1,
    "vocab_size": 512,
    "end_of_text": 1,
    "seq_length": 64,
    "tokenizer_hash": SHA,
    "inputs": {"a.txt": SHA},
    "sources": {"text": {"packing": "stream", "metric": "loss", "choices": None}},
    "splits": {
        "train": {
            "sources": {"text": 10},
            "shards": [{"path": "train/text-000000.tar", "source": "text", "samples": 1, "tokens": 10, "sha256": SHA}],
            "longest": {"text": 3},
        }
    },
}
STATUS = {
    "state": "running",
    "pid": 1,
    "host": "here",
    "started": "2026-03-01T10:00:00+00:00",
    "updated": "2026-03-01T10:00:00+00:00",
    "job": "supernet",
    "message": None,
    "step": 3,
    "total_steps": 9,
    "first_step": 0,
    "first_step_at": 1.5,
    "losses": {"kl": 0.5},
    "tokens_per_second": 9.0,
    "measured": {"seconds": 4.0},
}


@dataclass(frozen=True)
class Reader:
    """A file, and what reads it.

    Attributes:
        prepare: fills a folder and returns the file in it.
        read: everything that the project does with it, given the folder.
        deep: keys inside of keys are damaged as well.
        parse: takes the content with a damaged key instead of the file, where the file takes long to read.
        silent: whatever it holds, nothing is raised.
    """

    name: str
    prepare: Callable[[Path], Path]
    read: Callable[[Path], Any]
    deep: bool = True
    silent: bool = False
    parse: Callable[[Any], Any] | None = None


def written(name: str, content: Any) -> Callable[[Path], Path]:
    """Prepares a folder with one JSON file."""

    def prepare(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return prepare


def in_fake_run(name: str) -> Callable[[Path], Path]:
    def prepare(folder: Path) -> Path:
        write_fake_run(folder)
        return folder / name

    return prepare


def with_checkpoints(folder: Path) -> Path:
    write_fake_run(folder)
    for named in ("prepared/teacher", *(f"stages/{r.stage}/../../{r.checkpoint}" for r in training_stages())):
        (folder / named).mkdir(parents=True)
    return folder / "stages/stage1/result.json"


def began(folder: Path) -> None:
    from megatron_jet.postnas.status import _seconds_of

    assert _seconds_of(folder / "stages/stage1/status.json") >= 0


def _seconds(folder: Path) -> None:
    _seconds_taken(folder / "stages/stage1/result.json")


def shown_status(folder: Path) -> None:
    status = read_status(folder / "stages/stage1/status.json", "stage1")
    (
        describe(status),
        describe_end(status),
        status.fraction,
        status.remaining,
        status.elapsed,
        json.dumps(status.to_dict()),
    )
    run_state(RunDirectory(folder), [read_stage(RunDirectory(folder), "stage1", None)])


def submitted(folder: Path) -> Path:
    """A record with one submitted job."""
    write_fake_run(folder)
    job = {"name": "stage1", "target": "stage1", "stage": "stage1", "nodes": 1, "nproc": 1, "gpus": 0, "layout": {}}
    job |= {"depends": ["prepare"], "tokens": 9, "gpu_hours": 0.5, "checkpoint_seconds": None, "reused_from": None}
    SubmissionLog(RunDirectory(folder), "mine", ClusterConfig(), SimpleNamespace(jobs=()), None, None)
    path = folder / "cluster" / "experiment.json"
    record = json.loads(path.read_text())
    row = {"job_id": "7", "job": job}
    record["submissions"] = [{"time": "now", "experiment": None, "nemorun_home": None, "code": "c", "jobs": [row]}]
    path.write_text(json.dumps(record))
    return path


def inputs_of_a_stage(folder: Path) -> None:
    from megatron_jet.postnas.pipeline import _changes

    _changes(folder / "inputs.json", {**INPUTS, "data": ["x", "3.12"]}, "digest")


def candidate_recipe(folder: Path) -> None:
    from megatron_jet.postnas.selection import _recorded

    _recorded(folder / "recipe.json")


def written_results(folder: Path) -> Path:
    """A train_result.json with the hash that it was written with, and a result of a stage, too."""
    from megatron_jet.configs.files import write_checked

    (folder / "w").mkdir()
    content = {"config_hash": "h", "checkpoint": "w", "best_checkpoint": None, "steps": 3, "tokens": 9}
    content |= {"final_losses": {"total": 1.0}, "validation": [{"step": 1, "total": 2.0}]}
    write_checked(folder / "train_result.json", content | {"measured": {"seconds": 1.0, "tokens_per_second": 2.0}})
    return folder / "train_result.json"


def train_result(folder: Path) -> None:
    """As it is, and as if an older version had written it, which made no hash."""
    from megatron_jet.training.job import TrainResult

    for hashed in (True, False):
        if not hashed:
            (folder / "train_result.json.sha256").unlink()
        TrainResult.load(SimpleNamespace(out=folder, name="stage1", config_hash=lambda: "h"))
    (folder / "train_result.json.sha256").write_text(SHA)


def stage_result(folder: Path) -> None:
    from megatron_jet.postnas.stage import read_model

    read_model(folder / "r.json", type(RESULTS["stage1"]))


def checkpoint_marker(folder: Path) -> None:
    from megatron_jet.training.checkpoint_folder import check_complete

    check_complete(folder)


def curves_of_a_job(folder: Path) -> None:
    from megatron_jet.training.metrics import cut_rows

    before = (folder / "metrics.jsonl").read_bytes() if (folder / "metrics.jsonl").is_file() else None
    cut_rows(folder / "metrics.jsonl", 2)
    if before is not None:
        (folder / "metrics.jsonl").write_bytes(before)
    else:
        (folder / "metrics.jsonl").mkdir(exist_ok=True)


def tokenizer_folder(name: str) -> Callable[[Path], Path]:
    """The teacher's tokenizer, without its tokens but for a few: the file is damaged key by key."""
    tiny_teacher = Path(__file__).parents[1] / "megatron_jet" / "teachers" / "tiny"

    def prepare(folder: Path) -> Path:
        for file in ("config.json", "tokenizer.json"):
            (folder / file).write_bytes((tiny_teacher / file).read_bytes())
        return folder / name

    return prepare


def tokenizer(folder: Path) -> None:
    from megatron_jet.data.tokenizer import read_tokenizer

    read_tokenizer(folder)


def model_beside_weights(folder: Path) -> None:
    from megatron_jet.convert.hf_export import checkpoint_config

    checkpoint_config(folder)


def names_of_weights(folder: Path) -> None:
    from megatron_jet.convert.hf_files import _read_index

    _read_index(folder / "model.safetensors.index.json")


def published_config(folder: Path) -> None:
    from megatron_jet.convert.hf_package import hf_config

    model_from_hf(hf_config(folder), str(folder / "config.json"))


def earlier_output(folder: Path) -> None:
    from megatron_jet.convert.outputs import not_an_export, not_an_import

    not_an_import(folder), not_an_export(folder)


def safetensors_index(folder: Path) -> Path:
    teacher = folder / "teacher"
    written("config.json", TEACHER)(teacher)
    return written("model.safetensors.index.json", {"weight_map": {"a": "a.safetensors"}})(teacher)


def scores(folder: Path) -> None:
    from megatron_jet.evaluation.result import read_scores

    read_scores(folder / "r.json")


EVALUATION = {
    "kind": "evaluation",
    "model": "m",
    "harness": "1",
    "settings": {},
    "tasks": {"a": {"metrics": {"acc": 0.5}, "stderr": {}, "num_fewshot": 0, "samples": 3, "version": "1"}},
    "presets": {"p": {"score": 1.0, "parts": {"a": 1.0}, "comparable": "x", "not_comparable": "y"}},
    "measured": {"seconds": 1.0},
}
CLUSTER = {
    "scheduler": "slurm",
    "nodes": 2,
    "modules": ["a"],
    "env": {"A": "b"},
    "sbatch": {"comment": "x"},
    "container": {"image": "x.sqsh", "mounts": ["/a:/a"]},
    "tunnel": {"kind": "ssh", "host": "h", "port": 22},
    "preflight": {"free_disk_gib": 1.0, "timeout_seconds": 9},
}
INPUTS = {"teacher": SHA, "data": ["x"]}
MARKER = {"step": 4, "config_hash": "h", "layout": {"tensor": 1}, "files": {"complete.json": 9}}
MODEL = teacher_model(tiny().teacher).to_dict()
LOCK = {"pid": 1, "host": "h", "since": 1.0}
REMOTE = {"tunnel": {"kind": "ssh", "host": "h"}, "path": "/p", "code": "/c"}
RESULTS = {result.stage: result for result in (*other_results(), *selections(), *training_stages())}

READERS = [
    Reader(
        "config.yaml",
        written("config.yaml", dump_yaml(tiny())),
        lambda f: (RunDirectory(f).config(), load_recipe(str(f / "config.yaml"))),
        parse=lambda changed: RunConfig.parse(changed, "config.yaml"),
    ),
    Reader("cluster", written("c.yaml", CLUSTER), lambda f: load_cluster(str(f / "c.yaml"), {})),
    Reader("provenance", in_fake_run("provenance.json"), lambda f: last_stages(RunDirectory(f))),
    Reader("launches", in_fake_run("provenance.json"), lambda f: read_provenance(f / "provenance.json")),
    Reader("experiment", submitted, lambda f: (lambda r: r and (r.jobs, r.all_job_ids))(read_record(RunDirectory(f)))),
    Reader("remote", written("remote.json", REMOTE), lambda f: remote_of(RunDirectory(f))),
    Reader("git_state", written("git_state.json", {"revision": "r", "dirty": False}), git_state),
    Reader("status", written("stages/stage1/status.json", STATUS), shown_status, silent=True),
    Reader("own status", written("stages/stage1/status.json", STATUS), began, silent=True),
    Reader("lock", written(".lock", LOCK), lambda f: _read(f / ".lock"), silent=True),
    Reader("index", written("index.json", INDEX), read_index),
    Reader("teacher", written("config.json", TEACHER), lambda f: teacher_model(TeacherConfig(path=str(f)))),
    Reader("weights index", safetensors_index, lambda f: needed(_with_teacher(f)), silent=True),
    Reader("scores", written("r.json", EVALUATION), scores),
    Reader("scores of a run", in_fake_run("stages/evaluate/result.json"), lambda f: _scores_of_run(f)),
    Reader("neighbour", in_fake_run("stages/stage1/result.json"), _seconds, silent=True),
    Reader("clean", with_checkpoints, lambda f: _named_checkpoints(RunDirectory(f)), deep=False),
    Reader("inputs", written("inputs.json", {"hash": SHA, "inputs": INPUTS}), inputs_of_a_stage, silent=True),
    Reader("candidate", written("recipe.json", {"hash": SHA}), candidate_recipe, silent=True),
    Reader("train result", written_results, train_result, silent=True),
    Reader("stage result", written("r.json", RESULTS["stage1"].to_dict()), stage_result, deep=False),
    Reader("checkpoint", written("complete.json", MARKER), checkpoint_marker, silent=True),
    Reader("curves", written("metrics.jsonl", {"step": 1, "split": "train"}), curves_of_a_job, silent=True),
    Reader("tokenizer config", tokenizer_folder("config.json"), tokenizer),
    Reader("tokenizer", tokenizer_folder("tokenizer.json"), tokenizer, deep=False),
    Reader("model config", written("model_config.json", MODEL), model_beside_weights),
    Reader("weights by name", written("model.safetensors.index.json", {"weight_map": {"a": "b"}}), names_of_weights),
    Reader("export", written("config.json", TEACHER), published_config),
    Reader("earlier import", written("metadata.json", {"sharded_backend": "x"}), earlier_output, silent=True),
    *(
        Reader(f"result of {stage}", written("r.json", result.to_dict()), lambda f, stage=stage: _parse(stage, f))
        for stage, result in RESULTS.items()
        if stage not in ("new_block", "hardware_search", "stage2")
    ),
]  # fmt: skip


def _with_teacher(folder: Path) -> Any:
    return tiny().replace(teacher=TeacherConfig(path=str(folder / "teacher")))


def _scores_of_run(folder: Path) -> None:
    from megatron_jet.evaluation.result import read_scores

    read_scores(folder / "stages/evaluate/result.json")


def _parse(stage: str, folder: Path) -> None:
    from megatron_jet.configs.files import read_json

    result_type(stage).parse(read_json(folder / "r.json"), str(folder / "r.json"))


def whole(content: str) -> Iterator[bytes | None]:
    """Contents of a file that is not what it was; None: a folder in its place."""
    for text in ("", "[]", "{}", "null", "7", '"text"', "true", "[[]]", "NaN", content[: len(content) // 2]):
        yield text.encode()
    yield content.encode()[: len(content) // 2] + b"\x00\xff\xfe" + content.encode()[len(content) // 2 :]
    yield b"\x00" * 64
    yield b'{"a":' * 3000 + b"1" + b"}" * 3000
    yield b"[" * 100_000
    yield b'{"a": ' + b"9" * 5000 + b"}"
    yield None


def parts(content: Any, deep: bool) -> Iterator[Any]:
    """Copies of a JSON value in which one key is gone or holds another type."""
    places: list[list[Any]] = []

    def visit(node: Any, path: list[Any]) -> None:
        for key, item in (
            node.items() if isinstance(node, dict) else enumerate(node[:2]) if isinstance(node, list) else ()
        ):
            places.append([*path, key])
            if deep:
                visit(item, [*path, key])

    visit(content, [])
    for place in (place for place in places if not set(place) & ALIKE):
        for value in (None, "text", [], {}, -1, 1e999, 10**400, {"x": None}, ...):
            changed = copy.deepcopy(content)
            node = changed
            for key in place[:-1]:
                node = node[key]
            if value is ...:
                del node[place[-1]]
            else:
                node[place[-1]] = value
            yield changed


def damage(path: Path, data: bytes | None) -> None:
    """Put this in place of a file; None: a folder."""
    if data is not None:
        path.write_bytes(data)
        return
    path.unlink(missing_ok=True)
    path.mkdir()


def check(reader: Reader, folder: Path, path: Path, what: str, changed: Any = None) -> None:
    try:
        if reader.parse is not None and changed is not None:
            reader.parse(changed)
        else:
            reader.read(folder)
    except UserError as error:
        assert not reader.silent, f"{what}: {error}"
        assert path.name in str(error) and "\n" not in str(error), f"{what}: {error}"
    except Exception as error:
        pytest.fail(f"{reader.name}: {what}: {type(error).__name__}: {error}")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_damaged_file_is_one_line(reader, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    path = reader.prepare(folder)
    content = path.read_text()
    reader.read(folder)  # undamaged it is read
    for data in whole(content):
        damage(path, data)
        check(reader, folder, path, repr(data)[:60])
    path.rmdir()
    for changed in parts(yaml.safe_load(content) if path.suffix == ".yaml" else json.loads(content), reader.deep):
        path.write_text(json.dumps(changed))  # which is YAML, too
        check(reader, folder, path, json.dumps(changed)[:300], changed)


@pytest.mark.parametrize(
    "reader", [r for r in READERS if r.name not in ("lock", "curves")], ids=lambda reader: reader.name
)
def test_pipe_in_place_of_a_file_is_not_waited_for(reader, tmp_path):
    path = reader.prepare(tmp_path)
    path.unlink()
    os.mkfifo(path)
    check(reader, tmp_path, path, "a pipe")


def test_report_reads_damaged_files_in_one_line_or_without_harm(tmp_path):
    from megatron_jet.evaluation.report.collect import _stage_row, read_results
    from megatron_jet.evaluation.report.curves import read_curves

    folder = write_fake_run(tmp_path / "run")
    metrics = (
        '{"step": 1, "kl": 2.0, "split": "train"}\n{"step": "x", "kl": []}\n{"step": 2, "kl": {}, "split": []}\n' * 3
    )
    for name, content, read, silent in (
        ("stages/placement/result.json", None, read_results, False),
        ("stages/stage1/status.json", json.dumps(STATUS), lambda f: _stage_row(f, "stage1", None), True),
        ("stages/stage1/jobs/student/metrics.jsonl", metrics, read_curves, True),
    ):
        path = folder / name
        before = path.read_text() if content is None else content
        reader = Reader(name, written(name, before), read, silent=silent)
        for data in whole(before):
            damage(path, data)
            check(reader, folder, path, repr(data)[:60])
        path.rmdir()
        path.write_text(before)
    assert read_curves(folder)["stage1/student"] == {"train": {"kl": [[1, 2.0]] * 3}}


def test_list_shows_every_run_whatever_its_files_hold(tmp_path, capsys):
    config = dump_yaml(tiny())
    for i, name in enumerate(["config.yaml", "cluster/experiment.json", "remote.json", "stages/prepare/status.json"]):
        for j, data in enumerate([*whole('{"a": {"b": 1}}')][::3]):
            run = tmp_path / f"run{i}-{j}"
            path = run / name
            path.parent.mkdir(parents=True)
            (run / "config.yaml").write_text(config)
            damage(path, data)
    assert list_command(tmp_path, True) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert len(rows) == len(list(tmp_path.iterdir()))
