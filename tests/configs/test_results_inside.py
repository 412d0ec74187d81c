"""What a foreign run's results name lies inside the run, and an export is what was written when it is scored."""

import hashlib
from typing import get_type_hints

import pytest
from pydantic import TypeAdapter, ValidationError

from megatron_jet.configs.checksums import DamagedError, verification, verify_export
from megatron_jet.configs.results import ExportResult, InRun, PrepareResult, TrainStageResult


@pytest.mark.parametrize("path", ["", "/etc", "..", "../other/model", "stages/../../other", "stages/stage1/.."])
def test_paths_that_lead_out_of_a_run_are_refused(path):
    with pytest.raises(ValidationError, match="lies outside the run directory"):
        TypeAdapter(InRun).validate_python(path)
    assert TypeAdapter(InRun).validate_python("stages/stage1/..model") == "stages/stage1/..model"
    for kind, name in ((ExportResult, "path"), (PrepareResult, "teacher_checkpoint"), (TrainStageResult, "checkpoint")):
        assert get_type_hints(kind, include_extras=True)[name] == InRun


@pytest.mark.parametrize("change", ["flip", "cut", "remove"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "modeling.py"])
def test_an_export_that_was_changed_is_not_scored(tmp_path, change, name):
    names = ("model.safetensors", "config.json", "modeling.py", "README.md")
    for each in names:
        (tmp_path / each).write_bytes(each.encode())
    files = {each: hashlib.sha256(each.encode()).hexdigest() for each in names}
    verify_export(tmp_path, files)
    path = tmp_path / name
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:] if change == "flip" else content[:-1])
    if change == "remove":
        path.unlink()
    with pytest.raises(DamagedError, match=f"{name} is .*; the export is damaged") as caught:
        verify_export(tmp_path, files)
    assert caught.value.path == tmp_path
    with verification(False):
        verify_export(tmp_path, files)
    path.write_bytes(content)
    (tmp_path / "README.md").write_text("edited by its owner")
    verify_export(tmp_path, files)
