"""Threads take turns; a process that was forked meanwhile has none to wait for."""

from __future__ import annotations

import os
import signal
from threading import Event, Thread

import pytest

from lora_fx.graph.one_thread import one_at_a_time


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_does_not_wait_for_a_thread_of_its_parent() -> None:
    taken, done = Event(), Event()

    @one_at_a_time
    def hold() -> None:
        taken.set()
        done.wait()

    thread = Thread(target=hold)
    thread.start()
    taken.wait()
    child = os.fork()
    if not child:
        signal.alarm(5)  # the end of one that waits
        os._exit(one_at_a_time(lambda: 7)())
    status = os.waitpid(child, 0)[1]
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 7
