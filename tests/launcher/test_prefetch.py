"""What counts as there: a directory that a download left half-way does not."""

import json

import pytest

from jet_launcher.prefetch import needed, refuse_missing
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.recipes.catalog import load_recipe
from megatron_jet.configs.run import TeacherConfig


@pytest.fixture
def teacher(tmp_path):
    path = tmp_path / "Qwen2.5-1.5B"
    path.mkdir()
    return path


def present(teacher) -> dict[str, bool]:
    config = load_recipe("tiny").replace(teacher=TeacherConfig(path=str(teacher), tokenizer=str(teacher)))
    return {item.what: item.present for item in needed(config)}


def test_a_model_is_there_with_all_of_its_weights(teacher):
    assert present(teacher) == {"teacher.path": False, "teacher.tokenizer": False}
    (teacher / "config.json").write_text("{}")
    (teacher / "tokenizer.json").write_text("{}")
    assert present(teacher) == {"teacher.path": False, "teacher.tokenizer": True}, "no weights yet"
    with pytest.raises(UserError, match="missing here, and compute nodes have no network: teacher.path="):
        refuse_missing(load_recipe("tiny").replace(teacher=TeacherConfig(path=str(teacher))))
    weights = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (teacher / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (teacher / "model-1.safetensors").touch()
    assert not present(teacher)["teacher.path"], "one shard of two"
    (teacher / "model-2.safetensors").touch()
    assert present(teacher)["teacher.path"]


def test_a_model_in_one_file(teacher):
    (teacher / "config.json").write_text("{}")
    (teacher / "model.safetensors").touch()
    assert present(teacher)["teacher.path"]
