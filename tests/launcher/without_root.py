"""Launcher commands in a child that permissions bind, even where the tests run as root."""

import contextlib
import ctypes
import io
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def drop_override() -> None:
    """root reads and writes every file; what a process without these two capabilities starts does not."""
    prctl = ctypes.CDLL(None).prctl
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; refused to others, who lack them anyway


def run_commands(*commands: tuple[object, ...], **options) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each command line, one after the other."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    child = [sys.executable, __file__, words]
    done = subprocess.run(child, capture_output=True, text=True, preexec_fn=drop_override, **options)
    assert done.returncode == 0, done.stderr
    return [tuple(row) for row in json.loads(done.stdout)]


def main() -> None:
    """The child."""
    sys.path[:0] = [str(ROOT), str(ROOT / "launcher")]
    from jet_launcher.cli import main as launcher

    rows = []
    for words in json.loads(sys.argv[1]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = launcher(words)
        rows.append((code, out.getvalue(), err.getvalue()))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
