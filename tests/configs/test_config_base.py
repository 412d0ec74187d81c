"""Strict frozen models, their one-line errors, and small files that survive a kill."""

import json
import os

import pytest

from megatron_jet.configs.base import StrictModel
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import canonical_json, hash_file, hash_json, read_json, write_json, write_text


class Inner(StrictModel):
    width: int = 1
    names: tuple[str, ...] = ()


class Outer(StrictModel):
    inner: Inner = Inner()
    ratio: float


def test_errors_name_every_key_and_the_nearest_known_one():
    with pytest.raises(UserError) as error:
        Outer.parse({"inner": {"widht": 3}, "ratio": "x"}, "my.yaml")
    message = str(error.value)
    assert message.startswith("my.yaml: ") and "\n" not in message
    assert "inner.widht: unknown key, did you mean 'width'?" in message
    assert "ratio: Input should be a valid number" in message and "(got 'x')" in message
    with pytest.raises(UserError, match="Outer: ratio: Field required"):
        Outer.parse({})
    with pytest.raises(UserError, match="Outer: "):
        Outer.parse([1, 2])


def test_models_are_frozen_and_copies_are_validated():
    model = Outer(ratio=2.0)
    with pytest.raises(ValueError):
        model.ratio = 3.0
    assert model.replace(ratio=3.0) == Outer(ratio=3.0)
    with pytest.raises(ValueError):
        model.replace(ratio="wide")
    with pytest.raises(ValueError):
        model.replace(height=1)


def test_plain_dict_round_trip():
    model = Outer(inner=Inner(width=4, names=("a", "b")), ratio=0.1)
    assert Outer.parse(json.loads(json.dumps(model.to_dict()))) == model


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"x": 1})
    assert read_json(path) == {"schema_version": 1, "x": 1}
    assert path.stat().st_mode & 0o777 == 0o644

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_text(path, "new")
    assert read_json(path)["x"] == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


def test_bad_json_names_the_file(tmp_path):
    with pytest.raises(UserError, match="nothing.json: no such file"):
        read_json(tmp_path / "nothing.json")
    (tmp_path / "bad.json").write_text('{"a": ')
    with pytest.raises(UserError, match="bad.json: cannot be read as JSON"):
        read_json(tmp_path / "bad.json")


def test_hashes_do_not_depend_on_key_order(tmp_path):
    assert canonical_json({"b": 1, "a": [1, 2]}) == '{"a":[1,2],"b":1}'
    assert hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1}) != hash_json({"a": 1, "b": 3})
    (tmp_path / "x").write_bytes(b"abc")
    # FIPS 180-2, example B.1.
    assert hash_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(UserError, match="no such file"):
        hash_file(tmp_path / "y")
