"""What a whole run costs: tokens, FLOPs, GPU-hours, memory and disk of every stage, next to the paper's hours."""

from megatron_jet.configs.base import StrictModel
from megatron_jet.configs.cost import model_cost
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.estimate import (
    WEIGHT_BYTES,
    MemoryEstimate,
    trainable_params,
    training_flops_per_token,
    training_memory,
)
from megatron_jet.configs.layer_plan import LayerPlan, hybrid_plan, linear_kinds, linear_layers, uniform_placement
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.stages import GridPoint, StageResources
from megatron_jet.configs.training import TrainingConfig

H100_PEAK_TFLOPS = 989.0  # bf16, dense
DEFAULT_UTILISATION = 0.35
KEPT_CHECKPOINTS = 3  # the last two and the best


class StageEstimate(StrictModel):
    """One stage. Training runs of a stage are called jobs."""

    stage: str
    jobs: int
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
    is the one that the hardware search resizes; before the search, that is the first candidate of new_block that is
    not the plain baseline.

    Raises:
        UserError: the budgets leave no linear layer, of which every later stage has something to train.
    """
    if config.student_plan is not None and mixer is None:
        return known_student(config, config.student_plan, teacher)
    candidates = [name for name in config.new_block.candidates if not name.endswith("_static")]
    mixer = mixer or config.hardware_search.mixer or candidates[-1]
    budget = config.placement.budget
    full = uniform_placement(teacher.num_layers, budget, config.placement.uniform_phase)
    free = [i for i in range(teacher.num_layers) if i not in full]
    if config.placement.swa_budget >= len(free):
        raise UserError(
            f"placement.budget={budget} and placement.swa_budget={config.placement.swa_budget} "
            f"do not fit {teacher.num_layers} layers: at least one must stay linear"
        )
    windows = dict.fromkeys(free[: config.placement.swa_budget], config.placement.swa_window)
    return teacher.with_plan(hybrid_plan(teacher.num_layers, mixer, full, windows), dict(config.mixers))


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
    stages = [
        _stage(config, name, jobs, teacher, student, rate) for name, jobs in _jobs(config, teacher, student).items()
    ]
    export = model_cost(student, 1).total_params * WEIGHT_BYTES[config.export.dtype]
    stages.append(_files_only("export", export))
    return RunEstimate(
        teacher=teacher, student=student, peak_tflops=peak_tflops, utilisation=utilisation, stages=stages
    )


def _jobs(
    config: RunConfig, teacher: ModelConfig, student: ModelConfig
) -> dict[str, list[tuple[ModelConfig, TrainingConfig]]]:
    """The training runs of each stage: which model, how long."""
    training = {"stage1": [(student, config.stage1.training)], "stage2": [(student, config.stage2.training)]}
    if config.student_plan is not None:
        return training

    def sized(name: str) -> ModelConfig:
        return planned_student(config, teacher, name.removesuffix("_static"))

    supernet = sized(config.placement.linear)
    compared = config.placement.compare_training
    search = config.hardware_search
    resized = [_with_grid_point(student, point) for point in search.grid]
    return {
        "placement": [(supernet, config.placement.training)] + ([(supernet, compared)] * 2 if compared else []),
        "block_selection": [
            (sized(name), config.block_selection.training) for name in config.block_selection.candidates
        ],
        "new_block": [(sized(name), config.new_block.training) for name in config.new_block.candidates],
        "hardware_search": [(model, search.training) for model in resized],
        **training,
    }


def _with_grid_point(student: ModelConfig, point: GridPoint) -> ModelConfig:
    linear = linear_layers(student.layer_plan)
    if not linear:
        return student
    kind = student.layer_plan[linear[0]]
    sizes = {"num_heads": point.heads, "head_dim": point.d_k, "expand_v": point.d_v / point.d_k}
    return student.with_plan(student.layer_plan, {kind: student.mixers[kind].replace(**sizes)})


def _stage(
    config: RunConfig,
    name: str,
    jobs: list[tuple[ModelConfig, TrainingConfig]],
    teacher: ModelConfig,
    student: ModelConfig,
    rate: float,
) -> StageEstimate:
    resources: StageResources = config.stage(name).resources
    parallel = resources.parallel or config.parallel
    gpus = resources.nodes * config.nproc
    flops = sum(training.tokens * training_flops_per_token(model, teacher, training) for model, training in jobs)
    # The supernet holds the teacher's attention and the linear path of every layer.
    extra = model_cost(teacher, 1).mixer_params if name == "placement" else 0
    memories = [training_memory(model, teacher, training, parallel, config.dtype, gpus) for model, training in jobs]
    memory = max(memories, key=lambda m: m.total)
    disk = max(_checkpoint_bytes(model, training, config.dtype, extra) for model, training in jobs)
    return StageEstimate(
        stage=name,
        jobs=len(jobs),
        tokens=sum(training.tokens for _, training in jobs),
        flops=flops,
        gpus=gpus,
        gpu_hours=flops / rate / 3600,
        paper_gpu_hours=resources.paper_gpu_hours,
        memory=memory.replace(weights=memory.weights + extra * WEIGHT_BYTES[config.dtype]),
        disk_bytes=disk,
    )


def _checkpoint_bytes(model: ModelConfig, training: TrainingConfig, dtype: str, extra_params: int) -> int:
    """Training checkpoints on disk: model weights in the training type, optimiser state of what trains in fp32."""
    weights = (model_cost(model, 1).total_params + extra_params) * WEIGHT_BYTES[dtype]
    optimizer = trainable_params(model, training.trainable) * 12
    return KEPT_CHECKPOINTS * (weights + optimizer)


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
