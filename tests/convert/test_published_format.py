"""The published 2B and 4B, in full size but without weights: config, names, shapes and types in both directions."""

import itertools
import json
import math
import struct
from pathlib import Path

import pytest
import torch

from convert.published import BILLIONS, CONFIGS, shapes, shapes_of
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.hf_format import model_from_hf, model_to_hf
from megatron_jet.configs.recipes.known_models import KNOWN_MODELS
from megatron_jet.convert.hf.configuration_megatron_jet import JetNemotronConfig
from megatron_jet.convert.hf.modeling_megatron_jet import JetNemotronForCausalLM
from megatron_jet.convert.hf_export import hf_tensors
from megatron_jet.convert.hf_files import INDEX, HfTensors
from megatron_jet.convert.hf_import import check_tensors
from megatron_jet.model.param_table import param_table

MODELS = list(CONFIGS)


@pytest.mark.parametrize("name", MODELS)
def test_config(name):
    """Every key that is published, with its spelling; and read back it is the model that recipes build."""
    written = model_to_hf(KNOWN_MODELS[name](), "bfloat16")
    assert written == CONFIGS[name]
    # == takes 2 for 2.0, and files do not.
    assert json.dumps(written, sort_keys=True) == json.dumps(CONFIGS[name], sort_keys=True)
    assert '"norm_eps": "1e-5"' in json.dumps(written)
    assert model_from_hf(CONFIGS[name]) == KNOWN_MODELS[name]()


@pytest.mark.parametrize("heads", [1, 3, 6, 12, 16, 32])
def test_the_published_code_finds_our_widths_again(heads):
    """It computes them by cutting products off at the point, and refuses what is not within 1e-5 of the product."""
    model = KNOWN_MODELS["Jet-Nemotron-2B"]()
    for d_k, d_v in itertools.product(range(8, 257, 8), range(8, 513, 24)):
        jet = model.mixers["jet"].replace(num_heads=heads, head_dim=d_k, expand_v=d_v / d_k)
        sized = model.replace(mixers={"jet": jet})
        config = model_to_hf(sized)
        expansion = config["efficient_attention_config"]["jet"]["expand_v"]
        assert int(d_k * expansion) == d_v and int(heads * d_k * expansion) == heads * d_v, (d_k, d_v, expansion)
        assert math.isclose(d_k * expansion, d_v, rel_tol=1e-5)
        assert model_from_hf(config) == sized


def test_a_head_width_of_its_own_stays_in_the_published_format():
    """Its attention reads head_dim; files without the key derive it."""
    model = KNOWN_MODELS["Jet-Nemotron-2B"]()
    assert "head_dim" not in model_to_hf(model)
    wide = model.replace(head_dim=160)
    config = model_to_hf(wide)
    assert (config["model_type"], config["head_dim"]) == ("jet_nemotron", 160)
    assert model_from_hf(config) == wide and JetNemotronConfig(**config).softmax_head_dim == 160


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_of_the_table(name):
    rows = param_table(KNOWN_MODELS[name]())
    assert {n: s for row in rows for n, s in zip(row.hf, row.shapes, strict=True)} == shapes(name)
    count = sum(math.prod(shape) for shape in shapes(name).values())
    assert round(count / 1e9, 3) == BILLIONS[name]


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_of_the_modeling_code(name):
    with torch.device("meta"):
        model = JetNemotronForCausalLM(JetNemotronConfig(**CONFIGS[name])).to(torch.bfloat16)
    stored = {key: tensor for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
    assert shapes_of(stored) == shapes(name)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def write_headers(directory: Path, tensors: dict[str, tuple[int, ...]], shards: int = 2) -> None:
    """A published checkpoint whose data are holes in the files: gigabytes that take no space and no time."""
    names = list(tensors)
    place = {}
    for number in range(shards):
        file, header, end = f"model-{number + 1:05d}-of-{shards:05d}.safetensors", {}, 0
        for name in names[number::shards]:
            start, end = end, end + 2 * math.prod(tensors[name])
            header[name] = {"dtype": "BF16", "shape": list(tensors[name]), "data_offsets": [start, end]}
            place[name] = file
        text = json.dumps(header).encode()
        with open(directory / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + end)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))


@pytest.mark.parametrize("name", MODELS)
def test_import_takes_the_published_files(tmp_path, name):
    model = model_from_hf(CONFIGS[name])
    write_headers(tmp_path, shapes(name))
    source = HfTensors(tmp_path)
    check_tensors(model, param_table(model), source)
    assert {source.dtype(tensor) for tensor in source} == {torch.bfloat16}


@pytest.mark.parametrize("change", [{"model.norm.weight": (1537,)}, {"model.layers.14.self_attn.A_log": (12,)}])
def test_import_refuses_files_that_are_nearly_the_published_ones(tmp_path, change):
    model = model_from_hf(CONFIGS["Jet-Nemotron-2B"])
    write_headers(tmp_path, shapes("Jet-Nemotron-2B") | change)
    with pytest.raises(UserError, match=next(iter(change))):
        check_tensors(model, param_table(model), HfTensors(tmp_path))


class Headers:
    """A Megatron checkpoint as far as its metadata goes."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype

    def dtype(self, key: str) -> torch.dtype:
        return self._dtype


@pytest.mark.parametrize("name", MODELS)
def test_export_makes_the_published_files(name):
    """From a bf16 checkpoint every tensor is bf16, as published; from fp32, with --dtype bf16, all but A_log."""
    model = KNOWN_MODELS[name]()
    rows = param_table(model)
    stored = hf_tensors(rows, Headers(torch.bfloat16), model, "stored")
    assert {tensor.name: tensor.shape for tensor in stored} == shapes(name)
    assert len(stored) == len(shapes(name)) and {tensor.dtype for tensor in stored} == {torch.bfloat16}
    cast = hf_tensors(rows, Headers(torch.float32), model, "bf16")
    assert {tensor.name: tensor.shape for tensor in cast} == shapes(name)
    wide = {tensor.name for tensor in cast if tensor.dtype != torch.bfloat16}
    assert wide == {tensor for tensor in shapes(name) if tensor.endswith("A_log")}
