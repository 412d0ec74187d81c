"""What a tokenizer folder may say, and token ids that fit the model."""

import json
import shutil

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.recipes.distill import jet_nemotron_2b_distill
from megatron_jet.configs.recipes.known_models import qwen2_5_1_5b
from megatron_jet.data.checks import check_data
from megatron_jet.data.encoder import Encoder
from megatron_jet.data.index import read_index
from megatron_jet.data.merge import merge
from megatron_jet.data.prepare import Request, prepare
from megatron_jet.data.shard_format import Sample
from megatron_jet.data.shards import ShardWriter, read_shard
from megatron_jet.data.tokenizer import read_tokenizer

BOS, EOS = 257, 256


@pytest.fixture
def folder(byte_tokenizer, tmp_path):
    """A copy of the byte tokenizer to change."""
    shutil.copytree(byte_tokenizer, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def with_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def add_begin_of_text(folder, template="<begin> $A"):
    """As Llama 3's tokenizer.json has it."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<end>", special=True), AddedToken("<begin>", special=True)])
    assert tokenizer.token_to_id("<begin>") == BOS
    tokens = [("<begin>", BOS), ("<end>", EOS)]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "config.json: holds a list, not a JSON object"),
        ({"eos_token_id": "</s>"}, "config.json: eos_token_id is '</s>'; it should be a token id"),
        ({"eos_token_id": ["</s>"]}, "config.json: eos_token_id is a list; it should be a token id"),
        ({"eos_token_id": {}}, "config.json: eos_token_id is an object; it should be"),
        ({"eos_token_id": True}, "config.json: eos_token_id is .*rue; it should be"),
        ({"eos_token_id": 1.5}, "config.json: eos_token_id is 1.5; it should be"),
        ({"eos_token_id": []}, "config.json: no eos_token_id, which ends documents"),
        ({"eos_token_id": None}, "config.json: no eos_token_id"),
        ({"eos_token_id": -1}, "config.json: eos_token_id -1 is not in a vocabulary of 512"),
        ({"eos_token_id": 99999}, "config.json: eos_token_id 99999 is not in a vocabulary of 512"),
        ({"eos_token_id": [256, 99999]}, "config.json: eos_token_id 99999 is not in a vocabulary of 512"),
        ({"bos_token_id": 512}, "config.json: bos_token_id 512 is not in a vocabulary of 512"),
        ({"bos_token_id": "<s>"}, "config.json: bos_token_id is '<s>'; it should be a token id"),
        ({"vocab_size": "many"}, "config.json: vocab_size is 'many'; it should be the model's number of tokens"),
        ({"vocab_size": -3}, "config.json: vocab_size is -3; it should be"),
        ({"vocab_size": 0}, "config.json: vocab_size is 0; it should be"),
        ({"vocab_size": [512]}, "config.json: vocab_size is a list; it should be"),
        ({"vocab_size": 100}, "tokenizer.json: token 'Ń' has id 255, the vocabulary of .*config.json ends at 99; use"),
    ],
)
def test_oddities_of_config_json_are_one_line(folder, tmp_path, content, message):
    if isinstance(content, dict):
        with_config(folder, **content)
    else:
        (folder / "config.json").write_text(json.dumps(content))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=message) as caught:
        prepare(Request((str(tmp_path / "a.txt"),), folder), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "tokenizer"]


def test_what_config_json_may_leave_out(folder):
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    found = read_tokenizer(folder)
    assert (found.vocab_size, found.end_of_text, found.begin_of_text) == (256, 7, [])


@pytest.mark.parametrize(("vocab_size", "token"), [(512, 519), (512, 512), (65536, 65540), (512, -1)])
def test_no_token_is_narrowed_to_another(tmp_path, vocab_size, token):
    """65,540 was 4 in 16 bits."""
    writer = ShardWriter(tmp_path, "train", "text", vocab_size)
    with pytest.raises(UserError, match=f"a.txt: token {token} is not in a vocabulary of {vocab_size}"):
        writer.add(Sample(np.array([1, token, 2], np.int64)), "a.txt")
    writer.add(Sample(np.array([1, vocab_size - 1], np.int64)), "a.txt")
    writer.close()
    (sample,) = read_shard(tmp_path, writer.shards[0])
    assert sample.tokens.tolist() == [1, vocab_size - 1]


def test_tokens_beyond_the_vocabulary_are_found_in_the_tokenizer(folder):
    """Before anything is read: eight tokens more than the embedding has rows."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<new{number}>" for number in range(8)])
    tokenizer.save(str(folder / "tokenizer.json"))
    with_config(folder, vocab_size=257)
    with pytest.raises(UserError, match="token '<new7>' has id 263, the vocabulary of .* ends at 256"):
        Encoder(folder)


def test_data_of_earlier_versions_are_compared_by_their_tokenizer(folder, tmp_path):
    """They were prepared without a look at the ids; index.json says 300 of them."""
    (tmp_path / "a.txt").write_text("text")
    prepare(Request((str(tmp_path / "a.txt"),), folder), tmp_path / "out")
    index = read_index(tmp_path / "out").replace(vocab_size=200, end_of_text=10)
    split = index.splits.popitem()[1]
    index = index.replace(splits=dict.fromkeys(("train", "search", "heldout"), split))
    config = jet_nemotron_2b_distill()
    check_data(config, index, qwen2_5_1_5b(), folder)
    with pytest.raises(UserError, match="tokenizer.json: token 'Ń' has id 255, the teacher's vocabulary ends at 199; "):
        check_data(config, index, qwen2_5_1_5b().replace(vocab_size=200), folder)


@pytest.mark.parametrize("template", ["<begin> $A", "<begin> $A <end>"])
def test_documents_and_prompts_begin_as_the_post_processor_has_it(folder, tmp_path, template):
    """Llama 3 was trained with its begin-of-text token; what ends a document is ours in any case."""
    add_begin_of_text(folder, template)
    rows = [{"text": "abc"}, {"prompt": "x", "answer": "y"}, {"text": "<begin>abd"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = prepare(Request((str(tmp_path / "a.jsonl"),), folder, 64), tmp_path / "out")
    assert read_index(tmp_path / "out").begin_of_text == [BOS]
    letters = Encoder(folder).tokenizer.get_vocab()
    a, b, c, d, x, y = (letters[letter] for letter in "abcdxy")
    shards = [shard for split in index.splits.values() for shard in split.shards]
    samples = [sample for shard in shards for sample in read_shard(tmp_path / "out", shard)]
    found = {tuple(sample.tokens.tolist()): sample.mask for sample in samples}
    assert set(found) == {(BOS, a, b, c, EOS), (BOS, x, y, EOS), (BOS, a, b, d, EOS)}
    assert found[BOS, x, y, EOS].tolist() == [0, 0, 1, 1]


def test_parts_begin_alike(folder, byte_tokenizer, tmp_path):
    for name, tokenizer in (("one", byte_tokenizer), ("two", add_begin_of_text(folder))):
        (tmp_path / f"{name}.txt").write_text(name)
        prepare(Request((str(tmp_path / f"{name}.txt"),), tokenizer), tmp_path / name)
    path = tmp_path / "two" / "index.json"
    path.write_text(path.read_text().replace(read_tokenizer(folder).hash, read_tokenizer(byte_tokenizer).hash))
    with pytest.raises(
        UserError, match=r"two: prepared with another beginning of texts than .*one \(\[257\], not \[\]\)"
    ):
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "out")


def test_a_tokenizer_that_knows_no_letters_has_a_beginning_all_the_same(folder, tmp_path):
    add_begin_of_text(folder)
    assert read_tokenizer(folder).begin_of_text == [BOS]
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] = {}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert read_tokenizer(folder).begin_of_text == [BOS]
