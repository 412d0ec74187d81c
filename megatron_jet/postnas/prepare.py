"""prepare: the teacher as a Megatron checkpoint, the data as shards. Everything later reads these two."""

import platform
from pathlib import Path
from typing import Any

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_file, hash_json
from megatron_jet.configs.results import Measured, PrepareResult
from megatron_jet.configs.teacher_source import resolve_teacher, tokenizer_directory
from megatron_jet.convert.hf_import import import_hf
from megatron_jet.data.checks import check_data
from megatron_jet.data.index import read_index
from megatron_jet.data.prepare import prepare_bundled
from megatron_jet.postnas.processes import on_main
from megatron_jet.postnas.stage import StageContext

BUNDLED_DATA = "bundled"


class PrepareStage:
    """See the module's docstring."""

    name = "prepare"
    kept = ()

    def inputs(self, ctx: StageContext) -> dict[str, Any]:
        data = ctx.config.data.path
        return {
            "teacher": hash_directory(resolve_teacher(ctx.config.teacher)),
            "tokenizer": tokenizer_hash(tokenizer_directory(ctx.config.teacher)),
            # The bundled data holds the standard library of whatever Python runs this.
            "data": [data, platform.python_version()] if data == BUNDLED_DATA else data_index_hash(Path(data)),
        }

    def run(self, ctx: StageContext, inputs_hash: str) -> PrepareResult:
        return on_main(lambda: self._run(ctx, inputs_hash))

    def _run(self, ctx: StageContext, inputs_hash: str) -> PrepareResult:
        source = resolve_teacher(ctx.config.teacher)
        checkpoint = ctx.run_dir / "prepared" / "teacher"
        ctx.status.phase("importing the teacher")
        model = import_hf(source, checkpoint, force=True)
        data = self._data(ctx)
        index = read_index(data)
        check_data(ctx.config, index, model, tokenizer_directory(ctx.config.teacher))
        return PrepareResult(
            stage=self.name,
            inputs_hash=inputs_hash,
            teacher_path=ctx.config.teacher.path,
            teacher_checkpoint=ctx.relative(checkpoint),
            teacher_config=model.to_dict(),
            data_path=ctx.relative(data),
            tokenizer_path=ctx.config.teacher.tokenizer or ctx.config.teacher.path,
            teacher_hash=hash_directory(source),
            data_index_hash=data_index_hash(data),
            sources=sorted(index.sources),
            measured=Measured(seconds=ctx.status.seconds),
        )

    def _data(self, ctx: StageContext) -> Path:
        """The prepared directory: the user's, or the tiny recipe's made inside the run."""
        if ctx.config.data.path != BUNDLED_DATA:
            return Path(ctx.config.data.path).resolve()
        out = ctx.run_dir / "prepared" / "data"
        ctx.status.phase("preparing data")
        prepare_bundled(out, tokenizer_directory(ctx.config.teacher))
        return out


def hash_directory(directory: Path) -> str:
    """Of a Hugging Face model: config and every weight file."""
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    return hash_json({path.name: hash_file(path) for path in files})


def tokenizer_hash(directory: Path) -> str:
    """Of the tokenizer's files."""
    return hash_json({path.name: hash_file(path) for path in sorted(directory.glob("tokenizer*"))})


def data_index_hash(directory: Path) -> str:
    """Of a prepared directory's index, which holds the checksum of every shard."""
    if not (directory / "index.json").is_file():
        raise UserError(
            f"data.path={directory}: no index.json there; prepare it with tools/prepare_data.py, or use 'bundled'"
        )
    return hash_file(directory / "index.json")


PREPARE = PrepareStage()
