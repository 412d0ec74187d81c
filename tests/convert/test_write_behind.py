"""Pieces are written in other threads while the next is made; errors of either side reach the caller."""

import threading

import pytest

from megatron_jet.convert.write_behind import WRITERS, write_behind

WAIT = 20.0  # seconds until a test that waits for another thread fails


def test_results_keep_the_order_whichever_piece_is_written_first():
    second = threading.Event()

    def write(piece: int) -> int:
        if piece == 0:
            assert second.wait(WAIT)
        if piece == 1:
            second.set()
        return piece * 10

    assert write_behind(iter(range(7)), write) == [0, 10, 20, 30, 40, 50, 60]


def test_pieces_are_made_in_the_callers_thread_while_others_are_written():
    made_next = threading.Event()
    makers, writers = set(), set()

    def pieces():
        for piece in range(4):
            makers.add(threading.get_ident())
            if piece == 1:
                made_next.set()
            yield piece

    def write(piece: int) -> None:
        writers.add(threading.get_ident())
        if piece == 0:
            assert made_next.wait(WAIT), "the second piece waits for the first to be written"

    write_behind(pieces(), write)
    assert makers == {threading.get_ident()} and not makers & writers


def test_no_more_than_the_writers_and_one_that_is_made_are_alive():
    alive, most = 0, 0

    class Piece:
        def __init__(self):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    write_behind((Piece() for _ in range(30)), lambda piece: None)
    assert most <= WRITERS + 1 and alive == 0


@pytest.mark.parametrize("broken", [0, 1, 5])
def test_an_error_while_writing_is_raised_and_the_rest_is_neither_made_nor_written(broken):
    written, before = [], threading.active_count()

    def write(piece: int) -> None:
        if piece == broken:
            raise OSError(f"piece {piece}")
        written.append(piece)

    with pytest.raises(OSError, match=f"^piece {broken}$"):
        write_behind(iter(range(100)), write)
    assert len(written) <= broken + WRITERS
    assert threading.active_count() <= before, "no thread of the pool is left"


def test_an_error_while_making_is_raised_after_what_is_being_written():
    began, finish, written = threading.Event(), threading.Event(), []

    def pieces():
        yield 0
        assert began.wait(WAIT)
        finish.set()
        raise KeyError("made")

    def write(piece: int) -> None:
        began.set()
        assert finish.wait(WAIT)
        written.append(piece)

    with pytest.raises(KeyError, match="made"):
        write_behind(pieces(), write)
    assert written == [0], "the thread that writes has ended"
