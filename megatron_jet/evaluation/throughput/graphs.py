"""Decoding as CUDA graphs: one for each new token, recorded once and replayed in order.

A graph has fixed addresses and sizes. The context grows by a token per step, so each step has a graph of its own: keys
are read to their real end, without a mask, and flash attention can split them over the GPU. All graphs share one memory
pool, which is safe because they always replay in the order of recording: the states that step i writes are where step
i + 1 reads them.
"""

from collections.abc import Callable

import torch


class DecodeGraphs:
    """The graphs of `steps` consecutive decoding steps.

    Args:
        step: runs decoding step i on the current stream; must have run before, so that all kernels are compiled.
        steps: how many.
        stream: everything before and between the replays must run on this stream, too.
    """

    def __init__(self, step: Callable[[int], None], steps: int, stream: torch.cuda.Stream) -> None:
        pool = torch.cuda.graph_pool_handle()
        self._graphs = []
        for i in range(steps):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                step(i)
            self._graphs.append(graph)

    def replay(self, steps: int | None = None) -> None:
        """Run the first `steps` steps (all by default)."""
        for graph in self._graphs[:steps]:
            graph.replay()
