"""A thread runs, or whoever starts it learns that it never will."""

import sys
import threading
import time
from collections.abc import Callable

import pytest
from support.threads import FAILURES, at_most, watched_threads

from specchat.errors import AllocationError, is_lack_of_memory
from specchat.threads import Thread, run_within


def test_a_thread_runs_until_its_function_ends():
    begun, end = threading.Event(), threading.Event()

    def run():
        begun.set()
        end.wait()

    thread = Thread(run)
    assert not thread.is_alive
    with at_most(60), watched_threads() as threads:
        thread.join()  # nothing to wait for
        thread.start()
        assert begun.wait(60) and thread.is_alive and threads.num_running == 1
        end.set()
        for _ in range(2):
            thread.join()
            assert not thread.is_alive and threads.num_running == 0


@pytest.mark.parametrize("failure", FAILURES)
def test_a_thread_that_never_begins_is_an_error(failure: str):
    thread = Thread(lambda: pytest.fail("it runs"))
    with at_most(60), watched_threads(1, failure) as threads:
        with pytest.raises(AllocationError, match="thread") as caught:
            thread.start()
        thread.join()
    assert caught.value.hint and threads.count == 1
    assert not thread.is_alive and threads.num_running == 0


def test_a_function_within_its_time():
    def fail():
        raise KeyError("x")

    assert run_within(60, lambda: 3) == 3 and run_within(60, lambda: None) is None
    with pytest.raises(KeyError, match="x"):
        run_within(60, fail)


def spin():
    while True:
        pass


@pytest.mark.parametrize("run", [spin, lambda: time.sleep(60)], ids=["Python", "library"])
def test_a_function_beyond_its_time_is_left_behind(run: Callable[[], None]):
    before = set(sys._current_frames())
    with at_most(30):
        with pytest.raises(TimeoutError):
            run_within(0.1, run)
        while run is spin and set(sys._current_frames()) - before:
            time.sleep(0.01)


def test_a_thread_is_joined_for_a_time_at_most():
    end = threading.Event()
    thread = Thread(end.wait)
    assert thread.join_within(0)
    thread.start()
    with at_most(60):
        assert not thread.join_within(0.05)
        end.set()
        assert thread.join_within(60)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("shapes differ"), False),
        (OSError(2, "No such file"), False),
    ],
    ids=str,
)
def test_what_counts_as_lack_of_memory(error: BaseException, expected: bool):
    assert is_lack_of_memory(error) == expected


def test_a_gpu_s_memory_counts_too():
    import torch

    assert is_lack_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
