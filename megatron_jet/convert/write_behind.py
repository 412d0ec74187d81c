"""Write tensors in other threads while the next one is made."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

# Most of the time of writing goes into pages for the kernel's cache, which one core cannot supply as fast as a disk
# takes them. More than two were no faster on two cores, and each holds a tensor.
WRITERS = 2


def write_behind[Piece, Result](pieces: Iterable[Piece], write: Callable[[Piece], Result]) -> list[Result]:
    """Call `write` for every piece, some at a time, each in another thread; the results in the order of the pieces.

    Pieces are made one after another in the caller's thread, so that what makes them needs no locks. Reading, copying
    and writing release Python's lock, so the cores work side by side. WRITERS pieces are being written while one more
    is made. The first error, of a piece or of its writing, is raised here when no thread writes any more.
    """
    results: list[Result] = []
    running: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(max_workers=WRITERS) as writers:
        for piece in pieces:
            running.append(writers.submit(_take, write, [piece]))
            del piece  # or it would live on while the next is made
            if len(running) == WRITERS:
                results.append(running.popleft().result())
        results.extend(future.result() for future in running)
    return results


def _take[Piece, Result](write: Callable[[Piece], Result], box: list[Piece]) -> Result:
    """Empties the box: the pool lets go of what it was given only after the result is known."""
    return write(box.pop())
