"""Train an architecture that is known: stage 1, stage 2, export and evaluation, without the search.

Each is the search's recipe with `student_plan` set. The plans are those that were found: published
(known_models.py) for the Jet-Nemotron models, docs/results/tiny for the tiny one.
"""

from megatron_jet.configs.layer_plan import LayerPlan, hybrid_plan
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.recipes.jet_nemotron import jet_nemotron_2b, jet_nemotron_4b
from megatron_jet.configs.recipes.known_models import jet_nemotron_2b_model, jet_nemotron_4b_model
from megatron_jet.configs.recipes.tiny import tiny
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.stages import SEARCH_STAGES


def tiny_distill() -> RunConfig:
    """Recipe `tiny_distill`: the placement that the quickstart found, with JetBlock, in about three minutes."""
    config = from_teacher(tiny())
    plan = hybrid_plan(8, "jet", full=(2, 4), windows={0: 32})
    # The search's winner has had its training when stage 1 begins; here the linear layers start from nothing.
    training = config.stage1.training.replace(steps=160)
    return known(config.replace(stage1=config.stage1.replace(training=training)), plan, recipe="tiny_distill")


def jet_nemotron_2b_distill() -> RunConfig:
    """Recipe `jet_nemotron_2b_distill`: Qwen2.5-1.5B to Jet-Nemotron-2B as published."""
    return _published(jet_nemotron_2b(), jet_nemotron_2b_model(), recipe="jet_nemotron_2b_distill")


def jet_nemotron_4b_distill() -> RunConfig:
    """Recipe `jet_nemotron_4b_distill`: Qwen2.5-3B to Jet-Nemotron-4B as published."""
    return _published(jet_nemotron_4b(), jet_nemotron_4b_model(), recipe="jet_nemotron_4b_distill")


def _published(config: RunConfig, model: ModelConfig, *, recipe: str) -> RunConfig:
    """With the sizes of the published block, too, which the search would have ended with."""
    sized = from_teacher(config.replace(mixers={**config.mixers, **model.mixers}))
    return known(sized, model.layer_plan, recipe=recipe)


def known(config: RunConfig, plan: LayerPlan, *, recipe: str) -> RunConfig:
    """The part of a recipe that follows the search, for a student with this layer plan.

    Raises:
        UserError: a bad plan entry, one whose mixer the recipe has no sizes for, or a stage 1 that continues a search
            (`from_teacher` changes that).
    """
    stages = tuple(stage for stage in config.stages if stage not in SEARCH_STAGES)
    return config.replace(recipe=recipe, stages=stages, student_plan=plan)


def from_teacher(config: RunConfig) -> RunConfig:
    """With a stage 1 that begins with the teacher's weights instead of the search's winner, and at the learning rate
    of the search: its linear layers have had no training yet."""
    optimizer = config.stage1.training.optimizer.replace(lr=config.hardware_search.training.optimizer.lr)
    training = config.stage1.training.replace(optimizer=optimizer)
    return config.replace(stage1=config.stage1.replace(init="teacher", training=training))
