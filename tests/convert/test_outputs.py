"""What may be replaced, where an output may go, and what its files look like to others."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from convert.convert_cases import check_one_line, convert, copy_oracle, same, visible
from megatron_jet.convert.companions import copy_companions
from megatron_jet.model.param_table import param_table


@pytest.fixture
def oracle(tmp_path) -> Path:
    return copy_oracle(tmp_path / "hf")


def test_force_removes_earlier_outputs_and_nothing_else(oracle, tmp_path, capsys):
    assert convert("import", oracle, tmp_path / "ckpt") == 0
    precious = tmp_path / "precious"
    precious.mkdir()
    assert convert("export", tmp_path / "ckpt", precious, "--force") == 0, "an empty directory may be used"
    shutil.rmtree(precious)
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("text")
    capsys.readouterr()
    for arguments, named in [
        (("export", tmp_path / "ckpt", precious), "not an earlier output"),
        (("import", oracle, precious), "not an earlier output"),
        (("import", oracle, tmp_path / "file"), "not an earlier output"),
        (("export", tmp_path / "ckpt", tmp_path / "ckpt"), "would replace the input"),
        (("import", oracle, tmp_path), "would replace the input"),
    ]:
        assert convert(*arguments, "--force") == 1
        check_one_line(capsys, [named])
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert visible(tmp_path) == {"hf", "ckpt", "precious", "file"}
    assert same(oracle, oracle)


def tree(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory; None for a folder."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def add(name: str, text: str = "mine"):
    def change(directory: Path) -> None:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)

    return change


def web_app(directory: Path) -> None:
    shutil.rmtree(directory)
    add("config.json", '{"name": "my web app"}')(directory)
    add("src/main.js")(directory)


def as_links(directory: Path) -> None:
    """As Hugging Face's cache keeps a model."""
    shutil.move(directory / "model.safetensors", directory.parent / "blob")
    (directory / "model.safetensors").symlink_to("../blob")


FOREIGN = {
    "web app": ("export", web_app),
    "config of no model": ("export", add("config.json", '{"name": "my web app"}')),
    "model type of others": ("export", add("config.json", '{"model_type": ["gpt2"]}')),
    "config as a list": ("export", add("config.json", "[]")),
    "no weights": ("export", lambda d: (d / "model.safetensors").unlink()),
    "a file of the user's": ("export", add("notes.py")),
    "a folder of the user's": ("export", add("figures/plot.svg")),
    "a cache of links": ("export", as_links),
    "metadata of something else": ("import", add("metadata.json", '{"title": "song"}')),
    "results beside a checkpoint": ("import", add("results.json")),
    "results inside a checkpoint": ("import", add("hf/thesis.tex")),
    "a trained checkpoint": ("import", lambda d: shutil.rmtree(d / "hf")),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_force_keeps_what_may_not_be_an_earlier_output(case, oracle, tmp_path, capsys):
    command, change = FOREIGN[case]
    assert convert("import", oracle, tmp_path / "ckpt") == 0
    source, out = (oracle, tmp_path / "ckpt") if command == "import" else (tmp_path / "ckpt", tmp_path / "out")
    if command == "export":
        assert convert("export", source, out, "--shard-bytes", 1 << 30) == 0
    assert convert(command, source, out, "--force") == 0, "untouched, it is an earlier output"
    change(out)
    before = tree(out)
    capsys.readouterr()
    assert convert(command, source, out, "--force") == 1
    check_one_line(capsys, ["is not an earlier output", "--force replaces nothing else"])
    assert tree(out) == before


def test_an_export_in_shards_with_a_tokenizer_is_an_earlier_output(oracle, tmp_path):
    for name in ("tokenizer.json", "merges.txt", "LICENSE", "tokenizer.model"):
        (oracle / name).write_text(name)
    assert convert("import", oracle, tmp_path / "ckpt") == 0
    for _ in range(2):
        assert convert("export", tmp_path / "ckpt", tmp_path / "out", "--shard-bytes", 60_000, "--force") == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2


def test_an_export_goes_nowhere_inside_its_checkpoint(oracle, tmp_path, capsys):
    assert convert("import", oracle, tmp_path / "ckpt") == 0
    before = tree(tmp_path / "ckpt")
    for out in ("hf", "out", "hf/../x/y"):
        capsys.readouterr()
        assert convert("export", tmp_path / "ckpt", tmp_path / "ckpt" / out, "--force") == 1
        check_one_line(capsys, ["inside the checkpoint"])
    assert tree(tmp_path / "ckpt") == before


@pytest.mark.parametrize("there", [True, False])
def test_a_link_as_output_stays_and_leads_to_the_new_output(there, oracle, tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to("disk/out")
    assert convert("import", oracle, tmp_path / "ckpt") == 0
    if there:
        assert convert("export", tmp_path / "ckpt", link) == 0
    assert convert("export", tmp_path / "ckpt", link, *["--force"] * there) == 0
    assert link.is_symlink() and same(tmp_path / "disk" / "out", oracle)
    assert set(os.listdir(tmp_path)) == {"hf", "ckpt", "disk", "out"} and os.listdir(tmp_path / "disk") == ["out"]


@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077])
def test_outputs_follow_the_umask(mask, oracle, tmp_path):
    before = os.umask(mask)
    try:
        assert convert("import", oracle, tmp_path / "ckpt") == 0
        assert convert("export", tmp_path / "ckpt", tmp_path / "out") == 0
    finally:
        os.umask(before)
    for top in (tmp_path / "ckpt", tmp_path / "out"):
        assert stat.S_IMODE(top.stat().st_mode) == 0o777 & ~mask
        for path in top.rglob("*"):
            expected = (0o777 if path.is_dir() else 0o666) & ~mask
            assert stat.S_IMODE(path.stat().st_mode) == expected, path


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("command", ["import", "export"])
def test_two_writers_of_one_output(command, force, oracle, tmp_path, monkeypatch, capsys):
    """The second is refused while the first writes, whose files it would sweep away."""
    assert convert("import", oracle, tmp_path / "ckpt") == 0
    source = {"import": oracle, "export": tmp_path / "ckpt"}[command]
    module = {"import": "hf_import", "export": "hf_export"}[command]
    real, inside, codes = copy_companions, [], []

    def second_meanwhile(*arguments, **options):
        if not inside:
            inside.append(True)
            capsys.readouterr()
            codes.append(convert(command, source, tmp_path / "out", *force))
            check_one_line(capsys, ["out", f"process {os.getpid()} on", "is working in this directory"])
        return real(*arguments, **options)

    monkeypatch.setattr(f"megatron_jet.convert.{module}.copy_companions", second_meanwhile)
    assert convert(command, source, tmp_path / "out", *force) == 0
    assert codes == [1] and visible(tmp_path) == {"hf", "ckpt", "out"}
    assert not list(tmp_path.glob(".out*"))
    if command == "export":
        assert same(tmp_path / "out", oracle)


def test_an_output_made_meanwhile_is_not_replaced(oracle, tmp_path, monkeypatch, capsys):
    """Between the first look and the moment when nobody else can make it."""
    monkeypatch.setattr("megatron_jet.convert.hf_import.param_table", lambda model: made() or param_table(model))

    def made() -> None:
        (tmp_path / "ckpt").mkdir()
        (tmp_path / "ckpt" / "mine").touch()

    assert convert("import", oracle, tmp_path / "ckpt") == 1
    check_one_line(capsys, ["ckpt exists; choose another output"])
    assert os.listdir(tmp_path / "ckpt") == ["mine"]


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "LICENSE"])
def test_a_checkpoint_of_a_stranger_puts_no_file_of_its_readers_into_an_export(name, oracle, tmp_path, capsys):
    (oracle / name).write_text("{}")
    assert convert("import", oracle, tmp_path / "ckpt") == 0
    (tmp_path / "secret").write_text("secret")
    kept = tmp_path / "ckpt" / "hf" / name
    (tmp_path / "ckpt" / "checksums.json").unlink()  # a stranger writes those that fit
    kept.unlink()
    kept.symlink_to("../../secret")
    capsys.readouterr()
    assert convert("export", tmp_path / "ckpt", tmp_path / "out") == 1
    check_one_line(capsys, [f"hf/{name} is a link that leads out of", "put the file itself there"])
    assert not (tmp_path / "out").exists()
    kept.unlink()
    (tmp_path / "ckpt" / "hf" / "inside").write_text("{}")
    kept.symlink_to("inside")
    assert convert("export", tmp_path / "ckpt", tmp_path / "out") == 0
