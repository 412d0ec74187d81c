"""A layer with several mixers of which one runs: the supernet's layer, and a search candidate's."""

from collections.abc import Mapping

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, sharded_state_dict_default
from torch import Tensor, nn

from megatron_jet.configs.layer_plan import split_entry


class ChoiceMixer(MegatronModule):
    """Named alternative mixers ("paths") of one layer.

    Only the selected path runs, so the others cost nothing and their parameters get no gradient. A path "swa:W" has no
    weights: it runs the "attn" path's with a window.

    Args:
        names: the choices of this layer, for example ("attn", "gla", "swa:64").
        selected: the path that runs until `select` is called.
        paths: spec of every path that has weights.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        *,
        names: tuple[str, ...],
        selected: str,
        paths: Mapping[str, ModuleSpec],
        pg_collection=None,
        **kwargs,
    ):
        super().__init__(config)
        self.tp_group = pg_collection.tp
        self.names = names
        kwargs |= {"config": config, "layer_number": layer_number, "pg_collection": pg_collection}
        self.paths = nn.ModuleDict({name: build_module(spec, **kwargs) for name, spec in paths.items()})
        self.select(selected)

    def select(self, name: str) -> None:
        """Run this path from now on."""
        if name not in self.names:
            raise ValueError(f"layer has no path '{name}'; it has {', '.join(self.names)}")
        self.selected = name

    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Run the selected path: [s(/tp), b, h] -> [s(/tp), b, h] and its bias."""
        kind, window = split_entry(self.selected)
        if kind == "swa":
            return self.paths["attn"](hidden_states, window=window, **kwargs)
        return self.paths[self.selected](hidden_states, **kwargs)

    def idle_parameters(self) -> list[nn.Parameter]:
        """Parameters of the paths that do not run."""
        active = weight_path(self.selected)
        return [p for name, path in self.paths.items() if name != active for p in path.parameters()]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """All paths, each under `paths.<name>.`."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = {}
        for name, path in self.paths.items():
            state |= sharded_state_dict_default(
                path, f"{prefix}paths.{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return state


def weight_path(entry: str) -> str:
    """The path whose weights a plan entry uses: a window runs full attention's."""
    return "attn" if split_entry(entry)[0] == "swa" else entry


def choice_spec(names: tuple[str, ...], selected: str, paths: Mapping[str, ModuleSpec]) -> ModuleSpec:
    """Spec of a ChoiceMixer."""
    return ModuleSpec(module=ChoiceMixer, params={"names": names, "selected": selected, "paths": dict(paths)})
