"""README.md of exports: architecture, placement and how it was found, scores, command, licence."""

import json
import math
from types import SimpleNamespace

import pytest

from convert.convert_cases import check_one_line, convert, save_qwen2, set_config
from convert.hf_cases import ORACLE
from convert.published import shapes
from megatron_jet.configs.recipes.known_models import jet_nemotron_2b_model
from megatron_jet.configs.results import BeamRound, Measured, PlacementResult, Scores
from megatron_jet.convert.model_card import model_card
from megatron_jet.postnas.export import launch_command

SCORES = Scores(accuracy={"recall": 0.51, "choice": 0.25}, loss={"recall": 1.5, "text": 2.25}, error={"recall": 0.034})


def placement(**changes) -> PlacementResult:
    values = {
        "stage": "placement",
        "inputs_hash": "",
        "full": (14, 19),
        "swa": (20, 21),
        "swa_window": 1152,
        "plan": jet_nemotron_2b_model().layer_plan,
        "objective": "recall",
        "swa_objective": "choice",
        "heat_map": [],
        "all_linear": SCORES,
        "all_full": SCORES,
        "beam": [BeamRound(candidates=[], kept=[(14,), (19,), (3,)]), BeamRound(candidates=[], kept=[(14, 19)])],
        "swa_beam": [],
        "uniform": (7, 21),
        "comparison": [],
        "layer_forwards": 1,
        "layer_forwards_naive": 2,
        "final_losses": {},
        "measured": Measured(seconds=1.0),
    }
    return PlacementResult(**{**values, **changes})


def card(**changes) -> str:
    values = {"command": "python launcher/postnas.py run x", "teacher": "/models/Qwen2.5-1.5B", "recipe": "x"}
    return model_card(jet_nemotron_2b_model(), **{**values, **changes})


def test_a_card_says_what_where_from_and_how():
    text = card(placement=placement(), scores=SCORES, scored_on="the split `heldout`, at most 32 sequences of each set")
    for part in (
        "# Hybrid model from Qwen2.5-1.5B",
        "recipe `x`",
        "needs: torch >= 2.9 and transformers >= 5.6.2;",
        "2 x full attention: 14, 19\n",
        "2 x sliding-window attention of 1152 tokens: 20, 21\n",
        "24 x `jet`: 0, 1, 2,",
        "num_heads=12, head_dim=96",
        "hidden size 1536, MLP 8960, 12 heads, 2 key/value heads of 128, vocabulary 151936",
        f"parameters: {sum(math.prod(shape) for shape in shapes('Jet-Nemotron-2B').values()):,}\n",
        "full attention by beam search (width 3)",
        "accuracy on `recall`",
        "lowest loss on `choice`",
        "evenly spaced full attention would be in 7, 21",
        "licence of the base model: Apache-2.0",
        "command: `python launcher/postnas.py run x`",
        "Scores on the split `heldout`, at most 32 sequences of each set:",
        "| recall | 0.510 ± 0.034 | 1.500 |",
        "| text |  | 2.250 |",
    ):
        assert part in text, part
    assert "/models" not in text, "a path on the machine that made it helps nobody"
    assert "windows" not in card(placement=placement(swa=())), "no window was placed"


@pytest.mark.parametrize(
    ("teacher", "licence"),
    [
        ("hub/Qwen2.5-3B", "Qwen Research License (research only)"),
        ("Qwen2.5-3B-Instruct/", "Qwen Research License (research only)"),
        ("Qwen3-1.7B-Base", "Apache-2.0"),
        ("bundled:tiny", "Apache-2.0"),
        ("my-model", "as the base model's: see the licence of my-model"),
        (None, "not recorded"),
    ],
)
def test_licence_of_the_base_model(teacher, licence):
    assert f"licence of the base model: {licence}" in card(teacher=teacher)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("python /opt/mjet/launcher/postnas.py run tiny seed=2 --output /data/runs/a", "run tiny seed=2"),
        ("python launcher/postnas.py run --output=/data/a tiny 'x.y=[1, 2]'", "run tiny 'x.y=[1, 2]'"),
        ("pytest -q", "run recipe_of_the_run"),
        (None, "run recipe_of_the_run"),
    ],
)
def test_the_command_of_a_run_is_shown_without_places_on_its_machine(tmp_path, command, shown):
    if command is not None:
        (tmp_path / "provenance.json").write_text(
            json.dumps({"launches": [{"command": command}, {"command": "later"}]})
        )
    ctx = SimpleNamespace(run_dir=tmp_path, config=SimpleNamespace(recipe="recipe_of_the_run"))
    assert launch_command(ctx) == f"python launcher/postnas.py {shown}"


def test_a_converted_checkpoint_gets_a_card_too(tmp_path):
    assert convert("import", ORACLE, tmp_path / "ckpt") == 0
    assert convert("export", tmp_path / "ckpt", tmp_path / "out") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    for part in ("1 x full attention: 2", "sliding-window attention of 16 tokens: 1", "2 x `jet`: 0, 3"):
        assert part in text
    assert "does not say how it was found" in text
    assert f"- command: `python tools/convert.py export {tmp_path}/ckpt {tmp_path}/out`" in text
    assert convert("export", tmp_path / "ckpt", tmp_path / "b f", "--dtype", "bf16", "--force") == 0
    shown = f"python tools/convert.py export {tmp_path}/ckpt '{tmp_path}/b f' --dtype bf16 --force"
    assert f"- command: `{shown}`" in (tmp_path / "b f" / "README.md").read_text()
    assert "command" not in model_card(jet_nemotron_2b_model(), command=None)


def test_card_and_licence_of_an_imported_model_come_back(tmp_path):
    save_qwen2(tmp_path / "hf")
    for name in ("README.md", "LICENSE", "NOTICE.txt"):
        (tmp_path / "hf" / name).write_text(f"{name} of the model's makers")
    (tmp_path / "hf" / "training_log.txt").write_text("not part of the model")
    assert convert("import", tmp_path / "hf", tmp_path / "ckpt") == 0
    assert convert("export", tmp_path / "ckpt", tmp_path / "out") == 0
    for name in ("README.md", "LICENSE", "NOTICE.txt"):
        assert (tmp_path / "out" / name).read_text() == f"{name} of the model's makers"
    assert not (tmp_path / "out" / "training_log.txt").exists()
    # Another model under the same roof is not what that card describes.
    config = json.loads((tmp_path / "ckpt" / "model_config.json").read_text())
    set_config(tmp_path / "ckpt", config | {"layer_plan": ["attn", "swa:8"]})
    assert convert("export", tmp_path / "ckpt", tmp_path / "hybrid") == 0
    text = (tmp_path / "hybrid" / "README.md").read_text()
    assert "1 x sliding-window attention of 8 tokens: 1" in text
    assert (tmp_path / "hybrid" / "LICENSE").is_file(), "the licence still holds"


def test_a_tokenizer_that_is_not_there(tmp_path, capsys):
    assert convert("import", ORACLE, tmp_path / "ckpt") == 0
    capsys.readouterr()
    assert convert("export", tmp_path / "ckpt", tmp_path / "out", "--tokenizer", tmp_path / "nowhere") == 1
    check_one_line(capsys, ["nowhere: no such directory"])
    assert convert("export", tmp_path / "ckpt", tmp_path / "out", "--shard-bytes", "0") == 1
    check_one_line(capsys, ["size of a shard is 0 bytes"])
    assert not (tmp_path / "out").exists()
