"""`make install` with a stand-in for Python: what is done once, repeated after an interruption, and otherwise not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# As a system's Python it answers the version check and makes environments; as an environment's it has pip.
PYTHON = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip install "*) [ ! -e "$OFFLINE" ] ;;
esac
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What `make install` needs, in a directory with a space in its name."""
    path = tmp_path / "a checkout"
    (path / "tools").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "tools/find_python.sh", "tools/oldest_versions.py"):
        shutil.copyfile(ROOT / name, path / name)
    return path


def install(checkout: Path, target: str = "install") -> tuple[int, list[str]]:
    """Exit code of `make install` and what it asked Python to do."""
    python, calls = checkout.parent / "python", checkout.parent / "calls"
    write_script(python, PYTHON)
    calls.write_text("")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    environment = kept | {"PYTHON": str(python), "CALLS": str(calls), "OFFLINE": str(checkout.parent / "offline")}
    result = subprocess.run(["make", target], cwd=checkout, env=environment, capture_output=True, check=False)
    words = [line.split()[1:3] for line in calls.read_text().splitlines() if line.startswith("-m")]
    return result.returncode, [" ".join(pair) for pair in words if pair != ["pip", "--version"]]


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def test_installs_once(checkout):
    assert install(checkout) == (0, ["venv .venv", "pip install"])
    assert install(checkout) == (0, [])


def test_an_environment_cut_off_before_pip_is_made_again(checkout):
    write_script(checkout / ".venv" / "bin" / "python", "#!/bin/sh\nexit 1\n")
    assert install(checkout) == (0, ["venv .venv", "pip install"])


def test_a_failed_installation_is_tried_again(checkout):
    offline = checkout.parent / "offline"
    offline.touch()
    code, calls = install(checkout)
    assert code != 0 and calls == ["venv .venv", "pip install"]
    offline.unlink()
    assert install(checkout) == (0, ["pip install"])


def test_the_oldest_environment_is_installed_once_and_after_a_failure_again(checkout):
    target, steps = ".venv-oldest/.installed", ["venv .venv-oldest", "pip install"]
    offline = checkout.parent / "offline"
    offline.touch()
    code, calls = install(checkout, target)
    assert code != 0 and calls == steps
    offline.unlink()
    assert install(checkout, target) == (0, steps)
    assert install(checkout, target) == (0, [])


@pytest.mark.parametrize("target", ["test", "test-slow", "test-faults", "test-gpu", "bench-gpu"])
def test_a_python_that_is_given_is_taken_as_it_is(checkout, target):
    """Nothing is installed then, not even an environment made. Without PY the same target installs first."""

    def planned(*arguments: str) -> str:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        command = ["make", "--dry-run", target, *arguments]
        return subprocess.run(command, cwd=checkout, env=kept, capture_output=True, text=True, check=True).stdout

    assert "pip install" in planned() and ".venv/bin/python" in planned()
    with_mine = planned("PY=/opt/mine/python3")
    assert "/opt/mine/python3" in with_mine and "pip" not in with_mine and ".venv" not in with_mine


@pytest.mark.timeout(1800)
def test_gpu_tests_collect_without_optional_packages():
    """A GPU machine may have no lm-eval, no NeMo-Run, no hypothesis; modules that need one are skipped."""
    command = [sys.executable, "-m", "pytest", "-p", "missing_packages", "-p", "no:cacheprovider", "-q"]
    # Installed plugins may need such a package; without them `timeout` is a marker that nobody knows.
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command += ["-p", "pytest_timeout"]
    done = subprocess.run(
        [*command, "--collect-only", "-m", "gpu", "tests"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    for module in ("kernels/test_triton_kernels.py", "gpu/test_training_gpu.py", "evaluation/test_throughput_gpu.py"):
        assert f"tests/{module}::" in done.stdout
