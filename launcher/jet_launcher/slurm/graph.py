"""From a run's config to the jobs of its stages: what runs where, after what, and what it costs. No Slurm, no files."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_jet.configs.candidates import candidate_names
from megatron_jet.configs.cluster import ClusterConfig
from megatron_jet.configs.errors import UserError, usage_errors
from megatron_jet.configs.estimate_text import format_bytes, format_count, format_seconds, jobs_text, table
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.run_estimate import RunEstimate, StageEstimate, estimate_run
from megatron_jet.configs.training import ParallelConfig

CHECKPOINT_BYTES_PER_SECOND = 1e9  # a cautious guess: one process writes the optimiser's state of its replicas


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
        checkpoint_seconds: expected between two checkpoints; None without regular ones.
        reused_from: the stage whose equal candidate spares the training.
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
    checkpoint_seconds: float | None = None
    reused_from: str | None = None

    @property
    def processes(self) -> int:
        return self.nodes * self.nproc

    @property
    def data_parallel(self) -> int:
        return self.layout.data_parallel(self.processes)


@dataclass(frozen=True)
class JobGraph:
    """The jobs of a run in an order in which each follows those it depends on.

    Attributes:
        notes: what to look at before submitting, one line each.
    """

    jobs: tuple[Job, ...]
    estimate: RunEstimate
    notes: tuple[str, ...] = ()

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
        return JobGraph(tuple(trimmed), self.estimate, self.notes)


@usage_errors()
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
        names = candidate_names(config, stage)
        if names:
            candidates = [_training_job(config, cluster, estimates[stage], previous, name) for name in names]
            jobs += candidates
            previous = tuple(job.name for job in candidates)
            collector = _single_job(config, cluster, stage, previous)
        elif hasattr(config.stage(stage), "training"):
            collector = _training_job(config, cluster, estimates[stage], previous)
        else:
            collector = _single_job(config, cluster, stage, previous)
        jobs.append(collector)
        previous = (collector.name,)
    return JobGraph(tuple(jobs), estimate, timing_notes(jobs, estimate, cluster))


def _training_job(
    config: RunConfig,
    cluster: ClusterConfig,
    estimate: StageEstimate,
    depends: tuple[str, ...],
    candidate: str | None = None,
) -> Job:
    stage = estimate.stage
    resources = config.stage(stage).resources
    runs = [run for run in estimate.runs if candidate in (None, run.name)]
    hours = sum(run.gpu_hours for run in runs)
    training = config.stage(stage).training
    step_seconds = hours * 3600 / (resources.nodes * config.nproc) * training.global_batch_size * training.seq_length
    step_seconds /= max(1, sum(run.tokens for run in runs))
    return Job(
        name=f"{stage}-{candidate}" if candidate else stage,
        target=f"{stage}:{candidate}" if candidate else stage,
        stage=stage,
        nodes=resources.nodes,
        nproc=config.nproc,
        gpus=cluster.gpus_per_node if cluster.exclusive else min(config.nproc, cluster.gpus_per_node),
        layout=resources.parallel or config.parallel,
        depends=depends,
        tokens=sum(run.tokens for run in runs),
        gpu_hours=hours,
        checkpoint_seconds=step_seconds * training.checkpoint_interval or None,
        reused_from=runs[0].reused_from if len(runs) == 1 else None,
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


def timing_notes(jobs: Sequence[Job], estimate: RunEstimate, cluster: ClusterConfig) -> tuple[str, ...]:
    """What the forecast says about the cluster file's times, where it says that something is amiss."""
    notes = []
    late = [job for job in jobs if (job.checkpoint_seconds or 0) > cluster.time_limit_seconds]
    for stage in dict.fromkeys(job.stage for job in late):
        between = format_seconds(max(job.checkpoint_seconds for job in late if job.stage == stage))
        notes.append(
            f"{stage}: about {between} between checkpoints, longer than time_limit={cluster.time_limit}; lower "
            f"{stage}.training.checkpoint_interval"
        )
    sizes = {stage.stage: max((run.checkpoint_bytes for run in stage.runs), default=0) for stage in estimate.stages}
    stage = max(dict.fromkeys(job.stage for job in jobs), key=lambda name: sizes.get(name, 0), default=None)
    writing = sizes.get(stage, 0) / CHECKPOINT_BYTES_PER_SECOND
    if 2 * writing > cluster.early_warning_seconds:
        notes.append(
            f"{stage}: a checkpoint has {format_bytes(sizes[stage])}; at 1 GB/s, early_warning_seconds="
            f"{cluster.early_warning_seconds} is less than twice the time to write it ({format_seconds(writing)})"
        )
    return tuple(notes)


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
            f"reused from {job.reused_from}" if job.reused_from else _hours(job.gpu_hours) if job.gpu_hours else "-",
            "-" if not job.gpu_hours else format_seconds(job.gpu_hours * 3600 / job.processes),
            "-" if job.checkpoint_seconds is None else format_seconds(job.checkpoint_seconds),
            ", ".join(job.depends) if len(job.depends) < 3 else f"{len(job.depends)} candidates",
        )
        for job in graph.jobs
    ]
    header = ("job", "nodes", "processes/node", "layout", "tokens", "GPU-hours", "time", "checkpoints", "after")
    notes = "".join(f"\nnote: {note}" for note in graph.notes)
    return table(header, rows) + "\n\n" + stages_text(graph) + notes


def stages_text(graph: JobGraph) -> str:
    """Tokens, GPU-hours, memory and disk per training stage, next to the paper's hours."""
    rows, totals = [], [0.0, 0.0]
    for stage in graph.stages:
        estimate = next((e for e in graph.estimate.stages if e.stage == stage), None)
        if estimate is None or not estimate.runs:
            continue
        jobs = [job for job in graph.of_stage(stage) if job.gpu_hours is not None]
        hours = sum(job.gpu_hours for job in jobs)
        paper = estimate.paper_gpu_hours
        totals = [totals[0] + hours, totals[1] + (paper or 0.0)]
        trained = [job for job in jobs if job.reused_from is None]
        rows.append(
            (
                stage,
                jobs_text(len(trained), len(jobs)),
                str(jobs[0].nodes),
                layout_text(jobs[0]),
                format_count(sum(job.tokens for job in jobs)),
                _hours(hours) if hours else "-",
                "-" if paper is None else f"{paper:,.0f}",
                format_bytes(estimate.memory.total),
                format_bytes(estimate.disk_bytes),
            )
        )
    if not rows:
        return "no stage of these trains anything"
    disk = sum(stage.disk_bytes for stage in graph.estimate.stages if stage.stage in graph.stages)
    paper_total = f"{totals[1]:,.0f}" if totals[1] else "-"
    rows.append(("total", "", "", "", "", _hours(totals[0]), paper_total, "", format_bytes(disk)))
    peak, share = graph.estimate.peak_tflops, graph.estimate.utilisation
    basis = (
        f"expected GPU-hours: FLOPs at {share:.0%} of {peak:.0f} TFLOP/s per GPU; paper: H100-hours of the same stage\n"
        "disk: checkpoints of all jobs at once; those of candidates are deleted once they are ranked"
    )
    header = ("stage", "jobs", "nodes", "layout", "tokens", "GPU-hours", "paper", "memory/GPU", "disk")
    return table(header, rows) + f"\n{basis}"


def layout_text(job: Job) -> str:
    """`TP2 PP1 DP16`."""
    layout = job.layout
    parts = [f"TP{layout.tensor}", f"PP{layout.pipeline}", f"DP{job.data_parallel}"]
    if layout.sequence_parallel:
        parts.insert(1, "SP")
    return " ".join(parts)


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2f}" if hours >= 0.005 else "<0.01"
