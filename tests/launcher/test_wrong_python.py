"""launcher/postnas.py under a Python that cannot run it: one line that says what is needed, never a traceback."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launcher" / "postnas.py"
OLD = "import runpy, sys; sys.version_info = (3, 9, 1); runpy.run_path(sys.argv[1], run_name='__main__')"


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (["-S", str(SCRIPT), "list"], "there is no typer, pydantic, yaml"),
        (["-c", OLD, str(SCRIPT), "--help"], "this is Python 3.9"),
    ],
    ids=["without packages", "old"],
)
def test_one_line_says_what_is_needed(command, found):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: the launcher needs Python 3.12 and megatron-jet[launch]; {found} (")


def test_old_python_can_read_the_script():
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 4))
    new = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr)
    assert not [node for node in ast.walk(tree) if isinstance(node, new) or getattr(node, "returns", None)]
