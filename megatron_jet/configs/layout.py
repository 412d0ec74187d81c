"""Whether every stage of a run can be laid out and trained as its config says: asked before anything is submitted."""

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.parameter_names import check_trainable, parameter_names
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.run_estimate import planned_student, trained_models
from megatron_jet.configs.training import ParallelConfig, TrainingConfig


def check_layout(config: RunConfig, teacher: ModelConfig) -> None:
    """Check every training of the config's stages: models (candidates too), batches, lengths, patterns and weights.

    Raises:
        UserError: one of them does not fit; names the stage.
    """
    trained = trained_models(config, teacher)
    for stage in config.stages:
        settings = config.stage(stage)
        if getattr(settings, "training", None) is None:
            continue
        models = trained.get(stage) or [planned_student(config, teacher)]  # a stage of the user's own: the student
        parallel = settings.resources.parallel or config.parallel
        processes = settings.resources.nodes * config.nproc
        try:
            for model in (teacher, *models):
                model.check_parallel(parallel.tensor, parallel.pipeline, parallel.virtual_pipeline or 1)
            data_parallel = parallel.data_parallel(processes)
        except UserError as error:
            raise UserError(f"{stage}: {error} (nproc={config.nproc}, nodes={settings.resources.nodes})") from None
        for key in ("training", "compare_training"):
            training = getattr(settings, key, None)
            if training is None:
                continue
            if parallel.sequence_parallel and training.seq_length % parallel.tensor:
                raise UserError(
                    f"{stage}: sequence_parallel shares {key}.seq_length={training.seq_length} out over "
                    f"parallel.tensor={parallel.tensor} ranks, which does not divide it"
                )
            try:
                _check_training(training, parallel, data_parallel, teacher)
            except UserError as error:
                where = f"{stage}.{key}.{error}"
                raise UserError(f"{where} (nproc={config.nproc}, nodes={settings.resources.nodes})") from None
            choice = config.placement.linear if (stage, key) == ("placement", "training") else None
            names = [parameter_names(model, choice) for model in models]
            check_trainable(f"{stage}.{key}.trainable", training.trainable, names)
        most = max(config.placement.full_layers) if stage == "placement" else 0
        if most > teacher.num_layers:
            raise UserError(f"placement.full_layers: {most} asked for, but the teacher has {teacher.num_layers} layers")


def _check_training(training: TrainingConfig, parallel: ParallelConfig, replicas: int, teacher: ModelConfig) -> None:
    """Lengths, batches and weights of one training; messages begin with the key."""
    if training.seq_length > teacher.max_position_embeddings:
        raise UserError(
            f"seq_length={training.seq_length}: the teacher has {teacher.max_position_embeddings} positions, beyond "
            "which it teaches nothing"
        )
    training.check_pipeline(parallel, replicas)
    weights = training.loss.layer_weights
    if weights is not None and len(weights) != teacher.num_layers:
        raise UserError(f"loss.layer_weights has {len(weights)} values, the model has {teacher.num_layers} layers")
