"""A process that is awaited at a barrier and does not come."""

import os
import signal
from multiprocessing.synchronize import Barrier


def meet(number: int, how: str, ready: Barrier) -> int:
    """Its number, if both are there; number 1 fails before, or is killed."""
    if number == 1 and how == "raises":
        raise IndexError("there is nothing for it")
    if number == 1 and how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    ready.wait()
    return number


def meet_alone(number: int, ready: Barrier) -> None:
    """Number 0 says its process, and waits for number 1, which never comes."""
    if number == 1:
        signal.pause()
    print(os.getpid(), flush=True)
    ready.wait()
