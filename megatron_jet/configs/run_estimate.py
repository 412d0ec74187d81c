"""What a whole run costs: tokens, FLOPs, GPU-hours, memory and disk of every stage, next to the paper's hours."""

from dataclasses import dataclass

from megatron_jet.configs.base import StrictModel
from megatron_jet.configs.candidates import (
    Candidate,
    candidate_names,
    candidate_recipe,
    named_candidate,
    resized_candidate,
    taken_over,
)
from megatron_jet.configs.cost import model_cost
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.estimate import (
    WEIGHT_BYTES,
    MemoryEstimate,
    trainable_params,
    training_flops_per_token,
    training_memory,
)
from megatron_jet.configs.files import canonical_json
from megatron_jet.configs.layer_plan import LayerPlan, hybrid_plan, linear_kinds, uniform_placement
from megatron_jet.configs.mixers.base import MixerConfig
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.placements import compared_placements
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.stages import SELECTION_STAGES, StageResources
from megatron_jet.configs.training import TrainingConfig

H100_PEAK_TFLOPS = 989.0  # bf16, dense
DEFAULT_UTILISATION = 0.35
KEPT_CHECKPOINTS = 3  # the last two and the best


class JobEstimate(StrictModel):
    """One training run of a stage. One that takes over an equal candidate's result costs nothing."""

    name: str
    tokens: int
    flops: float
    gpu_hours: float
    checkpoint_bytes: int
    reused_from: str | None = None


class StageEstimate(StrictModel):
    """One stage. `jobs` counts the training runs that are really made; `disk_bytes` is what they leave if all run at
    the same time."""

    stage: str
    jobs: int
    runs: list[JobEstimate] = []
    tokens: int
    flops: float
    gpus: int
    gpu_hours: float
    paper_gpu_hours: float | None
    memory: MemoryEstimate | None
    disk_bytes: int


class RunEstimate(StrictModel):
    """All stages of a run, the teacher, and the student that the search is expected to end with."""

    teacher: ModelConfig
    student: ModelConfig
    peak_tflops: float
    utilisation: float
    stages: list[StageEstimate]

    @property
    def disk_bytes(self) -> int:
        """Most bytes on disk: checkpoints of all stages as if none were cleaned, and the export."""
        return sum(stage.disk_bytes for stage in self.stages)


def planned_student(config: RunConfig, teacher: ModelConfig, mixer: str | None = None) -> ModelConfig:
    """The hybrid that a run is heading for: `student_plan`, or budgets as in the config and a uniform placement.

    Nothing is searched yet then; costs depend on how many layers are full or windowed, not on which. The linear mixer
    is `mixer`, or the one that the hardware search resizes; where the search is to find that, the last candidate of
    new_block that can win.

    Raises:
        UserError: the budgets leave no linear layer, of which every later stage has something to train.
    """
    if config.student_plan is not None and mixer is None:
        return known_student(config, config.student_plan, teacher)
    sized = _planned_size(config) if mixer is None else config.mixers[mixer]
    mixer = mixer or _planned_mixer(config)
    budget = config.placement.budget
    full = uniform_placement(teacher.num_layers, budget, config.placement.uniform_phase)
    free = [i for i in range(teacher.num_layers) if i not in full]
    if config.placement.swa_budget >= len(free):
        raise UserError(
            f"placement.budget={budget} and placement.swa_budget={config.placement.swa_budget} "
            f"do not fit {teacher.num_layers} layers: at least one must stay linear"
        )
    windows = dict.fromkeys(free[: config.placement.swa_budget], config.placement.swa_window)
    plan = hybrid_plan(teacher.num_layers, mixer, full, windows)
    return teacher.with_plan(plan, {**config.mixers, mixer: sized})


def _planned_mixer(config: RunConfig) -> str:
    candidates = [named_candidate(config, name) for name in config.new_block.candidates]
    eligible = [candidate.name for candidate in candidates if not candidate.ablation]
    if not eligible:
        raise UserError("new_block.candidates: all are ablations, which cannot win; add a mixer")
    return config.hardware_search.mixer or eligible[-1]


def _planned_size(config: RunConfig) -> MixerConfig:
    """The linear mixer with the sizes that the hardware search is expected to give it, where the run has one."""
    mixer, search = config.mixers[_planned_mixer(config)], config.hardware_search
    if search.expected is None or "hardware_search" not in config.stages:
        return mixer
    return resized_candidate(mixer, next(point for point in search.grid if point.name == search.expected)).mixer


def known_student(config: RunConfig, plan: LayerPlan, teacher: ModelConfig) -> ModelConfig:
    """The student with this plan and the mixers of the config. Raises UserError when it does not fit the teacher."""
    return teacher.with_plan(plan, {kind: config.mixers[kind] for kind in linear_kinds(plan)})


def estimate_run(
    config: RunConfig,
    teacher: ModelConfig,
    peak_tflops: float = H100_PEAK_TFLOPS,
    utilisation: float = DEFAULT_UTILISATION,
) -> RunEstimate:
    """Cost of every training stage of `config`.

    Args:
        peak_tflops: peak of one device in the training type.
        utilisation: share of the peak that training reaches.

    Raises:
        UserError: the layout fits neither teacher nor student, or the placement budgets do not fit the model.
    """
    student = planned_student(config, teacher)
    rate = peak_tflops * 1e12 * utilisation
    weights = WEIGHT_BYTES[config.dtype] * model_cost(teacher, 1).total_params
    stages = [_files_only("prepare", weights)]
    stages += [_stage(config, name, runs, teacher, rate) for name, runs in _runs(config, teacher, student).items()]
    export = model_cost(student, 1).total_params * WEIGHT_BYTES[config.export.dtype]
    stages.append(_files_only("export", export))
    return RunEstimate(
        teacher=teacher, student=student, peak_tflops=peak_tflops, utilisation=utilisation, stages=stages
    )


@dataclass(frozen=True)
class _Run:
    """A training run: which model, how long, and the stage whose result it takes over instead."""

    name: str
    model: ModelConfig
    training: TrainingConfig
    reused_from: str | None = None


def _runs(config: RunConfig, teacher: ModelConfig, student: ModelConfig) -> dict[str, list[_Run]]:
    """The training runs of each stage."""
    training = {name: [_Run("student", student, config.stage(name).training)] for name in ("stage1", "stage2")}
    if config.student_plan is not None:
        return training
    placement = config.placement
    supernet = planned_student(config, teacher, placement.linear)
    found = [_Run("supernet", supernet, placement.training)]
    names = compared_placements(placement, teacher.num_layers)
    found += [_Run(f"compare_{name.replace(' ', '_')}", supernet, placement.compare_training) for name in names]
    return {"placement": found, **_selection_runs(config, student), **training}


def _selection_runs(config: RunConfig, student: ModelConfig) -> dict[str, list[_Run]]:
    """Candidates of the selection stages. One whose recipe an earlier stage has trained takes over its result."""
    stages: dict[str, list[_Run]] = {}
    trained: dict[str, str] = {}  # recipe -> stage
    for stage in SELECTION_STAGES:
        stages[stage], here = [], {}
        for candidate in _candidates(config, stage):
            recipe = canonical_json(candidate_recipe(config, stage, candidate))
            model = _with_mixer(student, candidate.mixer)
            reused = trained.get(recipe) if taken_over(config, stage) else None
            stages[stage].append(_Run(candidate.name, model, config.stage(stage).training, reused))
            here[recipe] = stage
        if stage in config.stages:
            trained = here | trained
    return stages


def _candidates(config: RunConfig, stage: str) -> list[Candidate]:
    if stage != "hardware_search":
        return [named_candidate(config, name) for name in candidate_names(config, stage)]
    mixer = config.mixers[_planned_mixer(config)]
    return [resized_candidate(mixer, point) for point in config.hardware_search.grid]


def _with_mixer(student: ModelConfig, mixer: MixerConfig) -> ModelConfig:
    """The planned student with another mixer in its linear layers."""
    kinds = linear_kinds(student.layer_plan)
    plan = tuple(mixer.kind if entry in kinds else entry for entry in student.layer_plan)
    return student.with_plan(plan, {mixer.kind: mixer})


def _stage(config: RunConfig, name: str, runs: list[_Run], teacher: ModelConfig, rate: float) -> StageEstimate:
    resources: StageResources = config.stage(name).resources
    parallel = resources.parallel or config.parallel
    gpus = resources.nodes * config.nproc
    # The supernet holds the teacher's attention and the linear path of every layer.
    extra = model_cost(teacher, 1).mixer_params if name == "placement" else 0
    jobs = [_job(run, teacher, rate, config.dtype, extra) for run in runs]
    memories = [training_memory(run.model, teacher, run.training, parallel, config.dtype, gpus) for run in runs]
    memory = max(memories, key=lambda m: m.total)
    return StageEstimate(
        stage=name,
        jobs=sum(job.reused_from is None for job in jobs),
        runs=jobs,
        tokens=sum(job.tokens for job in jobs),
        flops=sum(job.flops for job in jobs),
        gpus=gpus,
        gpu_hours=sum(job.gpu_hours for job in jobs),
        paper_gpu_hours=resources.paper_gpu_hours,
        memory=memory.replace(weights=memory.weights + extra * WEIGHT_BYTES[config.dtype]),
        disk_bytes=sum(KEPT_CHECKPOINTS * job.checkpoint_bytes for job in jobs),
    )


def _job(run: _Run, teacher: ModelConfig, rate: float, dtype: str, extra_params: int) -> JobEstimate:
    if run.reused_from is not None:
        return JobEstimate(
            name=run.name, tokens=0, flops=0.0, gpu_hours=0.0, checkpoint_bytes=0, reused_from=run.reused_from
        )
    flops = run.training.tokens * training_flops_per_token(run.model, teacher, run.training)
    return JobEstimate(
        name=run.name,
        tokens=run.training.tokens,
        flops=flops,
        gpu_hours=flops / rate / 3600,
        checkpoint_bytes=_checkpoint_bytes(run.model, run.training, dtype, extra_params),
    )


def _checkpoint_bytes(model: ModelConfig, training: TrainingConfig, dtype: str, extra_params: int) -> int:
    """A checkpoint on disk: model weights in the training type, optimiser state of what trains in fp32."""
    weights = (model_cost(model, 1).total_params + extra_params) * WEIGHT_BYTES[dtype]
    return weights + trainable_params(model, training.trainable) * 12


def _files_only(stage: str, disk_bytes: int) -> StageEstimate:
    return StageEstimate(
        stage=stage,
        jobs=0,
        tokens=0,
        flops=0.0,
        gpus=1,
        gpu_hours=0.0,
        paper_gpu_hours=None,
        memory=None,
        disk_bytes=disk_bytes,
    )
