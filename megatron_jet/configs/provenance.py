"""Reading provenance.json, in which every launch of a run has a record. The launcher writes it."""

from pathlib import Path
from typing import Any

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json_object


def read_provenance(path: Path) -> dict[str, Any]:
    """What it holds; no launches when there is no such file.

    Raises:
        UserError: it is not what the launcher writes.
    """
    if not path.exists():
        return {"launches": []}
    content = read_json_object(path)
    launches = content.setdefault("launches", [])
    if not isinstance(launches, list) or not all(_is_launch(launch) for launch in launches):
        raise UserError(f"{path}: launches is no list of launches; move the file away, it serves as a record only")
    return content


def _is_launch(launch: Any) -> bool:
    if not isinstance(launch, dict) or not isinstance(launch.get("command", ""), str):
        return False
    stages = launch.get("stages", [])
    return isinstance(stages, list) and all(isinstance(stage, str) for stage in stages)
