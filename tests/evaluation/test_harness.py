"""The harness on this project's tasks: its scores are the scorer's, and whatever is missing is said in one line."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from convert.hf_cases import config_dict, random_model
from megatron_jet.configs.errors import UserError
from megatron_jet.convert.hf_package import load_for_causal_lm
from megatron_jet.data.prepare import Request, prepare
from megatron_jet.evaluation import harness
from megatron_jet.evaluation.harness import EvaluationOptions, evaluate
from megatron_jet.evaluation.hf_scores import score_hf
from megatron_jet.evaluation.result import EvaluationResult
from megatron_jet.evaluation.tiny_tasks import TINY_TASKS, TOKEN_IDS, documents
from megatron_jet.tasks.evalset import EvalSet, load_eval_sets
from megatron_jet.teacher.model import save_tokenizer

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from megatron_jet.evaluation.harness_model import HarnessModel, share_beginnings  # noqa: E402

ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "megatron_jet" / "teachers" / "tiny"
SEQUENCES = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A prepared directory with all four kinds of samples, 64 tokens long."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(Request((), TEACHER, 64, {"heldout": 1}, ("recall", "choice", "copy"), {"heldout": SEQUENCES}), out)
    return out


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> Path:
    """A random model with every mixer and the tiny tokenizer, as the exporter would leave it."""
    out = tmp_path_factory.mktemp("hybrid")
    random_model(config_dict(vocab_size=512), dtype=torch.float32).save_pretrained(out)
    save_tokenizer(out)
    return out


@pytest.fixture(scope="module")
def tool():
    """tools/evaluate.py as a module."""
    spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def harness_model(directory: Path, batch_size: int = 3) -> HarnessModel:
    return HarnessModel(load_for_causal_lm(directory), harness.load_tokenizer(directory), batch_size)


@pytest.mark.parametrize("model", ["teacher", "hybrid"])
def test_the_harness_gives_the_scores_of_the_scorer(model, data, hybrid):
    directory = TEACHER if model == "teacher" else hybrid
    options = EvaluationOptions(data_dir=str(data), sequences=SEQUENCES, batch_size=3, dtype="fp32", device="cpu")
    result = evaluate(directory, ["tiny"], options=options)
    sets = [evalset.first(SEQUENCES) for evalset in load_eval_sets(data, "heldout")]
    expected = score_hf(load_for_causal_lm(directory, dtype=torch.float32), sets, batch_size=4)
    assert set(result.tasks) == set(TINY_TASKS) == {f"tiny_{name}" for name in expected.loss}
    for name, loss in expected.loss.items():
        # fp32 logits of about 30 differ by some 4e-6 between batch sizes, and a loss by as much, however small it is.
        assert result.tasks[f"tiny_{name}"].metrics["loss,none"] == pytest.approx(loss, rel=1e-5, abs=4e-6), name
    for name, accuracy in expected.accuracy.items():
        assert result.tasks[f"tiny_{name}"].metrics["accuracy,none"] == accuracy, name
    if model == "teacher":  # so that equal accuracies are not all zero
        assert expected.accuracy["choice"] > 0.4
        assert expected.accuracy["recall"] > 0.4


def test_answers_out_of_shared_passes_equal_the_harness_own():
    model = harness_model(TEACHER)
    context = "def forward(self, hidden):\n"
    pairs = [
        (context, "    return hidden\n"),
        (context, "    return"),
        (context + "    return", " hidden"),
        ("<|recall|><|k1|><|v2|><|query|><|k1|>", "<|v2|>"),
        ("x", "y"),
        ("import os\nimport o", "s"),
        ("import os\nimport ", "os\nimport sys"),
    ]
    requests = [(pair, *model._encode_pair(*pair)) for pair in pairs]
    shared = model._loglikelihood_tokens(requests, disable_tqdm=True)
    own = HFLM._loglikelihood_tokens(model, requests, disable_tqdm=True)
    for (likelihood, greedy), (own_likelihood, own_greedy) in zip(shared, own, strict=True):
        assert likelihood == pytest.approx(own_likelihood, rel=1e-5, abs=1e-5)
        assert greedy == own_greedy
    assert len({greedy for _, greedy in own}) == 2  # the list holds both outcomes


def test_long_requests_are_cut_as_the_harness_cuts_them():
    model = harness_model(TEACHER)
    model.set_lengths(10, 256)
    pair = ("for name in names:\n    print(", "name)")
    request = (pair, *model._encode_pair(*pair))
    whole = model._loglikelihood_tokens([request, (None, request[1], request[2][:2])], disable_tqdm=True)
    own = HFLM._loglikelihood_tokens(model, [request], disable_tqdm=True)
    assert whole[0][0] == pytest.approx(own[0][0], rel=1e-5)
    with pytest.raises(ValueError, match="does not fit"):
        model._loglikelihood_tokens([(None, [1], list(range(11)))], disable_tqdm=True)


def test_share_beginnings_groups_only_beginnings():
    inputs = [(1, 2), (1, 2, 4), (2,), (1,), (1, 2, 3), (1, 2, 4), (2, 9)]
    groups = share_beginnings(inputs)
    assert sorted(i for group in groups for i in group) == list(range(len(inputs)))
    for first, *others in groups:
        assert all(inputs[first][: len(inputs[i])] == inputs[i] for i in others)
    assert len(groups) == 3  # (2, 9), (1, 2, 4) twice and (1, 2, 3)


def test_generation_of_prompts_of_different_lengths_equals_one_by_one(hybrid):
    model = harness_model(hybrid)
    prompts = ["<|recall|><|k1|><|v2|>", "a longer prompt than the other"]
    settings = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, settings), i) for i, prompt in enumerate(prompts)]
    together = model.generate_until(requests, disable_tqdm=True)
    assert together == [model.generate_until([request], disable_tqdm=True)[0] for request in requests]
    assert all(together)


def test_documents_survive_the_tokenizer_or_hold_ids():
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    text = list("naïve()".encode())  # ï is two bytes
    rows = torch.tensor([text, [*text[3:], 257, 10, 32]])  # the second begins inside the character
    labels = torch.full_like(rows, -100)
    labels[:, 4:6] = torch.tensor([[7, 8], [9, 11]])
    by_answer = list(documents(EvalSet("copy", "exact", rows, labels), tokenizer))
    assert [document["context"].startswith(TOKEN_IDS) for document in by_answer] == [False, False, True, True]
    model = harness_model(TEACHER)
    for document, (row, position) in zip(by_answer, [(0, 4), (0, 5), (1, 4), (1, 5)], strict=True):
        pair = model._encode_pair(document["context"], document["target"])
        assert pair == (rows[row, : position + 1].tolist(), [labels[row, position].item()])
    by_run = list(documents(EvalSet("text", "loss", rows, labels), tokenizer))
    assert [document["tokens"] for document in by_run] == [2, 2]
    assert model._encode_pair(by_run[1]["context"], by_run[1]["target"]) == (rows[1, :5].tolist(), [9, 11])


def test_documents_begin_as_the_tokenizer_begins_them(hybrid, tmp_path):
    """Llama 3's begin-of-text token: the same in training data, evaluation sets and the harness's prompts."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TEACHER / name).read_bytes())
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    begin = ("<|spare263|>", 263)
    template = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rows = [{"prompt": f"{number}?", "answer": " yes"} for number in range(99)] + [{"text": "x" * 99}] * 9
    (tmp_path / "copy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "data"
    prepare(Request((str(tmp_path / "copy.jsonl"),), tmp_path, 64), out)
    model = HarnessModel(load_for_causal_lm(hybrid), harness.load_tokenizer(tmp_path), 3)
    prompt, answer = model._encode_pair("1?", " yes")
    assert prompt == [begin[1], *b"1?"] and answer == list(b" yes")
    assert model.tok_batch_encode(["1?"])[0].tolist() == [prompt]
    splits = load_eval_sets(out, "train"), load_eval_sets(out, "heldout")
    for evalset in (evalset for sets in splits for evalset in sets):
        if evalset.name == "text":
            assert evalset.tokens[0][:3].tolist() == [begin[1], *b"xx"]
            continue
        assert evalset.tokens[0][0] == begin[1] and 63 in evalset.tokens[0][2:5]
        for document in documents(evalset.first(2), model.tokenizer):
            context, target = model._encode_pair(document["context"], document["target"])
            position, row = document["position"], document["sequence"]
            assert context == evalset.tokens[row][:position].tolist()
            assert target == [evalset.labels[row][position - 1].item()]


def test_data_of_a_larger_vocabulary_than_the_models_is_one_line(data, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TEACHER / name).read_bytes())
    config = json.loads((TEACHER / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(UserError, match="prepared for a vocabulary of 512, the model's has 300; prepare") as caught:
        evaluate(tmp_path, ["tiny_recall"], options=EvaluationOptions(data_dir=str(data)))
    assert "\n" not in str(caught.value)


def test_an_answer_that_is_none_of_the_choices_is_one_line():
    rows = torch.tensor([[1, 2, 3]])
    evalset = EvalSet("choice", "choice", rows, torch.tensor([[-100, 7, -100]]), [264, 265])
    with pytest.raises(UserError, match="source 'choice': answer 7 is none of its choices"):
        list(documents(evalset, harness.load_tokenizer(TEACHER)))


def test_the_tool_writes_and_compares(data, tool, tmp_path, capsys):
    earlier = tmp_path / "result.json"
    scores = {"accuracy": {"recall": 0.25}, "loss": {"recall": 2.0, "other": 1.0}}
    earlier.write_text(json.dumps({"stage": "evaluate", "final": scores}))
    output = tmp_path / "out.json"
    arguments = [str(TEACHER), "--tasks", "tiny_recall", "--data", str(data), "--sequences", "2"]
    assert tool.main([*arguments, "--output", str(output), "--against", str(earlier)]) == 0
    result = EvaluationResult.parse(json.loads(output.read_text()))
    accuracy = result.tasks["tiny_recall"].metrics["accuracy,none"]
    printed = capsys.readouterr().out
    assert f"{accuracy - 0.25:+.4f}" in printed
    assert tool.main([*arguments, "--json", "--limit", "3", "--against", str(output)]) == 0
    limited = json.loads(capsys.readouterr().out)
    assert limited["schema_version"] == 1
    assert limited["tasks"]["tiny_recall"]["samples"] == 3
    assert "seconds" in limited["measured"]


def test_bad_requests_are_one_line_each(data, tool, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (damaged / name).write_bytes((TEACHER / name).read_bytes())
    (damaged / "model.safetensors").write_bytes((TEACHER / "model.safetensors").read_bytes()[:-1000])
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((TEACHER / "config.json").read_bytes())
    short = tmp_path / "short"
    short.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (short / name).write_bytes((TEACHER / name).read_bytes())
    tensors = load_file(TEACHER / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, short / "model.safetensors", {"format": "pt"})
    tiny = ["--tasks", "tiny_choice", "--data", str(data)]
    for arguments, message in [
        ([str(tmp_path / "nowhere"), *tiny], "no config.json there"),
        ([str(bare), *tiny], "no tokenizer there"),
        ([str(damaged), *tiny], "damaged"),
        ([str(short), *tiny], "missing tensors, such as model.norm.weight"),
        ([str(TEACHER), "--tasks", "tiny_choise", "--data", str(data)], "did you mean tiny_choice"),
        ([str(TEACHER), "--tasks", "tiny_choice"], "need --data DIR"),
        ([str(TEACHER), "--tasks", "tiny_choice", "--data", str(tmp_path)], "no index.json there"),
        ([str(TEACHER), *tiny, "--split", "test"], "no split 'test'"),
        ([str(TEACHER), *tiny, "--against", "paper:jet"], "the paper's numbers are known for jet_nemotron_2b"),
        ([str(TEACHER), *tiny, "--against", str(TEACHER / "config.json")], "not a result of tools/evaluate.py"),
        ([str(TEACHER), "--preset", "paper-maths"], "no preset 'paper-maths'; there are paper-mmlu"),
        ([str(TEACHER), "--preset", "paper-code"], "add --allow-code"),
    ]:
        with pytest.raises(UserError) as caught:
            tool.main(arguments)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit) as usage:
        tool.main([str(TEACHER)])
    assert usage.value.code == 2


def test_data_that_is_not_here_names_the_command_that_fetches_it(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    folder = Path(harness.find_spec("lm_eval").origin).parent / "tasks" / "piqa"
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with pytest.raises(UserError, match="tools/prefetch.py RECIPE --tasks piqa where there is a network") as caught:
        harness._load_tasks(manager, ["piqa"], None, EvaluationOptions())
    assert "\n" not in str(caught.value)


def test_data_of_which_other_parts_are_cached_is_data_that_is_not_here():
    class Manager:
        def load(self, names):
            raise ValueError("Couldn't find cache for allenai/ai2_arc for config 'ARC-Easy'\nAvailable configs: ...")

    with pytest.raises(
        UserError, match="data of arc_easy is not on this machine .*config 'ARC-Easy'.*; run "
    ) as caught:
        harness._load_tasks(Manager(), ["arc_easy"], None, EvaluationOptions())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("device", "named"), [("foo", "no such device"), ("mps", "no such"), ("cuda:99", "GPUs here")])
def test_a_device_that_is_not_there_is_found_out_before_anything_is_loaded(device, named, monkeypatch):
    monkeypatch.setattr(harness, "task_manager", None)
    with pytest.raises(UserError, match=f"--device {device}: .*{named}"):
        harness.evaluate(TEACHER, ["tiny"], options=EvaluationOptions(device=device))
    with pytest.raises(UserError, match=f"--device {device}: "):
        harness.load_model(TEACHER, EvaluationOptions(device=device))


def test_a_config_that_is_no_mapping_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    for load in (harness.load_tokenizer, lambda path: harness.load_model(path, EvaluationOptions())):
        with pytest.raises(UserError, match="config.json: holds no mapping"):
            load(tmp_path)


def test_code_in_the_directory_runs_only_when_asked(hybrid, tmp_path):
    for path in hybrid.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({os.fspath(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError):
        harness.load_model(tmp_path, EvaluationOptions())
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError):  # the code defines no model, but it runs
        harness.load_model(tmp_path, EvaluationOptions(trust_remote_code=True))
    assert (tmp_path / "ran").exists()
