"""Evaluate many layer plans at the price of their distinct prefixes.

Plans that agree in their first layers share the hidden states there. A depth-first walk over the trie of plans runs
every distinct prefix once and keeps at most one hidden state per layer alive.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megatron_jet.configs.layer_plan import LayerPlan

RunLayer = Callable[[int, str, Tensor], Tensor]  # layer index, plan entry, hidden [s, b, h] -> hidden
Leaf = Callable[[int, Tensor], None]  # index of the plan, hidden after its last layer


@dataclass
class PrefixNode:
    """All plans with one prefix: what follows it, and the plans that end here."""

    children: dict[str, "PrefixNode"] = field(default_factory=dict)
    plans: list[int] = field(default_factory=list)


def build_trie(plans: Sequence[LayerPlan]) -> PrefixNode:
    """The trie of `plans`; leaves hold indices into it (equal plans share a leaf)."""
    root = PrefixNode()
    for index, plan in enumerate(plans):
        node = root
        for entry in plan:
            node = node.children.setdefault(entry, PrefixNode())
        node.plans.append(index)
    return root


def count_layers(node: PrefixNode) -> int:
    """Layer forwards of a walk: one per distinct non-empty prefix."""
    return sum(1 + count_layers(child) for child in node.children.values())


def walk(node: PrefixNode, hidden: Tensor, run_layer: RunLayer, leaf: Leaf, depth: int = 0) -> None:
    """Run every prefix below `node` once, and `leaf` for every plan."""
    for plan in node.plans:
        leaf(plan, hidden)
    for entry, child in node.children.items():
        walk(child, run_layer(depth, entry, hidden), run_layer, leaf, depth + 1)
