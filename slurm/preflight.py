"""Checks at the start of an allocation, run by every process of the job: `preflight.py NODE`, configured by POSTNAS_*.

First, one process per node looks at its node (Python and packages, disk, GPUs, the site's own check) and writes
NODE.bad if something is wrong. Packages that are the same everywhere and cannot run the project are nobody's fault:
all.unfit says so, and the job ends. Nodes find each other through these files, which tests the shared file system, and
then over TCP. At last all processes meet for an all-reduce, which has to reach a bandwidth; if it does not, pairs of
nodes are measured and the slow node is named. A node that is well writes NODE.ok. slurm/job.sh reads these files,
excludes the bad nodes and queues the job again.

Needs the standard library only until the nodes have found each other, then the packages that the stage needs, too.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MINIMUM_PYTHON = (3, 12)
REPORTED_PACKAGES = ("torch", "megatron-core", "transformers", "triton", "transformer-engine")
MESSAGE_BYTES = {"nccl": 256 << 20, "gloo": 1 << 20}
POLL_SECONDS = 0.2
REACH_SECONDS = 30.0
EXIT_UNFIT = 2


class Bad(Exception):
    """This node is not fit for work. The message says why."""


class Unfit(Exception):
    """The container or virtual environment cannot run the stage, on any node. The message says why."""


class Job:
    """What the environment says about this process and its job."""

    def __init__(self, node: str, environment: dict[str, str]) -> None:
        self.node = node
        self.rank = int(environment["RANK"])
        self.local_rank = int(environment["LOCAL_RANK"])
        self.processes_per_node = int(environment["LOCAL_WORLD_SIZE"])
        self.world_size = int(environment["WORLD_SIZE"])
        self.directory = Path(environment["POSTNAS_PREFLIGHT_DIR"])
        self.run_dir = Path(environment["POSTNAS_RUN_DIR"])
        self.deadline = time.monotonic() + float(environment["POSTNAS_PREFLIGHT_TIMEOUT"])
        self.free_gib = float(environment["POSTNAS_PREFLIGHT_DISK_GIB"])
        self.bandwidth = float(environment["POSTNAS_PREFLIGHT_BANDWIDTH"])
        self.command = environment["POSTNAS_PREFLIGHT_COMMAND"]
        self.gpus = int(environment["POSTNAS_GPUS"])

    @property
    def nodes(self) -> int:
        return self.world_size // self.processes_per_node

    @property
    def left(self) -> float:
        """Seconds until the deadline, at least one."""
        return max(1.0, self.deadline - time.monotonic())

    def mark(self, kind: str, text: str = "", node: str | None = None) -> None:
        """Write NODE.kind, by default for this node; the file appears complete."""
        partial = self.directory / f".{self.rank}.{kind}"
        partial.write_text(text + "\n")
        partial.rename(self.directory / f"{node or self.node}.{kind}")

    def wait_for_all(self, kind: str) -> bool:
        """Whether all nodes have written their NODE.kind before the deadline, and none is bad."""
        while True:
            if any(self.directory.glob("*.bad")) or any(self.directory.glob("*.unfit")):
                return False
            if len(list(self.directory.glob(f"*.{kind}"))) >= self.nodes:
                return True
            if time.monotonic() > self.deadline:
                return False
            time.sleep(POLL_SECONDS)


def check_node(job: Job) -> None:
    """Everything that a node can tell about itself. Raises Bad."""
    if sys.version_info < MINIMUM_PYTHON:
        raise Bad(
            f"Python {sys.version.split()[0]} at {sys.executable}; {'.'.join(map(str, MINIMUM_PYTHON))} is needed"
        )
    free = shutil.disk_usage(job.run_dir).free / (1 << 30)
    if free < job.free_gib:
        raise Bad(f"{free:.1f} GiB free in {job.run_dir}, {job.free_gib} wanted")
    if job.gpus:
        check_gpus(job)
    if job.command:
        began = time.monotonic()
        try:
            done = subprocess.run(
                ["bash", "-c", job.command], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=job.left
            )
        except subprocess.TimeoutExpired:
            raise Bad(f"site check has not ended after {time.monotonic() - began:.0f} seconds") from None
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or [""]
            raise Bad(f"site check left with {done.returncode}: {said[0][:200]}")


def check_gpus(job: Job) -> None:
    """As many GPUs as asked for, all answering, none with uncorrected memory errors."""
    query = "index,name,ecc.errors.uncorrected.volatile.total"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=min(60.0, job.left),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Bad(f"nvidia-smi does not answer ({error})") from None
    rows = [row.split(", ") for row in done.stdout.strip().splitlines()]
    if done.returncode or len(rows) < job.gpus:
        raise Bad(f"{len(rows)} GPUs answer, {job.gpus} were asked for ({done.stdout.strip()[-200:]})")
    for index, _name, errors in rows:
        if errors.strip().isdigit() and int(errors) > 0:
            raise Bad(f"GPU {index} has {errors.strip()} uncorrected memory errors")


def describe_node(job: Job) -> str:
    """One line with versions, for the log. Different versions on different nodes are an error of their own."""
    found = []
    for name in REPORTED_PACKAGES:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return f"Python {sys.version.split()[0]} {' '.join(found)}"


def check_versions(job: Job) -> None:
    """All nodes run the same versions. Raises Bad on nodes that differ from the majority."""
    lines = {path.name.removesuffix(".here"): path.read_text().strip() for path in job.directory.glob("*.here")}
    values = sorted(lines.values())
    common = max(values, key=values.count)
    if lines[job.node] != common:
        raise Bad(f"runs {lines[job.node]}, other nodes {common}")


def check_environment(job: Job) -> None:
    """The packages can run this run's stages. The same on all nodes, since their versions are. Raises Unfit."""
    try:
        from megatron_jet.configs.environment import gpu_problem, run_problem, slow_path
        from megatron_jet.configs.errors import UserError
    except ImportError as error:
        raise Unfit(f"{error}; install the project's extras 'train,eval,gpu' where the job runs") from None
    try:
        problem = run_problem(job.run_dir, compute_capability(job), os.environ.get("JET_KERNELS", "auto"))
        if job.gpus and not problem:
            import torch  # nvidia-smi may be well where torch is not

            problem = gpu_problem(job.gpus, torch.cuda.device_count(), torch.__version__)
            if slow := slow_path():
                print(f"{job.node}: {slow}", flush=True)
    except UserError as error:
        problem = str(error)
    if problem:
        raise Unfit(problem)


def compute_capability(job: Job) -> str | None:
    """Of the first GPU, "9.0" for example; None without GPUs, or where nvidia-smi is too old to tell."""
    if not job.gpus:
        return None
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=min(60.0, job.left))
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None


def check_reach(job: Job) -> None:
    """Every node reaches the head node over TCP. The head node judges: it sees who came. Raises Bad."""
    if job.nodes == 1:
        return
    port_file = job.directory / "port"
    if job.rank == 0:
        came = _who_comes(job, port_file)
        missing = sorted({path.name.removesuffix(".here") for path in job.directory.glob("*.here")} - came - {job.node})
        if len(missing) == job.nodes - 1 > 1:
            raise Bad("no other node reaches it over TCP")
        for node in missing:
            job.mark("bad", f"does not reach the head node {job.node} over TCP", node)
        return
    while not port_file.exists() and time.monotonic() < job.deadline:
        time.sleep(POLL_SECONDS)
    with suppress(OSError, ValueError):  # the head node will say so
        address = (os.environ["MASTER_ADDR"], int(port_file.read_text()))
        with socket.create_connection(address, timeout=REACH_SECONDS) as connection:
            connection.sendall(job.node.encode())


def _who_comes(job: Job, port_file: Path) -> set[str]:
    came: set[str] = set()
    with socket.create_server(("", 0), backlog=max(64, job.nodes)) as server:
        partial = port_file.with_suffix(".partial")
        partial.write_text(str(server.getsockname()[1]))
        partial.rename(port_file)
        end = min(job.deadline, time.monotonic() + REACH_SECONDS)
        while len(came) < job.nodes - 1 and time.monotonic() < end:
            server.settimeout(max(0.1, end - time.monotonic()))
            with suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(REACH_SECONDS)
                    came.add(connection.makefile().read())
    return came


def bus_bandwidth(dist, torch, device, size: int, group=None, ranks: int = 1) -> float:
    """GB/s over the slowest link of an all-reduce, as nccl-tests counts it. Best of three."""
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    best = 0.0
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(group=group)
        start = time.perf_counter()
        dist.all_reduce(data, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * (ranks - 1) / ranks * size / (time.perf_counter() - start) / 1e9)
    return best


def check_network(job: Job) -> None:
    """All-reduce over all processes, and on failure between neighbouring nodes. Raises Bad on slow nodes."""
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a failed collective raises instead of killing the process
    import torch
    import torch.distributed as dist

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = torch.device("cuda", job.local_rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=job.left))
    try:
        speed = bus_bandwidth(dist, torch, device, MESSAGE_BYTES[backend], ranks=job.world_size)
        if job.rank == 0:
            print(f"all-reduce over {job.world_size} processes: {speed:.3f} GB/s ({backend})", flush=True)
        slow = torch.tensor(float(speed < job.bandwidth), device=device)
        dist.all_reduce(slow)  # one verdict for all
        if slow.item() == 0:
            return
        best = best_pair(job, dist, torch, device, MESSAGE_BYTES[backend]) if job.nodes > 2 else speed
        if best < job.bandwidth:
            raise Bad(f"all-reduce at {best:.3f} GB/s, {job.bandwidth} wanted")
    finally:
        dist.destroy_process_group()


def best_pair(job: Job, dist, torch, device, size: int) -> float:
    """This node's better bandwidth of those with its two neighbours on a ring: who is slow with both is to blame."""
    mine, best = job.rank // job.processes_per_node, 0.0
    for first in range(job.nodes):
        pair = sorted((first, (first + 1) % job.nodes))
        ranks = [node * job.processes_per_node + i for node in pair for i in range(job.processes_per_node)]
        group = dist.new_group(ranks)
        if mine in pair:
            best = max(best, bus_bandwidth(dist, torch, device, size, group, len(ranks)))
        dist.barrier()
    return best


def main() -> int:
    """Exit code 0: this node is well and so are the others; 2: the environment is to blame; 1: something else."""
    job = Job(sys.argv[1], dict(os.environ))
    leader = job.local_rank == 0
    try:
        if leader:
            check_node(job)
            line = describe_node(job)
            print(f"{job.node} ({socket.gethostname()}): {line}", flush=True)
            job.mark("here", line)
        if not job.wait_for_all("here"):
            return 1  # somebody else is bad; this node says nothing against itself
        if leader:
            check_versions(job)
            check_environment(job)
            check_reach(job)
            job.mark("ready")
        if not job.wait_for_all("ready"):
            return 1
        if job.bandwidth > 0 and job.world_size > 1:
            check_network(job)
    except Bad as problem:
        print(f"{job.node}: {problem}", file=sys.stderr, flush=True)
        job.mark("bad", str(problem))
        return 1
    except Unfit as problem:
        print(f"all nodes: {problem}", file=sys.stderr, flush=True)
        job.mark("unfit", str(problem), "all")
        return EXIT_UNFIT
    except Exception as error:
        # Everybody sees a failed collective; whoever could not be reached is the one that leaves no word.
        print(f"{job.node}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        if leader and not (job.directory / f"{job.node}.bad").exists():
            job.mark("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
