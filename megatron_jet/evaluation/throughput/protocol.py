"""The paper's protocol: iterations of which the first are dropped, medians, and models interleaved in one run."""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from megatron_jet.evaluation.throughput.session import Load, Session, Timing


@dataclass(frozen=True)
class Rates:
    """Medians over the iterations that count, over the whole batch.

    Attributes:
        prefill: tokens per second.
        generation: tokens per second.
        spread: (largest - smallest) / median of the decoding times.
    """

    prefill: float
    generation: float
    spread: float


def schedule(sessions: int, iterations: int, turn: int) -> list[tuple[int, int]]:
    """Who runs when: (session, iteration), in turns of `turn` iterations, there and back (A B B A A B ...).

    So a machine that slowly gets faster or slower does it to all of them alike.
    """
    order, sides = [], list(range(sessions))
    for begin in range(0, iterations, turn):
        block = range(begin, min(begin + turn, iterations))
        order += [(side, iteration) for side in sides for iteration in block]
        sides.reverse()
    return order


def run_interleaved(sessions: Sequence[Session], iterations: int, turn: int | None = None) -> list[list[Timing]]:
    """Time all sessions. Every session sees the same prompts.

    Args:
        sessions: not open yet.
        iterations: of each, those that will be dropped included.
        turn: iterations of a session before the next one's turn; it is open during its turns only, so that each can
            have the whole memory of the device. None: all are open together and take turns after every iteration.

    Returns:
        Timings of each session, in the order of iterations.
    """
    timings: list[list[Timing]] = [[] for _ in sessions]
    with ExitStack() as stack:
        together = turn is None
        if together:
            for session in sessions:
                stack.enter_context(session)
        current = None
        for side, iteration in schedule(len(sessions), iterations, turn or 1):
            if not together and current is not sessions[side]:
                stack.close()
                current = stack.enter_context(sessions[side])
            timings[side].append(sessions[side].run(seed=iteration))
    return timings


def rates(timings: Sequence[Timing], load: Load, dropped: int) -> Rates:
    """Medians of the timings after the first `dropped`.

    Raises:
        ValueError: nothing is left.
    """
    kept = timings[dropped:]
    if not kept:
        raise ValueError(f"{len(timings)} iterations with the first {dropped} dropped leave none")
    decode = [timing.decode for timing in kept]
    median = statistics.median(decode)
    return Rates(
        prefill=load.batch_size * load.context / statistics.median(timing.prefill for timing in kept),
        generation=load.batch_size * load.new_tokens / median,
        spread=(max(decode) - min(decode)) / median,
    )
