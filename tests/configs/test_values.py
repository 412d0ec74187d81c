"""No number without bounds gets into a config: the whole tree of models is walked, so that new fields are asked too."""

import math
import types
import typing
from typing import Annotated, Any, TypeAliasType, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from megatron_jet.configs.base import LARGEST, StrictModel
from megatron_jet.configs.cluster import ClusterConfig
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.mixers.registry import MIXER_CONFIGS
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.overrides import apply_overrides
from megatron_jet.configs.recipes.tiny import tiny
from megatron_jet.configs.run import RunConfig

ROOTS = (RunConfig, ClusterConfig, ModelConfig, *MIXER_CONFIGS.values())
# Some published configs write -1 for a token that they do not have.
MAY_BE_NEGATIVE = {("ModelConfig", name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
MAY_BE_EMPTY = {
    ("ContainerConfig", "mounts"),
    *(("ClusterConfig", name) for name in ("modules", "setup", "env", "sbatch")),
    ("RunConfig", "mixers"),  # whoever names a mixer finds out
    ("ModelConfig", "mixers"),
    ("ModelConfig", "layer_plan"),  # compared with the number of layers
    ("ModelConfig", "eos_token_id"),
}


def models(roots: tuple[type[BaseModel], ...] = ROOTS) -> list[type[StrictModel]]:
    """Every config class that can be reached from these."""
    found: dict[type, None] = {}

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, StrictModel) and annotation not in found:
            found[annotation] = None
            for field in annotation.model_fields.values():
                visit(field.annotation)
        for part in get_args(annotation):
            visit(part)

    for root in roots:
        visit(root)
    return list(found)


def placed(annotation: Any, wanted: type, value: Any) -> list[Any]:
    """Raw values of a type in which `value` stands wherever `wanted` does."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if isinstance(origin, TypeAliasType):
        return placed(origin.__value__[parts], wanted, value)
    if origin is Annotated:
        return placed(parts[0], wanted, value)
    if annotation is wanted:
        return [value]
    if origin in (Union, types.UnionType):
        return [item for part in parts for item in placed(part, wanted, value)]
    if origin in (tuple, list):
        return [[item] for item in placed(parts[0], wanted, value)]
    if origin is dict:
        keys = [{key: 1.0} for key in placed(parts[0], wanted, value)]
        return keys + [{_key(parts[0]): item} for item in placed(parts[1], wanted, value)]
    return []


def _key(annotation: Any) -> Any:
    return 1 if placed(annotation, int, 1) else "a"


def refuses(model: type[StrictModel], name: str, value: Any) -> bool:
    """Whether this value of this field is among the errors of a config that has nothing else."""
    field = model.model_fields[name]
    try:
        model.model_validate({field.alias or name: value})
    except ValidationError as error:
        return any(item["loc"] and item["loc"][0] in (name, field.alias) for item in error.errors())
    except UserError as error:
        return name in str(error)
    return False


def fields() -> list[tuple[type[StrictModel], str, Any]]:
    return [(model, name, field.annotation) for model in models() for name, field in model.model_fields.items()]


def test_the_walk_reaches_the_tree():
    reached = {(model.__name__, name) for model, name, _ in fields()}
    assert {("OptimizerConfig", "lr"), ("ThroughputConfig", "contexts"), ("PreflightConfig", "max_requeues")} <= reached
    assert {
        ("GridPoint", "d_k"),
        ("RopeScaling", "factor"),
        ("GLAConfig", "expand_v"),
        ("DataConfig", "blend"),
    } <= reached
    assert placed(typing.get_type_hints(PlacementLike)["full_layers"], int, -1) == [{-1: 1.0}]


class PlacementLike:
    full_layers: dict[int, float]


def test_every_number_is_finite_and_every_count_has_bounds():
    accepted = []
    for model, name, annotation in fields():
        tried = [value for number in (math.nan, math.inf, -math.inf) for value in placed(annotation, float, number)]
        if (model.__name__, name) not in MAY_BE_NEGATIVE:
            tried += [*placed(annotation, int, -1), *placed(annotation, float, -1.0)]
        accepted += [(model.__name__, name, value) for value in tried if not refuses(model, name, value)]
    assert accepted == []


def test_every_list_that_must_not_be_empty_says_so():
    accepted = []
    for model, name, annotation in fields():
        kinds = [get_origin(part) for part in (annotation, *get_args(annotation))]
        kinds += [dict for part in (annotation, *get_args(annotation)) if isinstance(get_origin(part), TypeAliasType)]
        for kind, empty in ((tuple, []), (list, []), (dict, {})):
            if kind in kinds and (model.__name__, name) not in MAY_BE_EMPTY and not refuses(model, name, empty):
                accepted.append((model.__name__, name, empty))
    assert accepted == []


def test_whole_numbers_end_at_64_bits_everywhere():
    plain = tiny().to_dict()
    places = []

    def visit(node: Any, path: list[str]) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            if isinstance(value, int) and not isinstance(value, bool):
                places.append([*path, key])
            visit(value, [*path, key])

    visit(plain, [])
    assert len(places) > 60
    for path in places:
        with pytest.raises(UserError, match=f"overrides: {'.'.join(map(str, path))}: "):
            apply_overrides(tiny(), [f"{'.'.join(map(str, path))}={LARGEST + 1}"])


@pytest.mark.parametrize("key", ["data.blend", "stage1.blend", "stage2.blend", "placement.full_layers"])
@pytest.mark.parametrize("weights", ["{}", "{1: 0}", "{1: -1, 2: 3}", "{1: .nan}", "{1: .inf}", "{1: 1e308, 2: 1e308}"])
def test_weights_are_non_negative_with_something_to_draw(key, weights):
    if not key.startswith("placement"):
        weights = weights.replace("1:", "a:").replace("2:", "b:")
    with pytest.raises(UserError) as error:
        apply_overrides(tiny(), [f"{key}={weights}"])
    assert str(error.value).startswith(f"overrides: {key}")


def test_weights_of_zero_leave_a_source_out():
    assert apply_overrides(tiny(), ["stage1.blend={text: 0, recall: 2}"]).stage1.blend == {"text": 0.0, "recall": 2.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=4294967296", "seed: "),
        ("stages=[]", "stages: "),
        ("block_selection.candidates=[jet, jet]", "'jet' is given twice"),
        ("stage1.training.loss.layer_weights=[0, 0]", "at least one above 0"),
        ("stage1.training.optimizer.lr=inf", "stage1.training.optimizer.lr"),
        ("stage1.training.optimizer.lr=.nan", "stage1.training.optimizer.lr"),
        ("evaluate.throughput.contexts=[]", "evaluate.throughput.contexts"),
        ("evaluate.throughput.contexts=[0]", "evaluate.throughput.contexts"),
        ("data.path=''", "data.path"),
        ("data.blend={text: 1, text: 2}", "'text' is given twice"),
    ],
)
def test_values_out_of_range_are_one_line(override, message):
    with pytest.raises(UserError) as error:
        apply_overrides(tiny(), [override])
    assert message in str(error.value) and "\n" not in str(error.value)
