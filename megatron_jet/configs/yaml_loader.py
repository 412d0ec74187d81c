"""YAML with an end: no key twice, no aliases that multiply, no endless nesting."""

from typing import Any

import yaml

from megatron_jet.configs.files import MAX_NESTING

MAX_NODES = 100_000  # with every alias written out


class RefusedYaml(yaml.YAMLError):
    """It may be YAML, but it says something twice or has no bounds."""


class BoundedLoader(yaml.SafeLoader):
    """SafeLoader that refuses keys given twice, more than MAX_NODES values with aliases written out, an alias inside of
    what it names, and more than MAX_NESTING levels."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # id of a finished node -> values in it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node of the tree, counted."""
        start = self.peek_event().start_mark
        alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise RefusedYaml(f"nested more than {MAX_NESTING} levels deep in line {start.line + 1}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if alias and id(node) not in self._sizes:
            raise RefusedYaml(f"the alias in line {start.line + 1} stands inside of what it names")
        size = self._sizes.setdefault(id(node), 1 + sum(self._sizes[id(child)] for child in _children(node)))
        if size > MAX_NODES:
            raise RefusedYaml(f"more than {MAX_NODES} values up to line {start.line + 1}, aliases written out")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Keys that stand there twice are an error; YAML would take the last one."""
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                continue
            name = self.construct_object(key)
            if name in seen:
                raise RefusedYaml(f"'{key.value}' is given twice, again in line {key.start_mark.line + 1}")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _children(node: yaml.Node | None) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [item for pair in node.value for item in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def parse_yaml(text: str, loader: type[BoundedLoader] = BoundedLoader) -> Any:
    """The value that a text describes. Raises YAMLError, of which RefusedYaml is one kind."""
    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError:
        raise
    except Exception as error:  # the constructors of dates and numbers raise whatever Python's own do
        raise yaml.YAMLError(f"a value that is none of its type: {error}") from None
