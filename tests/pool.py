"""A pool of worker processes for distributed tests, started once per session and only as far as needed.

A test sends a top-level function with arguments; every worker sets up the layout, runs it and answers with its result
or its traceback. A worker that hangs or dies fails the test, with the stacks of all workers, and the pool starts anew.

Importing Megatron takes seconds. So conftest.py forks a process right after it has done so, while there is but one
thread, and the workers are forks of that one: they start at once.
"""

import contextlib
import inspect
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

import pool_worker
from megatron_jet.configs.training import ParallelConfig

GRACE_SECONDS = 5.0  # for the other ranks to answer after one has failed


class WorkerFailure(AssertionError):
    """A worker raised, hung or died."""


class Nursery:
    """A process that forks workers on request, and ends with the session."""

    def __init__(self):
        self._requests, other_end = Pipe()
        self._pid = os.fork()
        if self._pid == 0:
            self._requests.close()
            _serve_forks(other_end)
        other_end.close()

    def fork_worker(self, *args: Any) -> None:
        """Start `pool_worker.main(*args)` in a new process."""
        self._requests.send(args)


def _serve_forks(requests: Connection) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended workers vanish by themselves
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            args = requests.recv()
            if os.fork() == 0:
                requests.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                pool_worker.main(*args)
                os._exit(0)
    finally:
        os._exit(0)


def send_signal(process: int, number: int) -> None:
    """Signal a process given by its file descriptor; one that has ended is left alone."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, number)


class WorkerPool:
    """Up to `size` gloo workers. `run` on n ranks uses the first n, as a world of n."""

    def __init__(self, nursery: Nursery, size: int = 4):
        self.nursery = nursery
        self.size = size
        # Process (as a file descriptor, since the id of one that ended may belong to another) and connection by rank.
        self._workers: list[tuple[int, Connection]] = []
        self._calls = 0
        self._store: dist.TCPStore | None = None
        self._folder: tempfile.TemporaryDirectory | None = None

    def run(
        self,
        function: Callable,
        *args: Any,
        layout: ParallelConfig | None = None,
        world_size: int | None = None,
        seed: int = 0,
        timeout: float = 200.0,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `function(*args, **kwargs)` on every rank of a world.

        Args:
            function: at the top level of a module that can be imported by its file; it must not be a closure.
            layout: parallel layout to initialise around the call; None for one tensor- and pipeline-parallel rank.
            world_size: number of ranks; by default one model of this layout.
            timeout: seconds until a worker that has not answered counts as hung.

        Returns:
            The results by rank (picklable; tensors come as copies).

        Raises:
            WorkerFailure: with the traceback of the first rank that raised, or the stacks of workers that hung.
        """
        layout = layout or ParallelConfig()
        world_size = world_size or layout.tensor * layout.pipeline
        self._start(world_size)
        self._calls += 1
        file = str(Path(inspect.getsourcefile(function)).resolve())
        where = (function.__module__, file, function.__qualname__)
        call = (self._calls, *where, args, kwargs, layout.to_dict(), world_size, seed)
        workers = self._workers[:world_size]
        for rank, (_, connection) in enumerate(workers):
            connection.send((rank, *call))
        return self._answers(workers, time.monotonic() + timeout)

    def close(self) -> None:
        """End all workers."""
        for process, connection in self._workers:
            connection.close()
            send_signal(process, signal.SIGKILL)
            os.close(process)
        self._workers = []
        self._store = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self, count: int) -> None:
        """Fork workers until there are `count`."""
        if count > self.size:
            raise ValueError(f"the pool has {self.size} workers, not {count}")
        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            self._folder = tempfile.TemporaryDirectory(prefix="pool")
        for index in range(len(self._workers), count):
            key = secrets.token_bytes(16)
            address = os.path.join(self._folder.name, f"socket{index}")
            with Listener(address, authkey=key) as listener:
                self.nursery.fork_worker(address, key, self._store.port, self._log(index))
                connection = listener.accept()
            self._workers.append((os.pidfd_open(connection.recv()), connection))

    def _answers(self, workers: list[tuple[int, Connection]], deadline: float) -> list[Any]:
        waiting = {connection: rank for rank, (_, connection) in enumerate(workers)}
        results: list[Any] = [None] * len(workers)
        failures: list[str] = []
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                stuck = sorted(waiting.values())
                failures.append(f"ranks {stuck} did not answer in time\n{self._stacks(workers, stuck)}")
                self.close()
                raise WorkerFailure("\n".join(failures))
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    ok, value = connection.recv()
                except EOFError:
                    ok, value = False, f"worker died\n{self._tail(rank)}"
                if ok:
                    results[rank] = value
                else:
                    failures.append(f"rank {rank}:\n{value}")
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failures:
            self.close()  # gloo's groups may be half-way through a collective
            raise WorkerFailure("\n".join(failures))
        return results

    def _stacks(self, workers: list[tuple[int, Connection]], ranks: list[int]) -> str:
        for rank in ranks:
            send_signal(workers[rank][0], signal.SIGUSR1)  # faulthandler writes the stacks into the log
        time.sleep(1.0)
        return "\n".join(f"rank {rank}:\n{self._tail(rank)}" for rank in ranks)

    def _log(self, index: int) -> str:
        return os.path.join(self._folder.name, f"worker{index}.log")

    def _tail(self, index: int) -> str:
        return "\n".join(Path(self._log(index)).read_text(errors="replace").splitlines()[-60:])
