"""A worker of tests/pool.py: waits for functions, runs each inside its layout, answers. Ends with the pool."""

import faulthandler
import importlib.util
import os
import signal
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Client
from pathlib import Path

import torch.distributed as dist

from megatron_jet.configs.training import ParallelConfig
from megatron_jet.training.parallel import destroy_parallel, init_parallel


def main(address: str, key: bytes, port: int, log: str) -> None:
    """Serve the pool.

    Args:
        address, key: where the pool listens.
        port: of the rendezvous store.
        log: file that takes what the worker prints.
    """
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    connection = Client(address, authkey=key)
    connection.send(os.getpid())
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        try:
            call = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = (True, run(store, *call))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)


def run(store, rank, call, module, file, name, args, kwargs, layout, world_size, seed):
    """One function inside one layout."""
    function = getattr(load_module(module, file), name)
    init_parallel(
        ParallelConfig.parse(layout),
        seed,
        store=dist.PrefixStore(f"call{call}", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=190),
    )
    try:
        return function(*args, **kwargs)
    finally:
        destroy_parallel()


def load_module(name: str, file: str):
    """A module by its name, or by its file under that name: pytest's names of test modules cannot be imported."""
    if name in sys.modules:
        return sys.modules[name]
    try:
        module = importlib.import_module(name)
        if Path(module.__file__).resolve() == Path(file):
            return module
    except ImportError:
        pass
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
