"""The code that ships with a job: a copy of this checkout as it is now, uncommitted changes included."""

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from jet_launcher.git import ask_git
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.estimate_text import format_bytes

# What jobs never need. Everything else that git tracks or would track goes along.
LEFT_OUT = ("tests", "docs", "runs", ".ci", ".git", ".github")
# Of a checkout without git: the directories that jobs run.
NEEDED = ("megatron_jet", "kernels", "launcher", "slurm", "tools", "pyproject.toml")
LIMIT_BYTES = 256 << 20


@dataclass(frozen=True)
class ShippedCode:
    """Where the code of a submission lies.

    Attributes:
        path: directory that holds the copy.
        digest: SHA-256 over names, modes and contents; the directory is named by its start.
        files: number of files.
    """

    path: Path
    digest: str
    files: int


def ship_code(root: Path, run_dir: Path) -> ShippedCode:
    """Copy the checkout `root` into `run_dir/code/<digest>`, once per content.

    Raises:
        UserError: more than 256 MiB would be copied (a data file that git does not ignore, usually).
    """
    files = code_files(root)
    total = sum((root / name).lstat().st_size for name in files)
    if total > LIMIT_BYTES:
        largest = max(files, key=lambda name: (root / name).lstat().st_size)
        size = format_bytes((root / largest).lstat().st_size)
        raise UserError(
            f"the code that ships with a job would be {format_bytes(total)}; the largest file is {largest} ({size}): "
            "move it out of the checkout or add it to .gitignore"
        )
    digest = code_digest(root, files)
    target = run_dir / "code" / digest[:12]
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Copied beside and renamed: a job never sees half of it.
        partial = Path(tempfile.mkdtemp(prefix=".code-", dir=target.parent))
        for name in files:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, partial / name, follow_symlinks=False)
        partial.chmod(0o755)
        try:
            partial.rename(target)
        except OSError:
            shutil.rmtree(partial)  # another launcher was faster with the same content
    return ShippedCode(target, digest, len(files))


def code_files(root: Path) -> list[str]:
    """Relative paths of what ships, sorted: tracked files, and untracked ones that git does not ignore."""
    listed = _git_files(root)
    if listed is None:
        listed = [
            str(path.relative_to(root))
            for name in NEEDED
            for path in ([root / name] if (root / name).is_file() else sorted((root / name).rglob("*")))
            if "__pycache__" not in path.parts and not path.is_dir()
        ]
    kept = (name for name in listed if Path(name).parts[0] not in LEFT_OUT)
    # A tracked file that was deleted is listed, too; a link to a directory is none of ours.
    return sorted(name for name in kept if (root / name).is_file())


def _git_files(root: Path) -> list[str] | None:
    if not (root / ".git").exists():
        return None  # a copy; a repository further up is somebody else's
    answer = ask_git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    return None if answer.error else list(filter(None, os.fsdecode(answer.output).split("\0")))


def code_digest(root: Path, files: list[str]) -> str:
    """SHA-256 over names, modes and contents."""
    digest = hashlib.sha256()
    for name in files:
        path = root / name
        content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        digest.update(f"{name}\0{path.lstat().st_mode:o}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
