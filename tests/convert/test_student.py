"""First weights of students: what is the teacher's, what is drawn, and that the draw depends on nothing else."""

import pytest
import torch

from megatron_jet.configs.errors import UserError
from megatron_jet.convert.global_checkpoint import GlobalCheckpoint, LazyTensor, write_checkpoint
from megatron_jet.convert.student import extract_student, make_student, student_plan
from megatron_jet.model.builder import build_model
from megatron_jet.model.state import gather_tensors
from megatron_jet.training.checkpoint import load_model, save_model
from mixers.mixer_cases import model_with, model_with_every_mixer

TEACHER = model_with("attn", "attn", "attn", "attn")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Checkpoint of a random teacher."""
    generator = torch.Generator().manual_seed(0)
    from megatron_jet.model.param_table import param_table

    path = tmp_path_factory.mktemp("student") / "teacher"
    tensors = {row.key: torch.randn(row.global_shape, generator=generator) for row in param_table(TEACHER)}
    write_checkpoint(path, tensors, TEACHER.to_dict())
    return path


def tensors_of(path) -> dict[str, torch.Tensor]:
    source = GlobalCheckpoint(path)
    return {key: source.read(key) for key in source}


def student(teacher, path, *entries, **options) -> dict[str, torch.Tensor]:
    make_student(teacher, TEACHER, model_with(*entries), path, **{"seed": 0, **options})
    return tensors_of(path)


def equal(a: dict, b: dict, part: str) -> bool:
    keys = [key for key in a if part in key]
    assert keys and keys == [key for key in b if part in key]
    return all(torch.equal(a[key], b[key]) for key in keys)


def test_everything_but_linear_mixers_is_the_teachers(teacher, tmp_path):
    made, source = student(teacher, tmp_path / "s", "jet", "attn", "swa:5", "gla"), tensors_of(teacher)
    linear = ("layers.0.self_attention", "layers.3.self_attention")
    taken = [key for key in made if not any(part in key for part in linear)]
    assert all(torch.equal(made[key], source[key]) for key in taken)
    assert set(taken) == {key for key in source if not any(part in key for part in linear)}


def test_a_linear_mixer_starts_from_its_own_layers_q(teacher, tmp_path):
    """JetBlock's 4 heads are 6 wide, the teacher's 8: the first 6 rows of each query head are copied."""
    made, source = student(teacher, tmp_path / "s", "attn", "jet", "attn", "attn"), tensors_of(teacher)
    qkv = source["decoder.layers.1.self_attention.linear_qkv.weight"].view(2, 4, 8, 32)  # [group, 2 q + k + v, d, h]
    queries = qkv[:, :2].reshape(4, 8, 32)
    made_q = made["decoder.layers.1.self_attention.in_proj.weight.query"].view(4, 6, 32)
    assert torch.equal(made_q, queries[:, :6])


def test_the_draw_depends_on_seed_layer_and_mixer_only(teacher, tmp_path):
    a = student(teacher, tmp_path / "a", "jet", "gla", "attn", "attn")
    b = student(teacher, tmp_path / "b", "jet", "attn", "jet", "gated_delta_net")
    assert equal(a, b, "layers.0.self_attention")
    c = student(teacher, tmp_path / "c", "jet", "gla", "attn", "attn", seed=1)
    assert not equal(a, c, "layers.0.self_attention")
    twice = student(teacher, tmp_path / "d", "jet", "jet", "attn", "attn")
    drawn = "self_attention.A_log"
    assert not torch.equal(twice[f"decoder.layers.0.{drawn}"], twice[f"decoder.layers.1.{drawn}"])


def test_random_start_takes_nothing_from_the_layer(teacher, tmp_path):
    made = student(teacher, tmp_path / "s", "gla", "attn", "attn", "attn", init="random")
    from_teacher = student(teacher, tmp_path / "t", "gla", "attn", "attn", "attn")
    query = "decoder.layers.0.self_attention.in_proj.weight.query"
    assert not torch.equal(made[query], from_teacher[query])
    assert made[query].std() == pytest.approx(0.1, rel=0.3), "initializer_range of the test models"


def test_each_mixer_is_drawn_once_and_let_go_when_it_is_written(teacher, tmp_path, monkeypatch):
    """A supernet of a large teacher would otherwise be in memory whole, in fp32, while it is written."""
    import weakref

    from megatron_jet.convert import student as module

    monkeypatch.setattr("megatron_jet.convert.global_checkpoint.SINGLE_FILE_BYTES", 0)
    mixer_state, drawn, most = module.mixer_state, [], 0

    def counted(*arguments) -> dict[str, torch.Tensor]:
        nonlocal most
        tensors = mixer_state(*arguments)
        drawn.append([weakref.ref(tensor) for tensor in tensors.values()])
        most = max(most, sum(any(ref() is not None for ref in mixer) for mixer in drawn))
        return tensors

    monkeypatch.setattr(module, "mixer_state", counted)
    model = model_with("gla", "gla", "gla", "gla")
    make_student(teacher, TEACHER, model, tmp_path / "super", seed=0, choices=(("attn", "gla", "jet"),) * 4)
    assert len(drawn) == 8 and most <= 3, "the one being drawn, and two whose last tensors are being written"


def test_supernet_holds_both_paths_and_gives_plain_students_back(teacher, tmp_path):
    model = model_with("gla", "gla", "gla", "gla")
    make_student(teacher, TEACHER, model, tmp_path / "super", seed=0, choices=(("attn", "gla"),) * 4)
    plan = ("gla", "attn", "swa:5", "gla")
    extract_student(tmp_path / "super", model_with(*plan), tmp_path / "inside")
    direct = student(teacher, tmp_path / "direct", *plan)
    inside = tensors_of(tmp_path / "inside")
    assert set(inside) == set(direct) and all(torch.equal(inside[key], direct[key]) for key in direct)


def test_a_written_checkpoint_loads_into_a_model_and_a_saved_one_reads_back(teacher, tmp_path, single_rank):
    """The converter's files and Megatron's are the same format, in both directions, for every mixer."""
    config = model_with_every_mixer()
    model = build_model(config, single_rank, init_seed=3)
    expected = gather_tensors(model)
    save_model(model, tmp_path / "megatron")
    source = GlobalCheckpoint(tmp_path / "megatron")
    assert set(source) == set(expected) and all(torch.equal(source.read(key), expected[key]) for key in expected)
    write_checkpoint(tmp_path / "ours", expected)
    other = build_model(config, single_rank, init_seed=None)
    load_model(other, tmp_path / "ours")
    loaded = gather_tensors(other)
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize("single_file", [False, True])
def test_tensors_are_made_when_they_are_written_and_let_go(tmp_path, monkeypatch, single_file):
    """Peak memory of a conversion is a few tensors, not the model; below a gigabyte one file keeps them all."""
    import weakref

    import numpy

    if not single_file:
        monkeypatch.setattr("megatron_jet.convert.global_checkpoint.SINGLE_FILE_BYTES", 0)
    memory: list[weakref.ref] = []
    most = 0

    def make() -> torch.Tensor:
        nonlocal most
        array = numpy.ones(100, dtype=numpy.float32)  # lives as long as any tensor over it
        memory.append(weakref.ref(array))
        most = max(most, sum(ref() is not None for ref in memory))
        return torch.from_numpy(array)

    write_checkpoint(tmp_path / "c", {f"t{i}": LazyTensor((100,), torch.float32, make) for i in range(20)})
    assert len(memory) == 20 and len(list(GlobalCheckpoint(tmp_path / "c"))) == 20
    assert (most <= 3) is not single_file, "the one being made and the two being written"
    assert all(ref() is None for ref in memory)


def test_a_failure_while_making_a_tensor_is_that_failure(tmp_path):
    def fail() -> torch.Tensor:
        raise UserError("tensor 'x' holds NaN")

    tensors = {"a": torch.ones(2), "b": LazyTensor((2,), torch.float32, fail), "c": torch.ones(2)}
    with pytest.raises(UserError, match="^tensor 'x' holds NaN$"):
        write_checkpoint(tmp_path / "c", tensors)
    assert not list(tmp_path.iterdir())


def test_misfits_are_named(teacher, tmp_path):
    with pytest.raises(UserError, match="intermediate_size=64, the teacher 48"):
        make_student(teacher, TEACHER, model_with(*["jet"] * 4, intermediate_size=64), tmp_path / "s", seed=0)
    with pytest.raises(UserError, match="the teacher has linear layers"):
        make_student(teacher, model_with(*["jet"] * 4), model_with(*["jet"] * 4), tmp_path / "s", seed=0)


def test_student_plan_replaces_linear_layers_only():
    assert student_plan(("gla", "attn", "swa:5", "gla"), "jet") == ("jet", "attn", "swa:5", "jet")
