"""What an export and the project promise about versions: said once, and said to the user of an older one."""

import importlib.util
import runpy
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from megatron_jet.convert.hf import configuration_megatron_jet
from megatron_jet.convert.hf.configuration_megatron_jet import OLDEST_TORCH, OLDEST_TRANSFORMERS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def oldest_versions():
    spec = importlib.util.spec_from_file_location("oldest_versions", ROOT / "tools" / "oldest_versions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", ["4.57.6", "5.6.1", "5.0.0rc1"])
def test_too_old_transformers_are_told_what_to_install(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__=version))
    with pytest.raises(ImportError, match=rf"needs transformers>={OLDEST_TRANSFORMERS}, {version} is") as caught:
        runpy.run_path(configuration_megatron_jet.__file__)
    assert "\n" not in str(caught.value) and "pip install" in str(caught.value)


def test_the_oldest_environment_is_what_the_project_promises(capsys):
    assert oldest_versions().main() == 0
    found = dict(line.split("==") for line in capsys.readouterr().out.splitlines())
    required = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"]]
    for requirement in map(Requirement, required):
        assert requirement.specifier.contains(found[requirement.name]), requirement
        lower = {s.version for s in requirement.specifier if s.operator in (">=", "==")}
        assert lower <= {found[requirement.name]}, requirement
    assert (found["torch"], found["transformers"]) == (OLDEST_TORCH, OLDEST_TRANSFORMERS), "what exports say"


def test_the_newest_environment_is_within_what_the_project_promises():
    pins = oldest_versions().pinned((ROOT / "constraints.txt").read_text())
    extras = [
        requirement for name in ("train", "launch", "eval") for requirement in PROJECT["optional-dependencies"][name]
    ]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        pin = pins.get(requirement.name.lower(), pins.get(requirement.name.lower().replace("-", "_")))
        assert pin is not None and requirement.specifier.contains(Version(pin)), requirement
