"""slurm/preflight.py on one node, in an environment whose packages are made up."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_jet.configs.overrides import dump_yaml
from megatron_jet.configs.recipes.tiny import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check(tmp_path):
    """Run the preflight with some versions (None: as installed) and with GPUs of a compute capability, if any."""

    def run(versions: dict[str, str], capability: str | None = None, seen: int = 1, **environment: str):
        packages, programs, run_dir, out = (tmp_path / name for name in ("packages", "bin", "run", "out"))
        for folder in (packages, programs, run_dir, out):
            folder.mkdir()
        (run_dir / "config.yaml").write_text(dump_yaml(tiny()))
        for name, version in versions.items():
            info = packages / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if capability is not None:
            (packages / "fla.py").touch()
            count = f"class cuda:\n    device_count = staticmethod(lambda: {seen})\n"
            (packages / "torch.py").write_text(f'__version__ = "2.11.0+cpu"\n{count}')
        smi = programs / "nvidia-smi"
        smi.write_text(f'#!/bin/sh\ncase "$1" in *compute_cap*) echo {capability} ;; *) echo "0, H100, 0" ;; esac\n')
        smi.chmod(0o755)
        settings = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": f"{packages}:{ROOT}:{ROOT / 'kernels'}",
            "RANK": "0",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "WORLD_SIZE": "1",
            "POSTNAS_PREFLIGHT_DIR": str(out),
            "POSTNAS_RUN_DIR": str(run_dir),
            "POSTNAS_PREFLIGHT_TIMEOUT": "60",
            "POSTNAS_PREFLIGHT_DISK_GIB": "0",
            "POSTNAS_PREFLIGHT_BANDWIDTH": "0",
            "POSTNAS_PREFLIGHT_COMMAND": "",
            "POSTNAS_GPUS": "0" if capability is None else "1",
        }
        command = [sys.executable, ROOT / "slurm" / "preflight.py", "n1"]
        done = subprocess.run(command, env=settings | environment, capture_output=True, text=True, timeout=250)
        return done, {path.name: path.read_text().strip() for path in out.iterdir()}

    return run


def test_fit(check):
    done, files = check({})
    assert done.returncode == 0, done.stderr
    assert set(files) == {"n1.here", "n1.ready", "n1.ok"}


def test_a_site_check_that_hangs_makes_the_node_bad(check):
    done, files = check({}, POSTNAS_PREFLIGHT_COMMAND="sleep 15; true", POSTNAS_PREFLIGHT_TIMEOUT="1")
    assert done.returncode == 1
    assert list(files) == ["n1.bad"]
    assert re.fullmatch(r"site check has not ended after \d+ seconds", files["n1.bad"])


def test_another_megatron_is_nobody_s_fault(check):
    done, files = check({"megatron-core": "0.15.0"})
    assert done.returncode == 2
    assert "megatron-core 0.15.0 is installed, 0.19.2 is needed" in files["all.unfit"]
    assert "n1.ok" in files and "n1.bad" not in files


def test_triton_on_hopper(check):
    done, files = check({"triton": "3.6.0"}, "9.0")
    assert done.returncode == 2
    assert "triton 3.6.0 cannot train the gated delta rule" in files["all.unfit"]
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("kernels, capability", [("auto,chunk_gated_delta_rule=reference", "9.0"), ("auto", "10.0")])
def test_triton_where_it_does_not_matter(check, kernels, capability):
    done, _ = check({"triton": "3.6.0"}, capability, JET_KERNELS=kernels)
    assert done.returncode == 0, done.stderr


def test_gpus_that_torch_does_not_see(check):
    """nvidia-smi is well: a torch built for CPUs, or CUDA_VISIBLE_DEVICES of the login node."""
    done, files = check({}, "9.0", seen=0, JET_KERNELS="reference")
    assert done.returncode == 2
    expected = "torch 2.11.0+cpu sees 0 of 1 GPUs: a CPU build, the driver, or CUDA_VISIBLE_DEVICES"
    assert files["all.unfit"] == expected and "n1.bad" not in files


@pytest.mark.parametrize("version, word", [("2.9.0", "2.9.0 is older than 2.11: slow path"), ("2.12.0+a", "")])
def test_slow_modules_are_said(check, version, word):
    done, _ = check({"transformer-engine": version}, "10.0")
    assert done.returncode == 0, done.stderr
    assert word in done.stdout and ("slow path" in done.stdout) == bool(word)


@pytest.mark.parametrize("capability", [None, "10.0"])
def test_torch_that_is_too_old(check, capability):
    done, files = check({"torch": "2.8.0a0+x"}, capability)
    assert done.returncode == 2
    assert files["all.unfit"] == "torch 2.8.0a0+x is installed, 2.9 or newer is needed"
