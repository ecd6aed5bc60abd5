"""Processes of a benchmark. What fails or dies in one ends the whole; nobody waits for the dead."""

import contextlib
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Found = TypeVar("Found")
SPAWN = get_context("spawn")


class Failed(Exception):
    """Why a benchmark cannot measure, in one sentence."""


def alone(
    function: Callable[..., Found],
    *arguments: Any,
    environment: Mapping[str, str | None] | None = None,
) -> Found:
    """What a function returns in a new process.

    Args:
        environment: of the process, beside what this one has; None takes a variable away.

    Raises:
        Failed: it raised, or its process died.
    """
    with _environment(environment or {}):
        return _run(function, [arguments])[0]


def at_once(function: Callable[..., Found], arguments: list[tuple[Any, ...]]) -> list[Found]:
    """What a function returns in several processes that work at the same time.

    Args:
        function: gets a barrier as its last argument; it waits there when it is ready to begin.

    Raises:
        Failed: one of them raised or died; the others were ended.
    """
    ready = SPAWN.Barrier(len(arguments))
    return _run(function, [(*of, ready) for of in arguments])


def _run(function: Callable[..., Found], calls: list[tuple[Any, ...]]) -> list[Found]:
    """Not ProcessPoolExecutor: it may miss the death of a process that it starts after another."""
    pipes = [SPAWN.Pipe(duplex=False) for _ in calls]
    processes = [
        SPAWN.Process(target=_work, args=(theirs, function, arguments))
        for (_, theirs), arguments in zip(pipes, calls, strict=True)
    ]
    awaited = {ours: number for number, (ours, _) in enumerate(pipes)}
    found: dict[int, Found] = {}
    try:
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()  # so that it is closed when the process has ended
        while len(found) < len(calls):
            for ours in wait([ours for ours, number in awaited.items() if number not in found]):
                found[awaited[ours]] = _received(ours, processes[awaited[ours]])
    finally:
        for process in processes:
            if len(found) < len(calls) and process.pid is not None:
                process.kill()
        for process, (ours, _) in zip(processes, pipes, strict=True):
            if process.pid is not None:
                process.join()
            ours.close()
    return [found[number] for number in range(len(calls))]


def _received(connection: Connection, process: Any) -> Any:
    try:
        found, error = connection.recv()
    except EOFError:
        process.join()
        raise Failed(f"a process of the benchmark died with code {process.exitcode}") from None
    if error:
        raise Failed(f"a process of the benchmark failed: {error}")
    return found


def _work(answers: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In a new process."""
    end_with_parent()
    try:
        answers.send((function(*arguments), ""))
    except Exception as error:
        traceback.print_exc()
        answers.send((None, f"{type(error).__name__}: {error}"))


def end_with_parent() -> None:
    """From now on this process waits for nobody when the benchmark that started it has ended."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --- a process that is asked again and again ----------------------------------------------------


def partner() -> ProcessPoolExecutor:
    """A new process that does one thing after another; `answer` waits for what it returns."""
    return ProcessPoolExecutor(1, SPAWN, end_with_parent)


def answer(call: Future[Found]) -> Found:
    """What a partner returns.

    Raises:
        Failed: it raised, or died.
    """
    try:
        return call.result()
    except BrokenProcessPool:
        raise Failed("a process of the benchmark died") from None
    except Exception as error:
        traceback.print_exc()
        raise Failed(
            f"a process of the benchmark failed: {type(error).__name__}: {error}"
        ) from None


# --- the environment ----------------------------------------------------------------------------


@contextlib.contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Of this process, for a while: a new one begins with it."""
    before = {name: os.environ.get(name) for name in changes}
    try:
        _set(changes)
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
