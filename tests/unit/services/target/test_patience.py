from __future__ import annotations

import threading
import time

from waiting import WAIT_S, wait_until

from services.target.patience import Patience, Wait


def watchers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "patience"}


def test_wait_is_over_only_while_a_message_is_due_and_late() -> None:
    cancelled: list[int] = []
    wait = Wait(lambda: cancelled.append(1))
    wait.look(time.monotonic() + 1e6)
    wait.begin(10.0)
    wait.look(time.monotonic() + 9.0)
    wait.end()
    wait.look(time.monotonic() + 1e6)
    assert (wait.is_over, cancelled) == (False, []), "what the reader does with a message takes no patience"
    wait.begin(10.0)
    wait.look(time.monotonic() + 11.0)
    assert (wait.is_over, cancelled) == (True, [1])


def test_only_the_call_that_stands_still_is_cancelled_and_the_thread_ends_with_the_last_one() -> None:
    patience, slow, fast = Patience(), threading.Event(), threading.Event()
    before = watchers()  # of clients of earlier tests; they end at their own time
    with patience.watch(slow.set) as stuck, patience.watch(fast.set) as lively:
        stuck.begin(0.05)
        lively.begin(1000.0)
        assert slow.wait(WAIT_S)
        assert stuck.is_over
        assert not lively.is_over
        assert not fast.is_set()
        assert len(watchers() - before) == 1
    wait_until(lambda: watchers() <= before, "the end of the thread")
    again = threading.Event()
    with patience.watch(again.set) as wait:
        wait.begin(0.0)
        assert again.wait(WAIT_S)
