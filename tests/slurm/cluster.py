"""A real Slurm on this machine: controller, accounting and several node daemons, all under one directory.

    python tests/slurm/cluster.py /tmp/slurm [--nodes 4] [--netns] [--no-accounting] -- COMMAND...

runs COMMAND (bash for an interactive look) with SLURM_CONF set, and takes everything down after it.

Needs root. Installs Debian's packages where they are missing and writes nothing outside its directory. Nodes share the
host's name and address (one port each); with --netns each has a network namespace, an address and a name of its own.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
}
APT_PATIENCE = 120.0  # seconds
SUBNET = "10.77.0"
BRIDGE = "pnbr0"
NAMESPACE = "pnode"
_SILENT = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


class ClusterError(RuntimeError):
    """The test cluster could not be installed, started or stopped."""


def missing_packages() -> list[str]:
    """Debian packages whose programs are not here."""
    wanted = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    return wanted + (["slurm-wlm-mysql-plugin"] if "slurmdbd" in wanted else [])


def install() -> None:
    """Install what is missing with apt, without letting the packages start services of their own."""
    wanted = missing_packages()
    if not wanted:
        return
    policy = Path("/usr/sbin/policy-rc.d")
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        _apt("update", "-qq")
        _apt("install", "-y", "-qq", "--no-install-recommends", *wanted)
    finally:
        if made:
            policy.unlink()


def _apt(*arguments: str) -> None:
    """apt-get. Waits for its turn where another one is at work; its own option for that leaves out `update`."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    deadline = time.monotonic() + APT_PATIENCE
    while True:
        done = subprocess.run(["apt-get", *arguments], env=environment, capture_output=True, text=True, timeout=600)
        if done.returncode == 0:
            return
        if "lock" not in done.stderr or time.monotonic() > deadline:
            raise ClusterError(f"apt-get {' '.join(arguments)}: {done.stderr.strip()[-800:]}")
        time.sleep(2)


def namespaces_work() -> bool:
    """Whether this machine lets us make network namespaces, bridges and host names."""
    probe = f"ip link add {BRIDGE}t type bridge && ip link del {BRIDGE}t && unshare --net --uts --mount true"
    return shutil.which("ip") is not None and subprocess.run(probe, shell=True, capture_output=True).returncode == 0


@dataclass
class Cluster:
    """One cluster in `prefix`.

    Attributes:
        prefix: directory of configuration, state, logs and sockets; short, for the socket paths.
        nodes: number of nodes, named n1, n2, ...
        cpus: processors that every node claims to have.
        gpus: fake GPUs per node; 0 leaves them out.
        netns: own network namespace, address and host name for every node.
        accounting: run slurmdbd with a private MariaDB, so that sacct works.
        kill_wait: seconds between SIGTERM and SIGKILL.
        grace: seconds that preempted jobs of partition `batch` get.
        message_timeout: seconds that Slurm's commands wait for an answer of its daemons, each time they try.
    """

    prefix: Path
    nodes: int = 4
    cpus: int = 8
    gpus: int = 2
    netns: bool = False
    accounting: bool = True
    kill_wait: int = 20
    grace: int = 30
    message_timeout: int = 20
    _ports: dict[str, int] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to talk to this cluster."""
        return {"SLURM_CONF": str(self.prefix / "etc" / "slurm.conf")}

    def start(self) -> None:
        """Start everything and wait until all nodes are idle. Raises ClusterError with the logs' ends."""
        if (self.prefix / "pids").exists():
            raise ClusterError(f"{self.prefix}: already running; stop it first")
        shutil.rmtree(self.prefix, ignore_errors=True)
        for name in ("etc", "log", "state", "munge", "run", "dev", *(f"spool/n{i}" for i in self._range)):
            (self.prefix / name).mkdir(parents=True)
        self.prefix.chmod(0o755)
        (self.prefix / "pids").touch()
        os.environ.update(self.environment)
        try:
            self._start_munge()
            if self.netns:
                self._make_namespaces()
            if self.accounting:
                self._start_database()
            self._write_config()
            if self.accounting:
                self._start_accounting()
            self._spawn("slurmctld", ["slurmctld", "-D"])
            for i in self._range:
                self._spawn(f"slurmd-n{i}", self._node_command(i))
            self._wait(self._all_idle, 240, "nodes did not become idle")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Cancel all jobs, then stop exactly the processes that `start` started."""
        if not (self.prefix / "pids").exists():
            return
        if "slurmctld " in (self.prefix / "pids").read_text():
            self._cancel_all()
        started = [line.split() for line in (self.prefix / "pids").read_text().splitlines()][::-1]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for name, pid in started:
                if _is_ours(int(pid), name):
                    os.kill(int(pid), number)
            deadline = time.monotonic() + 3
            while time.monotonic() < deadline and any(_is_ours(int(pid), name) for name, pid in started):
                time.sleep(0.05)
        if self.netns:
            self._remove_namespaces()
        (self.prefix / "pids").unlink()

    def _cancel_all(self) -> None:
        """Slurm ends the jobs' processes; it may have no controller any more that answers."""
        environment = {**os.environ, **self.environment}
        script = (
            'ids=$(squeue -h -o %A); [ -z "$ids" ] || scancel $ids; while [ -n "$(squeue -h)" ]; do sleep 0.2; done'
        )
        process = subprocess.Popen(["bash", "-c", script], env=environment, start_new_session=True, **_SILENT)
        try:
            process.wait(self.kill_wait + 8)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _remove_namespaces(self) -> None:
        for i in self._range:
            subprocess.run(["ip", "netns", "del", f"{NAMESPACE}{i}"], **_SILENT)
        subprocess.run(["ip", "link", "del", BRIDGE], **_SILENT)

    @property
    def _range(self) -> range:
        return range(1, self.nodes + 1)

    @property
    def _host_address(self) -> str:
        return f"{SUBNET}.254" if self.netns else "127.0.0.1"

    def _port(self, name: str) -> int:
        if name not in self._ports:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._ports[name] = probe.getsockname()[1]
        return self._ports[name]

    def _spawn(self, name: str, command: list[str], **environment: str) -> None:
        with open(self.prefix / "log" / f"{name}.out", "w") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self._own(name, process.pid)

    def _own(self, name: str, pid: int) -> None:
        with open(self.prefix / "pids", "a") as file:
            file.write(f"{name} {pid}\n")

    def _wait(self, ready, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                tails = [f"{log.name}: {log.read_text()[-400:]}" for log in sorted((self.prefix / "log").glob("*"))]
                raise ClusterError("\n".join([what, *tails]))
            time.sleep(0.1)

    def _start_munge(self) -> None:
        munge = self.prefix / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in files.items()]
        self._spawn("munged", ["munged", "--foreground", "--force", "--num-threads=4", *options])
        self._wait((munge / "socket").exists, 120, "munged did not start")

    def _make_namespaces(self) -> None:
        lines = [f"{self._host_address} {socket.gethostname()}", "127.0.0.1 localhost"]
        lines += [f"{SUBNET}.{i} n{i}" for i in self._range]
        (self.prefix / "etc" / "hosts").write_text("\n".join(lines) + "\n")
        self._remove_namespaces()  # of a cluster that was killed
        commands = [
            f"ip link add {BRIDGE} type bridge",
            f"ip addr add {self._host_address}/24 dev {BRIDGE}",
            f"ip link set {BRIDGE} up",
        ]
        for i in self._range:
            space = f"{NAMESPACE}{i}"
            commands += [
                f"ip netns add {space}",
                f"ip link add pnv{i} type veth peer name eth0 netns {space}",
                f"ip link set pnv{i} master {BRIDGE} up",
                f"ip -n {space} addr add {SUBNET}.{i}/24 dev eth0",
                f"ip -n {space} link set eth0 up",
                f"ip -n {space} link set lo up",
            ]
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)

    def _node_command(self, i: int) -> list[str]:
        if not self.netns:
            return ["slurmd", "-D", "-N", f"n{i}"]
        # nsenter, not `ip netns exec`: that one mounts a new /sys and hides the cgroups.
        inside = f"hostname n{i} && mount --bind {self.prefix}/etc/hosts /etc/hosts && exec slurmd -D -N n{i}"
        space = f"--net=/run/netns/{NAMESPACE}{i}"
        return ["nsenter", space, "unshare", "--uts", "--mount", "--propagation", "private", "bash", "-c", inside]

    def _start_database(self) -> None:
        data = self.prefix / "mysql"
        data.mkdir(mode=0o700)
        common = ["--no-defaults", f"--datadir={data}", "--user=root", "--skip-name-resolve"]
        subprocess.run(
            ["mariadb-install-db", *common, "--auth-root-authentication-method=socket", "--skip-test-db"],
            check=True,
            capture_output=True,
        )
        small = [
            "--innodb-buffer-pool-size=64M",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-lock-wait-timeout=900",
        ]
        self._spawn("mariadbd", ["mariadbd", *common, "--skip-networking", f"--socket={data}/sock", *small])
        client = ["mariadb", "--no-defaults", "-S", f"{data}/sock", "-u", "root", "-e"]
        self._wait(lambda: _works([*client, "select 1"]), 240, "mariadbd did not start")
        subprocess.run([*client, "create database slurm_acct_db"], check=True, capture_output=True)

    def _start_accounting(self) -> None:
        config = self.prefix / "etc" / "slurmdbd.conf"
        config.write_text(
            f"""AuthType=auth/munge
AuthInfo=socket={self.prefix}/munge/socket
DbdHost=localhost
DbdAddr={self._host_address}
DbdPort={self._port("dbd")}
SlurmUser=root
LogFile={self.prefix}/log/slurmdbd.log
PidFile={self.prefix}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
CommitDelay=1
"""
        )
        config.chmod(0o600)
        # slurmdbd.conf has no option for the socket of a private MariaDB; its client library reads this variable.
        self._spawn("slurmdbd", ["slurmdbd", "-D"], MYSQL_UNIX_PORT=f"{self.prefix}/mysql/sock")
        self._wait(lambda: _works(["sacctmgr", "-n", "list", "cluster"]), 240, "slurmdbd did not start")
        for entity in ("cluster virt", "account test Description=test Organization=test", "user root Account=test"):
            subprocess.run(["sacctmgr", "-i", "-Q", "add", *entity.split()], capture_output=True, timeout=240)

    def _write_config(self) -> None:
        etc = self.prefix / "etc"
        (etc / "slurm.conf").write_text(self._slurm_conf())
        # slurmd looks for a cgroup plugin that nothing uses, and dies without cgroups. v1, when named, is not touched.
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        gres = "AutoDetect=off\n"
        if self.gpus:
            # gres/gpu drops GPUs that are counted without a device file.
            for gpu in range(self.gpus):
                subprocess.run(["mknod", self.prefix / "dev" / f"nvidia{gpu}", "c", "1", "3"], check=True)
            devices = f"{self.prefix}/dev/nvidia[0-{self.gpus - 1}]"
            gres += f"NodeName=n[1-{self.nodes}] Name=gpu File={devices}\n"
        (etc / "gres.conf").write_text(gres)

    def _slurm_conf(self) -> str:
        host = socket.gethostname()
        gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        shape = f"CPUs={self.cpus} RealMemory=16000{gres} State=UNKNOWN"
        nodes = []
        for i in self._range:
            if self.netns:
                nodes.append(f"NodeName=n{i} NodeAddr={SUBNET}.{i} Port={self._port('slurmd')} {shape}")
            else:
                nodes.append(
                    f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={self._port(f'slurmd{i}')} {shape}"
                )
        accounting = "AccountingStorageType=accounting_storage/none\nJobAcctGatherType=jobacct_gather/none"
        if self.accounting:
            accounting = f"""AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={self._host_address}
AccountingStoragePort={self._port("dbd")}
AccountingStoragePass={self.prefix}/munge/socket
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5"""
        return f"""ClusterName=virt
SlurmctldHost={host}({self._host_address})
SlurmctldPort={self._port("ctld")}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={self.prefix}/munge/socket
CredType=cred/munge
StateSaveLocation={self.prefix}/state
SlurmdSpoolDir={self.prefix}/spool/%n
SlurmctldPidFile={self.prefix}/run/slurmctld.pid
SlurmdPidFile={self.prefix}/run/slurmd-%n.pid
SlurmctldLogFile={self.prefix}/log/slurmctld.log
SlurmdLogFile={self.prefix}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
{"GresTypes=gpu" if self.gpus else ""}
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
MinJobAge=600
KillWait={self.kill_wait}
OverTimeLimit=0
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=60
MessageTimeout={self.message_timeout}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
{accounting}
{chr(10).join(nodes)}
PartitionName=batch Nodes=ALL Default=YES State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime={self.grace}
PartitionName=urgent Nodes=ALL State=UP PriorityTier=20 PreemptMode=OFF
"""

    def _all_idle(self) -> bool:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%N"], capture_output=True, text=True
        )
        return len(set(done.stdout.split())) == self.nodes


def _works(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _is_ours(pid: int, name: str) -> bool:
    """Guards against a reused process number, and against waiting for a process that has ended."""
    try:
        command = Path(f"/proc/{pid}/comm").read_text().strip()
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return False
    except OSError:
        return False
    # A node in a namespace starts as nsenter, unshare and bash before it becomes slurmd.
    return name.startswith(command) or (name.startswith("slurmd-") and command in ("nsenter", "unshare", "bash"))


def main() -> int:
    """Command line: a command inside a cluster."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", type=Path)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--netns", action="store_true")
    parser.add_argument("--no-accounting", action="store_true")
    parser.add_argument("command", nargs="+", help="what to run, after --")
    arguments = parser.parse_args()
    prefix = arguments.prefix.resolve()
    cluster = Cluster(prefix, arguments.nodes, netns=arguments.netns, accounting=not arguments.no_accounting)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        install()
        cluster.start()
        return subprocess.run(arguments.command, check=False).returncode
    except (ClusterError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        cluster.stop()


if __name__ == "__main__":
    sys.exit(main())
