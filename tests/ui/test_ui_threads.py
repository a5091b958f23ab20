"""Threads of the chat that cannot start: an error where their work is waited for, not a wait without end."""

from __future__ import annotations

from threading import Event

import pytest
from support.threads import FAILURES, at_most, watched_threads

from specchat.errors import AllocationError
from specchat.ui.loading import BackgroundLoad
from specchat.ui.worker import Worker


@pytest.mark.parametrize("failure", FAILURES)
def test_a_load_that_cannot_start_has_failed(failure: str):
    load = BackgroundLoad(lambda _: pytest.fail("it runs"))
    with at_most(60), watched_threads(1, failure) as threads:
        assert load.wait(60)
        for _ in range(2):
            with pytest.raises(AllocationError):
                load.result()
    assert load.is_done and isinstance(load.error, AllocationError)
    assert threads.count == 1 and not threads.num_running


@pytest.mark.parametrize("failure", FAILURES)
def test_an_answer_that_cannot_start_is_an_error(failure: str):
    def records():
        yield pytest.fail("it runs")

    worker = Worker(records(), Event())
    with at_most(60), watched_threads(1, failure) as threads, pytest.raises(AllocationError), worker:
        pytest.fail("there is nothing to follow")
    assert threads.count == 1 and not threads.num_running
