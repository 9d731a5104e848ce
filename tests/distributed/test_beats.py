"""What an observer concludes from the beats of all ranks."""

import os
from dataclasses import replace

import pytest

from nai_xl.distributed.beats import DONE, STOPPED, Beat, Observer

MINUTE = 60.0
NOBODY = 2**22 + 1  # above the largest process id that Linux gives


def beat(rank: int, number: int = 0, **changes: object) -> Beat:
    where = {"host": f"node{rank}", "pid": 100 + rank, "space": "pid:[1]"}
    return Beat(**{**where, "number": number, "what": f"training step {rank + 1}", **changes})  # type: ignore[arg-type]


def watched(world: int = 3, rank: int = 0) -> Observer:
    observer = Observer(rank, timeout=MINUTE, read=0.0)
    observer.hear({other: beat(other) for other in range(world)}, 0.0)
    return observer


def test_nothing_is_said_while_all_are_well() -> None:
    observer = watched()
    for second in range(1, 1000):
        observer.hear({rank: beat(rank, second, phase=second) for rank in range(3)}, float(second))
        assert observer.verdict(second + 0.5) is None


def test_a_rank_that_falls_silent_is_named_with_what_it_did_when_the_timeout_is_over() -> None:
    observer = watched()
    for second in range(1, 61):
        observer.hear({0: beat(0, second, phase=second), 1: beat(1), 2: beat(2, second, phase=second)}, float(second))
        assert observer.verdict(second + 0.5) is None
    observer.hear({0: beat(0, 61), 1: beat(1), 2: beat(2, 61)}, 61.0)
    found = observer.verdict(61.5)
    assert found and found.certain and not found.stopped and found.frozen == ()
    words = "rank 1 (node1, pid 101) has not answered for 1 minutes, it was: training step 2 (distributed.timeout=1)"
    assert found.message == words


def test_the_first_rank_keeps_the_beats_so_it_is_meant_when_none_can_be_read() -> None:
    observer = watched(rank=2)
    assert observer.verdict(60.0) is None
    found = observer.verdict(60.5)
    assert found and "rank 0 (node0" in found.message and "rank 1" not in found.message


def test_a_rank_that_holds_up_all_others_is_named_and_those_that_wait_for_it_are_not() -> None:
    observer = watched()
    stuck = {0: beat(0, phase=8, ticks=1), 1: beat(1, phase=8), 2: beat(2, phase=9, waiting=True)}
    for second in range(1, 62):
        observer.hear({rank: replace(one, number=second) for rank, one in stuck.items()}, float(second))
        assert observer.verdict(second + 0.5) is None
    observer.hear({rank: replace(one, number=62) for rank, one in stuck.items()}, 62.0)
    found = observer.verdict(62.0)
    assert found and found.message.startswith("rank 1 (node1, pid 101) has not made progress for 1 minutes")
    assert "rank 0" not in found.message and "rank 2" not in found.message


def test_one_rank_that_makes_progress_keeps_the_others_waiting_for_as_long_as_it_needs() -> None:
    observer = watched()
    for second in range(1, 400):
        waits = {rank: beat(rank, second, waiting=True) for rank in (1, 2)}
        observer.hear({0: beat(0, second, beats=second // 50), **waits}, float(second))
        assert observer.verdict(float(second)) is None


def test_a_process_that_was_frozen_itself_blames_no_one() -> None:
    observer = watched()
    assert observer.verdict(1000.0)
    observer.forgive(1000.0)
    assert observer.verdict(1059.0) is None


@pytest.mark.parametrize(("here", "told"), [(True, True), (False, False)], ids=["on this machine", "elsewhere"])
def test_a_process_of_this_machine_that_is_gone_has_died(here: bool, told: bool) -> None:
    observer = watched()
    neighbour = {"host": "node0" if here else "node1", "pid": NOBODY}
    observer.hear({0: beat(0, 1), 1: beat(1, 1, **neighbour), 2: beat(2, 1, host="node0", pid=os.getpid())}, 1.0)
    assert observer.verdict(1.0) is None  # it may have ended well a moment ago, and its last word is on the way
    found = observer.verdict(2.5)
    assert bool(found) == told
    if found:
        assert found.message == f"rank 1 (node0, pid {NOBODY}) has died; it was: training step 2" and not found.certain
    observer.hear({1: beat(1, 2, **neighbour, end=DONE)}, 3.0)
    assert observer.verdict(4.5) is None


def test_the_last_word_of_another_rank_is_passed_on() -> None:
    observer = watched()
    observer.hear({2: beat(2, 1, end="failed: disk full")}, 1.0)
    found = observer.verdict(1.0)
    assert found and found.message == "rank 2 (node2, pid 102) failed: disk full; it was: training step 3"
    observer = watched()
    observer.hear({2: beat(2, 1, end=STOPPED)}, 1.0)
    found = observer.verdict(1.0)
    assert found and found.stopped


def test_it_is_known_when_another_rank_was_asked_to_stop() -> None:
    observer = watched()
    observer.hear({0: beat(0, 1, asked=True)}, 1.0)
    assert not observer.asked()
    observer.hear({1: beat(1, 1, asked=True)}, 1.0)
    assert observer.asked()
