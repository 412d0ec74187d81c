"""Make the next tensor while the last one is being written."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor


def made_ahead(makers: Iterable[Callable[[], Tensor]]) -> Iterator[Tensor]:
    """What the makers return, in their order, each made by one other thread while its predecessor is in use.

    Reading, checking and writing release Python's lock, so two cores work. There are two tensors at a time, and a third
    for as long as the consumer holds on to the last one. What a maker raises is raised where its tensor is asked for.
    """
    with ThreadPoolExecutor(max_workers=1) as worker:
        following: Future[Tensor] | None = None
        for maker in makers:
            current, following = following, worker.submit(maker)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()
