"""tools/convert.py as a function, and small models to convert and to damage."""

import importlib.util
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from convert.hf_cases import ORACLE
from megatron_jet.configs.checksums import read_checksums, write_checksums
from megatron_jet.configs.files import hash_file
from megatron_jet.convert.global_checkpoint import GlobalCheckpoint, write_checkpoint
from megatron_jet.convert.hf_files import INDEX, HfTensors

SCRIPT = Path(__file__).parents[2] / "tools" / "convert.py"


def load_script():
    spec = importlib.util.spec_from_file_location("convert_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def convert(*arguments) -> int:
    return load_script().main([str(argument) for argument in arguments])


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    source = HfTensors(directory)
    return {name: source.read(name) for name in source}


def same(first: Path, second: Path) -> bool:
    a, b = tensors_of(first), tensors_of(second)
    return set(a) == set(b) and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def visible(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")}


def save_qwen2(directory: Path, dtype=torch.bfloat16, tied: bool = True) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    Qwen2ForCausalLM(config).to(dtype).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")


def copy_oracle(directory: Path) -> Path:
    """A copy of the published format's tiny model, to be damaged."""
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(ORACLE / name, directory / name)
    return directory


def edit_tensors(directory: Path, edit) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_config(directory: Path, edit) -> None:
    config = json.loads((directory / "config.json").read_text())
    edit(config)
    (directory / "config.json").write_text(json.dumps(config))


def into_shards(directory: Path, count: int = 3) -> list[Path]:
    """Rewrite a directory's one file as shards with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, paths, places = sorted(tensors), [], {}
    for number in range(count):
        path = directory / f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name] for name in names[number::count]}, path, metadata={"format": "pt"})
        places |= dict.fromkeys(names[number::count], path.name)
        paths.append(path)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return paths


def rewrite(checkpoint: Path, edit) -> None:
    """The checkpoint again with edited tensors."""
    source = GlobalCheckpoint(checkpoint)
    tensors = {key: source.read(key) for key in source}
    edit(tensors)
    config = json.loads((checkpoint / "model_config.json").read_text())
    write_checkpoint(checkpoint, tensors, config)


def set_config(checkpoint: Path, config: dict) -> None:
    """Another model config, as if it had been written so: with its checksum."""
    (checkpoint / "model_config.json").write_text(json.dumps(config))
    hashes = read_checksums(checkpoint)
    write_checksums(checkpoint, hashes | {"model_config.json": hash_file(checkpoint / "model_config.json")})


def check_one_line(capsys, named: list[str]) -> None:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for text in named:
        assert text in lines[0], lines[0]
