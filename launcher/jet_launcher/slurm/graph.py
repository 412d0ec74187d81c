"""From a run's config to the jobs of its stages: what runs where, after what, and what it costs. No Slurm, no files."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_jet.configs.candidates import candidate_names
from megatron_jet.configs.cluster import ClusterConfig
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.estimate_text import format_count, format_seconds, table
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.run_estimate import RunEstimate, StageEstimate, estimate_run
from megatron_jet.configs.training import ParallelConfig


@dataclass(frozen=True)
class Job:
    """One Slurm job.

    Attributes:
        name: unique in the run; part of file names.
        target: argument of `megatron_jet.run_stage`: STAGE or STAGE:CANDIDATE.
        stage: the stage it belongs to.
        nodes: nodes of the allocation.
        nproc: processes per node.
        gpus: GPUs per node to ask for.
        layout: of the model over the processes.
        depends: names of the jobs that must have succeeded.
        tokens: training tokens.
        gpu_hours: expected; None for jobs that do not train.
    """

    name: str
    target: str
    stage: str
    nodes: int
    nproc: int
    gpus: int
    layout: ParallelConfig
    depends: tuple[str, ...]
    tokens: int = 0
    gpu_hours: float | None = None

    @property
    def processes(self) -> int:
        return self.nodes * self.nproc

    @property
    def data_parallel(self) -> int:
        return self.layout.data_parallel(self.processes)


@dataclass(frozen=True)
class JobGraph:
    """The jobs of a run in an order in which each follows those it depends on."""

    jobs: tuple[Job, ...]
    estimate: RunEstimate

    def of_stage(self, stage: str) -> list[Job]:
        return [job for job in self.jobs if job.stage == stage]

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys(job.stage for job in self.jobs))

    def without(self, finished: Collection[str]) -> "JobGraph":
        """The jobs that are not among `finished`, with dependencies on finished ones dropped."""
        kept = [job for job in self.jobs if job.name not in finished]
        names = {job.name for job in kept}
        trimmed = [_replace(job, depends=tuple(d for d in job.depends if d in names)) for job in kept]
        return JobGraph(tuple(trimmed), self.estimate)


def build_graph(config: RunConfig, teacher: ModelConfig, stages: Sequence[str], cluster: ClusterConfig) -> JobGraph:
    """One job per stage; the candidates of a selection stage run side by side, followed by a job that ranks them.

    Raises:
        UserError: a stage asks for more nodes, or the config for more processes per node, than the cluster offers.
    """
    _check_fit(config, stages, cluster)
    estimate = estimate_run(config, teacher)
    estimates = {stage.stage: stage for stage in estimate.stages}
    jobs: list[Job] = []
    previous: tuple[str, ...] = ()
    for stage in stages:
        trained = estimates.get(stage)
        names = candidate_names(config, stage)
        candidates = tuple(_training_job(config, cluster, stage, trained, previous, name, len(names)) for name in names)
        if candidates:
            jobs += candidates
            previous = tuple(job.name for job in candidates)
            collector = _single_job(config, cluster, stage, previous)
        elif hasattr(config.stage(stage), "training"):
            collector = _training_job(config, cluster, stage, trained, previous)
        else:
            collector = _single_job(config, cluster, stage, previous)
        jobs.append(collector)
        previous = (collector.name,)
    return JobGraph(tuple(jobs), estimate)


def _training_job(
    config: RunConfig,
    cluster: ClusterConfig,
    stage: str,
    estimate: StageEstimate | None,
    depends: tuple[str, ...],
    candidate: str | None = None,
    share: int = 1,
) -> Job:
    resources = config.stage(stage).resources
    return Job(
        name=f"{stage}-{candidate}" if candidate else stage,
        target=f"{stage}:{candidate}" if candidate else stage,
        stage=stage,
        nodes=resources.nodes,
        nproc=config.nproc,
        gpus=cluster.gpus_per_node if cluster.exclusive else min(config.nproc, cluster.gpus_per_node),
        layout=resources.parallel or config.parallel,
        depends=depends,
        tokens=estimate.tokens // share if estimate else 0,
        gpu_hours=estimate.gpu_hours / share if estimate else None,
    )


def _single_job(config: RunConfig, cluster: ClusterConfig, stage: str, depends: tuple[str, ...]) -> Job:
    """A job that trains nothing: one process on one node."""
    gpus = cluster.gpus_per_node if cluster.exclusive else min(1, cluster.gpus_per_node)
    return Job(stage, stage, stage, 1, 1, gpus, ParallelConfig(), depends)


def _check_fit(config: RunConfig, stages: Sequence[str], cluster: ClusterConfig) -> None:
    nodes = {stage: getattr(config.stage(stage), "resources", None) for stage in stages}
    large = [f"{stage}.resources.nodes={r.nodes}" for stage, r in nodes.items() if r and r.nodes > cluster.nodes]
    if large:
        raise UserError(f"{', '.join(large)}: the cluster file gives a job {cluster.nodes} nodes at most (nodes)")
    if cluster.gpus_per_node and config.nproc > cluster.gpus_per_node:
        raise UserError(f"nproc={config.nproc}: nodes of this cluster have gpus_per_node={cluster.gpus_per_node}")


def _replace(job: Job, **changes) -> Job:
    return Job(**{**job.__dict__, **changes})


def graph_text(graph: JobGraph) -> str:
    """The graph as a table: one row per job, then one per stage with the paper's hours."""
    rows = [
        (
            job.name,
            str(job.nodes),
            str(job.nproc),
            layout_text(job),
            format_count(job.tokens) if job.tokens else "-",
            "-" if job.gpu_hours is None else _hours(job.gpu_hours),
            "-" if not job.gpu_hours else format_seconds(job.gpu_hours * 3600 / job.processes),
            ", ".join(job.depends) if len(job.depends) < 3 else f"{len(job.depends)} candidates",
        )
        for job in graph.jobs
    ]
    header = ("job", "nodes", "processes/node", "layout", "tokens", "GPU-hours", "time", "after")
    return table(header, rows) + "\n\n" + stages_text(graph)


def stages_text(graph: JobGraph) -> str:
    """Tokens and GPU-hours per training stage, next to the paper's."""
    rows, totals = [], [0.0, 0.0]
    for stage in graph.stages:
        jobs = graph.of_stage(stage)
        estimate = next((e for e in graph.estimate.stages if e.stage == stage), None)
        if estimate is None or not estimate.jobs:
            continue
        hours = sum(job.gpu_hours or 0.0 for job in jobs)
        paper = estimate.paper_gpu_hours
        totals = [totals[0] + hours, totals[1] + (paper or 0.0)]
        trained = [job for job in jobs if job.tokens]
        shape = f"{len(trained)} x {trained[0].nodes} nodes" if len(trained) > 1 else f"{trained[0].nodes} nodes"
        rows.append(
            (
                stage,
                shape,
                layout_text(trained[0]),
                format_count(sum(job.tokens for job in jobs)),
                _hours(hours),
                "-" if paper is None else f"{paper:,.0f}",
            )
        )
    if not rows:
        return "no stage of these trains anything"
    rows.append(("total", "", "", "", _hours(totals[0]), f"{totals[1]:,.0f}" if totals[1] else "-"))
    peak, share = graph.estimate.peak_tflops, graph.estimate.utilisation
    basis = (
        f"expected GPU-hours: FLOPs at {share:.0%} of {peak:.0f} TFLOP/s per GPU; paper: H100-hours of the same stage"
    )
    return table(("stage", "jobs", "layout", "tokens", "GPU-hours", "paper"), rows) + f"\n{basis}"


def layout_text(job: Job) -> str:
    """`TP2 PP1 DP16`."""
    layout = job.layout
    parts = [f"TP{layout.tensor}", f"PP{layout.pipeline}", f"DP{job.data_parallel}"]
    if layout.sequence_parallel:
        parts.insert(1, "SP")
    return " ".join(parts)


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2f}" if hours >= 0.005 else "<0.01"
