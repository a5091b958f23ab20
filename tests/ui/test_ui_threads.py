"""Threads of the chat that cannot start raise an error instead of blocking forever."""

from __future__ import annotations

from threading import Event

import pytest
from support.threads import FAILURES, at_most, watched_threads

from specchat.errors import AllocationError
from specchat.ui.loading import BackgroundLoad
from specchat.ui.worker import Worker


@pytest.mark.parametrize("failure", FAILURES)
def test_load_fails_if_its_thread_cannot_start(failure: str):
    load = BackgroundLoad(lambda _: pytest.fail("it runs"))
    with at_most(60), watched_threads(1, failure) as threads:
        assert load.wait(60)
        for _ in range(2):
            with pytest.raises(AllocationError):
                load.result()
    assert load.is_done and isinstance(load.error, AllocationError)
    assert threads.count == 1 and not threads.num_running


@pytest.mark.parametrize("failure", FAILURES)
def test_answer_fails_if_its_thread_cannot_start(failure: str):
    def records():
        yield pytest.fail("it runs")

    worker = Worker(records(), Event())
    with at_most(60), watched_threads(1, failure) as threads, pytest.raises(AllocationError), worker:
        pytest.fail("there is nothing to follow")
    assert threads.count == 1 and not threads.num_running
