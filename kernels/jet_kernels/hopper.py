"""Triton 3.4 to 3.7.0 on Hopper (H100, H200): what is wrong there, and what takes its place. No torch, no Triton.

Two things are wrong, each enough to spoil gradients without a word (docs/numerics.md):

- Triton miscompiles one backward kernel of fla's gated delta rule (github.com/fla-org/flash-linear-attention, issue
  640) where its key tile is 64 wide. `gated_delta_rule/hopper_backward.py` launches it with 16, 32 or 128.
- The `ptxas` that these Tritons bring is 12.8, which emits wrong machine code for some Hopper kernels, as do its
  followers before 13.3. The package nvidia-cuda-nvcc has a current one, and TRITON_PTXAS_PATH makes Triton take it.

Triton 3.7.1 and newer need neither.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

CAPABILITY = "9.0"  # compute capability of Hopper, as nvidia-smi prints it
MISCOMPILING_TRITON = ((3, 4, 0), (3, 7, 1))  # from the first, up to but without the second
NEEDED_PTXAS = (13, 3)
PTXAS_VARIABLE = "TRITON_PTXAS_PATH"
CUDA_FOLDER = Path("/usr/local/cuda")  # where a toolkit lies if nothing says so
_PTXAS_PACKAGE = "nvidia-cuda-nvcc"
_INSTALL = f"pip install '{_PTXAS_PACKAGE}>={NEEDED_PTXAS[0]}.{NEEDED_PTXAS[1]}'"


def doubtful_triton() -> str | None:
    """Version of the installed Triton if it is one that miscompiles for Hopper, else None."""
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    first, fixed = MISCOMPILING_TRITON
    return found if first <= numbers < fixed else None


def find_ptxas() -> Path | None:
    """What TRITON_PTXAS_PATH names, else the assembler of the package nvidia-cuda-nvcc, else None."""
    named = os.environ.get(PTXAS_VARIABLE)
    return Path(named) if named else _packaged("ptxas")


def _packaged(program: str) -> Path | None:
    """A program of the package nvidia-cuda-nvcc."""
    try:
        files = importlib.metadata.distribution(_PTXAS_PACKAGE).files or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(file.locate()) for file in files if file.parts[-2:] == ("bin", program))
    return next(found, None)


def takes_tilelang() -> bool:
    """Whether fla will take tilelang's kernel: installed, not switched off, and an nvcc where fla looks for one. If one
    of them is missing, fla goes on without a word, to its own launch that raises in the first backward pass."""
    if importlib.util.find_spec("tilelang") is None or os.environ.get("FLA_TILELANG") == "0":
        return False
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [Path(home)] if home else []
    compilers = [folder / "bin" / "nvcc" for folder in (*homes, CUDA_FOLDER)]
    return bool(shutil.which("nvcc") or _packaged("nvcc")) or any(path.exists() for path in compilers)


@functools.cache
def ptxas_version(path: Path) -> tuple[int, int] | None:
    """(13, 5) for example; None if it does not run or does not say."""
    try:
        done = subprocess.run([str(path), "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = re.search(r"release (\d+)\.(\d+)", done.stdout)
    return (int(release[1]), int(release[2])) if release and done.returncode == 0 else None


def ptxas_problem() -> str | None:
    """Why no current ptxas is at hand, with the fix; None if one is."""
    path, needed = find_ptxas(), "{}.{}".format(*NEEDED_PTXAS)
    if path is None:
        return f"it needs ptxas {needed} or newer: {_INSTALL}"
    version = ptxas_version(path)
    if version is not None and version >= NEEDED_PTXAS:
        return None
    what = "does not run" if version is None else "is version {}.{}".format(*version)
    fix = f"set {PTXAS_VARIABLE} to a newer one, or unset it and {_INSTALL}"
    if not os.environ.get(PTXAS_VARIABLE):
        fix = _INSTALL
    return f"it needs ptxas {needed} or newer, and {path} {what}: {fix}"


def backward_problem() -> str | None:
    """Why the gated delta rule cannot train on Hopper with the installed packages, in one line with every way out.

    None if it can: with a Triton that is right, with a current ptxas and our own tiles, or with tilelang's kernel.
    """
    triton = doubtful_triton()
    if triton is None:
        return None
    if os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") == "1":
        problem = "FLA_DISABLE_BACKEND_DISPATCH=1 keeps fla from taking another kernel: unset it"
    elif takes_tilelang():
        return None
    else:
        problem = ptxas_problem()
    if problem is None:
        return None
    return (
        f"triton {triton} cannot train the gated delta rule on Hopper GPUs by itself; {problem}, use triton>=3.7.1, "
        "or set JET_KERNELS=auto,chunk_gated_delta_rule=reference (slower)"
    )


def own_tiles() -> bool:
    """Whether our launch of the backward kernel takes the place of fla's on a Hopper GPU."""
    return doubtful_triton() is not None and ptxas_problem() is None


def use_current_ptxas() -> str | None:
    """Let this process and its children assemble Triton's kernels with a current ptxas where Triton's own is in doubt.

    For Hopper GPUs, before the first kernel is compiled.

    Returns:
        A line for the log about what is used, None where nothing needs to change.
    """
    triton = doubtful_triton()
    if triton is None:
        return None
    problem = ptxas_problem()
    if problem is not None:
        return f"triton {triton} assembles wrong code for some Hopper kernels; {problem}"
    path = find_ptxas()
    os.environ[PTXAS_VARIABLE] = str(path)
    return "triton {} on Hopper: ptxas {}.{} at {}".format(triton, *ptxas_version(path), path)
