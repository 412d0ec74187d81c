#!/usr/bin/env python3
"""Wheels -> the folder that travels: site/ for PYTHONPATH, bin/ptxas. Leaves out what no import needs.

python unpack.py WHEELS STAGE [TE_WHEELS]
"""

import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

KEPT_GPU = 90  # compute capability of H100 and H200, times ten
SKIPPED = re.compile(r"(^|/)(tests?|__pycache__)/|\.(a|pdb)$|^transformer_engine/jax/|libnccl_ep\.so$")


def main() -> None:
    """Unpack what the command line names."""
    wheels, stage = Path(sys.argv[1]), Path(sys.argv[2])
    site, tools = stage / "site", stage / "bin"
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            if wheel.name.startswith("nvidia_cuda_nvcc"):
                name = next(n for n in archive.namelist() if n.endswith("bin/ptxas"))
                (tools / "ptxas").write_bytes(archive.read(name))
                (tools / "ptxas").chmod(0o755)
            else:
                extract(archive, site)
    for wheel in sorted(Path(sys.argv[3]).glob("*.whl")) if len(sys.argv) > 3 else ():
        with zipfile.ZipFile(wheel) as archive:
            extract(archive, stage / "te")
    for library in stage.glob("te/transformer_engine/**/libtransformer_engine.so"):
        keep_one_gpu(library)
        subprocess.run(["strip", "--strip-unneeded", library], check=True)


def extract(archive: zipfile.ZipFile, target: Path) -> None:
    """Everything of a wheel that an import may need."""
    for name in archive.namelist():
        if not SKIPPED.search(name) and not name.endswith("/"):
            archive.extract(name, target)


def keep_one_gpu(path: Path) -> None:
    """Drop the machine code of all other GPUs from a library, in place: zeros, which compress to nothing."""
    data = bytearray(path.read_bytes())
    offset, (entry_size, count, names_at) = (
        struct.unpack_from("<Q", data, 0x28)[0],
        struct.unpack_from("<HHH", data, 0x3A),
    )
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * entry_size) for i in range(count)]
    names = headers[names_at][4]
    for header in headers:
        start = names + header[0]
        name = bytes(data[start : data.index(0, start)])
        if name in (b".nv_fatbin", b"__nv_relfatbin"):
            prune_section(data, header[4], header[5])
    path.write_bytes(data)


def prune_section(data: bytearray, start: int, size: int) -> None:
    """Keep the Hopper images of every fat binary in a section; the rest becomes zeros."""
    at, last = start, start + size
    while at < last - 16:
        magic, _, header, length = struct.unpack_from("<IHHQ", data, at)
        if magic != 0xBA55ED50:
            at += 8
            continue
        entry, end, kept = at + header, at + header + length, b""
        while entry < end:
            entry_header, payload = struct.unpack_from("<IQ", data, entry + 4)
            if struct.unpack_from("<I", data, entry + 28)[0] == KEPT_GPU:
                kept += bytes(data[entry : entry + entry_header + payload])
            entry += entry_header + payload
        if kept:
            struct.pack_into("<Q", data, at + 8, len(kept))
            data[at + header : end] = kept + bytes(length - len(kept))
        at = end


if __name__ == "__main__":
    os.umask(0o022)
    main()
