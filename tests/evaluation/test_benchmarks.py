"""Kernel and training benchmarks: bytes by hand, loud rows for what cannot run, and the trainer's own step."""

import json
import os

import pytest
import torch

from evaluation.tools import load_tool
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.estimate import training_flops_per_token
from megatron_jet.configs.recipes.catalog import load_recipe
from megatron_jet.configs.run_estimate import planned_student
from megatron_jet.configs.teacher_source import teacher_model
from megatron_jet.evaluation import device as device_module
from megatron_jet.evaluation import kernel_bench
from megatron_jet.evaluation.kernel_cases import CASES, Draw, Shape, use_backend
from megatron_jet.training import bench

CPU = torch.device("cpu")
SMALL = Shape(batch=2, time=8, heads=2, key_dim=4, value_dim=6)
SPEED = device_module.Rates(bytes_per_second=1e9, flops_per_second=1e10)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(device_module, "measure_rates", lambda device, dtype: SPEED)
    monkeypatch.setattr(kernel_bench, "LAP_SECONDS", 0.0)
    monkeypatch.setattr(kernel_bench, "LAPS", 2)


def draw(operation: str) -> dict[str, torch.Tensor]:
    return CASES[operation].draw(Draw(SMALL, CPU, torch.float32))


def test_bytes_by_hand():
    conv = CASES["causal_conv"]
    tokens, weight = 2 * 8 * 12 * 4, 12 * 4 * 4
    assert kernel_bench.bytes_moved(conv, draw("causal_conv"), backward=False) == 2 * tokens + weight
    # Backward: inputs again, output gradients read, input gradients written.
    assert kernel_bench.bytes_moved(conv, draw("causal_conv"), backward=True) == 3 * (tokens + weight) + 2 * tokens
    decode = CASES["recurrent_gated_delta_rule"]
    inputs = decode.draw(Draw(Shape(2, 1, 2, 4, 6), CPU, torch.float32))
    state, per_token = 2 * 2 * 4 * 6 * 4, 2 * 2 * (4 + 4 + 6 + 1 + 1) * 4
    output = 2 * 2 * 6 * 4
    assert kernel_bench.bytes_moved(decode, inputs, backward=False) == 2 * state + per_token + output


@pytest.mark.parametrize("operation", CASES)
def test_reference_is_timed_and_gpu_kernels_say_why_not(operation):
    rows = list(kernel_bench.bench([operation], [SMALL], CPU, torch.float32, 1e9))
    passes = ["forward"] if CASES[operation].decodes else ["forward", "forward+backward"]
    assert [row.passes for row in rows if row.backend == "reference"] == passes
    for row in rows:
        if row.backend == "reference":
            found = row.measured
            assert row.skipped is None and row.error == 0 and found["milliseconds"] > 0
            assert found["bytes_per_second"] == pytest.approx(row.bytes / found["milliseconds"] * 1e3)
            assert found["share"] == found["bytes_per_second"] / 1e9
        else:
            assert row.skipped == f"{row.backend} needs a GPU, this is cpu" and not row.measured
    assert len(rows) == 2 * len(passes)


@pytest.mark.parametrize("before", [None, "reference"])
def test_choice_of_a_backend_is_undone(monkeypatch, before):
    if before is None:
        monkeypatch.delenv("JET_KERNELS", raising=False)
    else:
        monkeypatch.setenv("JET_KERNELS", before)
    with use_backend("chunk_gla", "fla"):
        assert os.environ["JET_KERNELS"] == "auto,chunk_gla=fla"
    assert os.environ.get("JET_KERNELS") == before


def test_decoding_operations_take_one_token():
    (row, _) = kernel_bench.bench(["recurrent_gla"], [SMALL, SMALL], CPU, torch.float32, 1e9)
    assert row.shape == "2x1x2x4x6"


def test_backward_pass_gives_gradients_of_every_input():
    inputs = draw("chunk_gla")
    run = kernel_bench.runner(CASES["chunk_gla"], inputs, backward=True)
    assert [x.shape for x in run()] == [x.shape for x in inputs.values()]
    assert all(x.abs().sum() > 0 for x in run())


def test_errors_between_implementations_show():
    expected = [torch.ones(4), torch.full((4,), 2.0)]
    assert kernel_bench.largest_error([torch.ones(4), torch.full((4,), 2.2)], expected) == pytest.approx(0.1)


def test_an_implementation_that_fails_is_a_row(monkeypatch):
    def fail(self, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(kernel_bench, "bytes_moved", lambda *args: 1)
    monkeypatch.setattr(type(CASES["l2_normalize"]), "call", fail)
    rows = list(kernel_bench.bench(["l2_normalize"], [SMALL], CPU, torch.float32, 1e9))
    assert rows[0].skipped == "CUDA out of memory."


def test_record_names_command_and_environment(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tools/throughput.py", "a model"])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("JET_HF_KERNELS", raising=False)
    found = device_module.record("throughput", CPU)
    assert found["command"].startswith("OMP_NUM_THREADS=3 ")
    assert found["command"].endswith("python tools/throughput.py 'a model'")
    assert torch.__version__.startswith(found["versions"]["torch"].partition("+")[0])
    assert found["device"]["type"] == "cpu" and found["date"].endswith("+00:00")


def test_kernel_tool_writes_json(tmp_path, capsys):
    tool, out = load_tool("bench_kernels"), tmp_path / "kernels.json"
    assert tool.main(["--operations", "l2_normalize", "--shapes", str(SMALL), "--output", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["kind"] == "kernels" and len(written["rows"]) == 4 and written["measured"]["bytes_per_second"] == 1e9
    assert "SKIPPED" in capsys.readouterr().out
    for arguments, message in (
        (["--operations", "softmax"], "no operation 'softmax'"),
        (["--shapes", "2x8"], "shape '2x8': write BxTxHxDKxDV"),
    ):
        with pytest.raises(UserError, match=message):
            tool.main(arguments)


def test_training_tool_runs_the_trainer_s_step(tmp_path, monkeypatch, capsys):
    steps, real = [], bench.Trainer.train_step

    def spy(self, stop):
        steps.append(self.job.name)
        return real(self, stop)

    monkeypatch.setattr(bench.Trainer, "train_step", spy)
    tool, out = load_tool("bench_training"), tmp_path / "training.json"
    arguments = ["tiny", "--mixers", "jet,attn", "--layers", "5", "--seq-length", "32", "--iterations", "2"]
    assert tool.main([*arguments, "--drop", "1", "--output", str(out)]) == 0
    assert steps == ["jet"] * 2 + ["attn"] * 2
    written = json.loads(out.read_text())
    config = load_recipe("tiny")
    teacher = teacher_model(config.teacher)
    teacher = teacher.replace(num_layers=5, layer_plan=teacher.layer_plan[:5])
    training = config.stage1.training.replace(seq_length=32)
    row = written["rows"][0]
    assert row["layers"]["jet"] == planned_student(config, teacher, "jet").layer_plan.count("jet") > 0
    per_token = training_flops_per_token(planned_student(config, teacher, "jet"), teacher, training)
    found = row["measured"]
    assert found["tflops"] == pytest.approx(per_token * found["tokens_per_second"] / 1e12)
    assert found["utilisation"] == pytest.approx(found["tflops"] * 1e12 / 1e10)
    tokens = 32 * training.micro_batch_size
    assert found["tokens_per_second"] == pytest.approx(tokens / found["milliseconds"] * 1e3)
    assert 0 < row["trained_params"] < row["params"]
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing"),
        (["tiny", "--mixers", "mamba"], "'mamba' is not in the recipe"),
        (["tiny", "--layers", "2", "--mixers", "jet"], "do not fit 2 layers"),
    ],
)
def test_training_tool_bad_input(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        load_tool("bench_training").main(arguments)
    assert "\n" not in str(error.value)
