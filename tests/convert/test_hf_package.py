"""What ships with an export: the code stands alone, and directories that are no model are refused in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_relative_imports

from convert.hf_cases import ORACLE, config_dict, random_model, random_tokens
from megatron_jet.configs.errors import UserError
from megatron_jet.convert.companions import MODELING, modeling_files
from megatron_jet.convert.hf_package import auto_map, load_for_causal_lm, write_modeling_code

KERNELS = Path(__file__).parents[2] / "kernels" / "jet_kernels"
SHIPPED_KERNELS = {
    "gated_delta_rule.py": "gated_delta_rule",
    "gla_recurrence.py": "gla",
    "dynamic_conv.py": "dynamic_conv",
    "short_conv.py": "short_conv",
    "norm_gate.py": "norm_gate",
}

# Runs where this project is not importable, as on a user's machine.
USER_SCRIPT = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
result = {}
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    assert not any(name.startswith(("megatron_jet.", "jet_kernels.")) for name in sys.modules)
    prompts = load_file(directory + "/prompts.safetensors")
    greedy = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    out = model.generate(prompts["tokens"], attention_mask=prompts["mask"], **greedy)
    base = AutoModel.from_pretrained(directory, trust_remote_code=True)
    with torch.no_grad():
        hidden = base(prompts["tokens"], attention_mask=prompts["mask"]).last_hidden_state
        logits = model(prompts["tokens"], attention_mask=prompts["mask"]).logits
    assert torch.equal(model.lm_head(hidden), logits)
    save_file({"out": out}, directory + "/generated.safetensors")
    model_type = AutoConfig.from_pretrained(directory, trust_remote_code=True).model_type
    result[directory] = [type(model).__name__, type(base).__name__, model_type]
print(json.dumps(result))
"""


def export(model, directory: Path, model_type: str) -> Path:
    """A directory as the exporter leaves it, and the prompts for the user script: rows of 9 and of 3 tokens."""
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "auto_map": auto_map(model_type)}))
    write_modeling_code(directory)
    tokens, mask = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    tokens[1, :6], mask[1, :6] = 0, 0
    save_file({"tokens": tokens, "mask": mask}, directory / "prompts.safetensors")
    return directory


def test_the_modeling_file_imports_every_other_one():
    """transformers 5.6 to 5.10 copy from a local directory what that file imports, and nothing that those need."""
    named = set(get_relative_imports(MODELING / "modeling_megatron_jet.py"))
    assert named == {path.stem for path in modeling_files()} - {"modeling_megatron_jet"}


def test_an_export_loads_and_generates_without_this_project(tmp_path):
    superset = random_model(dtype=torch.float32)
    published = load_for_causal_lm(ORACLE)
    directories = [
        export(superset, tmp_path / "superset model", "megatron_jet"),
        export(published, tmp_path / "published", "jet_nemotron"),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    # -P keeps this tree off the path; an editable install would still be on it, so its packages are blocked.
    script = "import sys; sys.modules['megatron_jet'] = sys.modules['jet_kernels'] = None" + USER_SCRIPT
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *map(str, directories)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result[str(directories[0])] == ["MegatronJetForCausalLM", "MegatronJetModel", "megatron_jet"]
    assert result[str(directories[1])] == ["JetNemotronForCausalLM", "JetNemotronModel", "jet_nemotron"]
    for directory, model in zip(directories, (superset, published)):
        found = load_file(directory / "generated.safetensors")["out"]
        for row, start in ((0, 0), (1, 6)):
            prompt = random_tokens(2, 9)[row : row + 1, start:]
            mask = torch.ones_like(prompt)
            alone = model.generate(
                prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
            )
            assert torch.equal(found[row, start:], alone[0])


def test_shipped_recurrences_are_the_kernels_references(tmp_path):
    written = {path.name: path for path in write_modeling_code(tmp_path)}
    for name, kernel in SHIPPED_KERNELS.items():
        assert written[name].read_text() == (KERNELS / kernel / "reference.py").read_text()
    assert {"configuration_megatron_jet.py", "modeling_megatron_jet.py", "cache.py", "jet_block.py"} <= written.keys()
    assert not any(path.is_symlink() for path in written.values())
    assert not any("jet_kernels" in line for path in written.values() for line in path.read_text().splitlines())


def test_auto_map_of_an_unknown_type():
    with pytest.raises(UserError, match="'qwen2' has no modeling code here"):
        auto_map("qwen2")


def test_loading_in_tree(tmp_path):
    model = random_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = load_for_causal_lm(tmp_path)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(random_tokens(1, 9)).logits, model(random_tokens(1, 9)).logits)
    assert load_for_causal_lm(tmp_path, dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


@pytest.fixture
def saved(tmp_path):
    random_model(config_dict(layer_types=["jet"]), dtype=torch.float32).save_pretrained(tmp_path)
    return tmp_path


def change_weights(directory: Path, change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def change_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


A_LOG = "model.layers.0.self_attn.A_log"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: change_weights(d, lambda w: w.pop(A_LOG)), f"1 missing tensors, such as {A_LOG}"),
        (lambda d: change_weights(d, lambda w: w.update(more=torch.zeros(1))), "1 unexpected tensors, such as more"),
        (lambda d: change_weights(d, lambda w: w.update({A_LOG: torch.zeros(5)})), r"A_log has shape \[5\], .* \[2\]"),
        (lambda d: os.truncate(d / "model.safetensors", 900), "."),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
        (lambda d: change_config(d, model_type="gpt_unknown"), "model_type 'gpt_unknown' is neither ours"),
        (lambda d: change_config(d, layer_types=["jet", "jet"]), "layer_types has 2 entries for 1 layers"),
        (lambda d: (d / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda d: (d / "config.json").unlink(), "no config.json there"),
    ],
)
def test_directories_that_are_no_model_give_one_clear_line(saved, spoil, message):
    spoil(saved)
    with pytest.raises(UserError, match=message) as caught:
        load_for_causal_lm(saved)
    assert "\n" not in str(caught.value) and str(saved) in str(caught.value)
