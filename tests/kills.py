"""A run in a child process that is killed at a chosen step, as a power cut would."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from pathprune import restartable

EVENTS = ("fsync", "replace", "unlink", "mkdir")  # what changes the disk, besides writing


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(run: Callable[[], Any]) -> bool:
    """Runs in a child process; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def killed_at(count: int, run: Callable[[], Any]) -> bool:
    """Runs in a child process that is killed when it is about to do its ``count``-th write, sync or rename."""

    def watched_run() -> None:
        left = count

        def step() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                die()

        def watched(function):
            def call(*arguments, **named):
                step()
                return function(*arguments, **named)

            return call

        for name in EVENTS:
            setattr(os, name, watched(getattr(os, name)))
        hashed = restartable._hashed

        def chunks(pieces, facts):
            for piece in hashed(pieces, facts):
                step()
                yield piece

        restartable._hashed = chunks
        run()

    return in_child(watched_run)
