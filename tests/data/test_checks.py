"""What the data lack is one line before anything starts, from index.json alone."""

import json

import pytest

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_file
from megatron_jet.configs.recipes.distill import jet_nemotron_2b_distill
from megatron_jet.configs.recipes.jet_nemotron import jet_nemotron_2b, jet_nemotron_4b
from megatron_jet.configs.recipes.known_models import qwen2_5_1_5b
from megatron_jet.configs.recipes.tiny import tiny
from megatron_jet.data.checks import check_data, check_objectives, repeated_sources
from megatron_jet.data.index import DataIndex, SourceInfo, SplitInfo, read_index
from megatron_jet.data.prepare import Request, prepare

TEXT = SourceInfo(packing="stream", metric="loss")
ANSWERS = SourceInfo(packing="whole", metric="exact")
SOURCES = {
    "recall": SourceInfo(packing="whole", metric="exact"),
    "choice": SourceInfo(packing="whole", metric="choice", choices=[1, 2]),
    "text": TEXT,
}


def index_of(*, longest: int = 4000, splits=("train", "search", "heldout"), **sources: SourceInfo) -> DataIndex:
    whole = [name for name, source in sources.items() if source.packing == "whole"]
    split = SplitInfo(sources=dict.fromkeys(sources, 1000), shards=[], longest=dict.fromkeys(whole, longest))
    return DataIndex(
        vocab_size=151936,
        end_of_text=1,
        seq_length=4096,
        tokenizer_hash="-",
        sources=sources,
        splits=dict.fromkeys(splits, split),
    )


PAPER = index_of(text=TEXT, retrieval_qa=ANSWERS, knowledge_qa=ANSWERS)


@pytest.mark.parametrize("build", [jet_nemotron_2b, jet_nemotron_4b])
def test_paper_recipes_run_on_the_data_that_the_documents_prepare(build, tmp_path):
    check_data(build(), PAPER, qwen2_5_1_5b(), tmp_path)


def test_data_of_the_documented_command(byte_tokenizer, tmp_path):
    """docs/clusters.md, step 4: the sources have the names that the paper's recipes ask for."""
    rows = [{"prompt": f"{n} + 1 =", "answer": f" {n + 1}"} for n in range(200)]
    for name in ("retrieval", "knowledge"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "corpus").mkdir()
    for n in range(60):
        (tmp_path / "corpus" / f"{n}.txt").write_text(f"page {n}")
    inputs = tuple(f"{name}={tmp_path / name}.jsonl" for name in ("retrieval", "knowledge"))
    index = prepare(
        Request((str(tmp_path / "corpus"), *inputs), byte_tokenizer, seq_length=4096), tmp_path / "prepared"
    )
    check_data(jet_nemotron_2b(), index, qwen2_5_1_5b(), byte_tokenizer)
    assert read_index(tmp_path / "prepared").splits["train"].longest.keys() == {"retrieval_qa", "knowledge_qa"}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            index_of(text=TEXT, qa=ANSWERS),
            "placement.objective: 'retrieval_qa' is not in the search split; known: qa; set placement.objective to "
            "one of them or prepare the data with retrieval=FILE.jsonl",
        ),
        (
            index_of(text=TEXT),
            "placement.objective: 'retrieval_qa' is not in the search split; known: none; prepare the data with "
            "retrieval=FILE.jsonl",
        ),
        (
            index_of(text=TEXT, retrieval_qa=ANSWERS, knowledge_qa=ANSWERS, longest=4098),
            "placement.training.seq_length=4096: 'retrieval_qa' has a sample of 4098 tokens; raise it, or prepare the "
            "data with --seq-length 4096",
        ),
        (index_of(text=TEXT, qa=ANSWERS, splits=("train", "heldout")), "no split 'search'; it has train, heldout"),
    ],
)
def test_data_that_would_end_a_paper_run_are_refused(index, message, tmp_path):
    with pytest.raises(UserError) as caught:
        check_data(jet_nemotron_2b(), index, qwen2_5_1_5b(), tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_candidates_need_something_to_be_ranked_by(tmp_path):
    config = jet_nemotron_2b().replace(stages=("prepare", "block_selection"))
    check_data(config, PAPER, qwen2_5_1_5b(), tmp_path)
    with pytest.raises(UserError, match="no samples with answers in split 'search', by which block_selection ranks"):
        check_data(config, index_of(text=TEXT), qwen2_5_1_5b(), tmp_path)


def test_a_known_architecture_needs_text_only(tmp_path):
    plain = index_of(text=TEXT, splits=("train", "heldout"))
    check_data(jet_nemotron_2b_distill(), plain, qwen2_5_1_5b(), tmp_path)


def test_blends_are_compared_with_the_splits_that_they_are_drawn_from(tmp_path):
    """Stage 2 must not find out after days of stage 1."""
    config = jet_nemotron_2b()

    def blended(**blend: float):
        return config.replace(stage2=config.stage2.replace(blend=blend))

    check_data(blended(text=0.5, retrieval_qa=0.5), PAPER, qwen2_5_1_5b(), tmp_path)
    with pytest.raises(UserError, match="stage2.blend: the data have no source 'maths' in split 'train'; they have kn"):
        check_data(blended(maths=1.0), PAPER, qwen2_5_1_5b(), tmp_path)
    lacking = PAPER.replace(splits=PAPER.splits | {"heldout": SplitInfo(sources={"text": 1}, shards=[])})
    with pytest.raises(UserError, match="stage2.blend: the data have no source 'retrieval_qa' in split 'heldout'"):
        check_data(blended(retrieval_qa=1.0), lacking, qwen2_5_1_5b(), tmp_path)


def test_sources_that_no_stage_blends_may_be_longer(tmp_path):
    recipe = jet_nemotron_2b()
    config = recipe.replace(stages=("stage1",), stage1=recipe.stage1.replace(init="teacher"))
    long = index_of(text=TEXT, qa=ANSWERS, longest=9000)
    with pytest.raises(UserError, match="stage1.training.seq_length=4096: 'qa' has a sample of 9000 tokens"):
        check_data(config, long, qwen2_5_1_5b(), tmp_path)
    text = config.replace(data=config.data.replace(blend={"text": 1.0, "qa": 0.0}))
    check_data(text, long, qwen2_5_1_5b(), tmp_path)


def test_data_of_another_tokenizer_are_refused(byte_tokenizer, tmp_path):
    config = jet_nemotron_2b_distill()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="prepared with another tokenizer than .*set teacher.tokenizer"):
        check_data(config, PAPER, qwen2_5_1_5b(), tmp_path)
    check_data(config, PAPER.replace(tokenizer_hash=hash_file(tmp_path / "tokenizer.json")), qwen2_5_1_5b(), tmp_path)
    small = qwen2_5_1_5b().replace(vocab_size=512)
    with pytest.raises(UserError, match="for a vocabulary of 151936, the teacher's has 512"):
        check_data(config, PAPER, small, byte_tokenizer)


def test_data_that_are_read_many_times_are_noted():
    """50 billion tokens of 1,000: whoever starts this should know."""
    config = jet_nemotron_2b()
    lines = repeated_sources(config, PAPER, ("prepare", "stage1", "stage2"))
    assert lines[0].startswith("stage1 reads source ") and "(1,000 training tokens) about 16,666," in lines[0]
    assert len(lines) == 2 and lines[1].startswith("stage2 reads")
    large = PAPER.replace(splits={"train": SplitInfo(sources={"text": 100_000_000_000, "qa": 10_000}, shards=[])})
    assert repeated_sources(config, large, ("stage1",)) == []
    much = config.replace(data=config.data.replace(blend={"text": 0.5, "qa": 0.5}))
    assert "source 'qa' (10,000 training tokens) about 2,500,0" in repeated_sources(much, large, ("stage1",))[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "recal"}, "placement.objective: 'recal' is not in the search split; known: recall, choice"),
        ({"objective": "text"}, "placement.objective: 'text' has no accuracy; known: recall, choice"),
        ({"swa_objective": "mmlu"}, "placement.swa_objective: 'mmlu' is not in the search split; known: recall, "),
    ],
)
def test_objective_that_cannot_be_scored_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_objectives(tiny().placement.replace(**changes), SOURCES)


def test_objectives_that_can_be_scored_or_are_not_used_pass():
    settings = tiny().placement
    check_objectives(settings.replace(swa_objective="text"), SOURCES)
    check_objectives(settings.replace(budget=0, objective="none", swa_budget=0, swa_objective="none"), SOURCES)
