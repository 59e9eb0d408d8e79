"""Where many calls run: processes of this machine, or a Dask cluster; outcomes as they come.

Whatever runs many things (compilations, event simulations, searches of several slices) takes a
`concurrent.futures.Executor` and reads its calls' results here, so it need not know where they run.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from shardsim.errors import ShardsimError

CONNECT_S = 10
TELL_S = 15.0  # between two words that it still goes on

Waiting = Callable[[float, int], None]  # seconds since the start, calls that are not done


def outcomes(
    executor: Executor,
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    waiting: Waiting | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yield (index, result) of `function(*call)` for each of `calls` as they are done.

    Now and then `waiting` is told how it goes. Whoever stops reading, on an interrupt too, cancels
    what has not begun. A `ShardsimError` of a call is raised as it is, and so is one in a line when
    the executor itself fails, such as a cluster that is gone.
    """
    begun = time.monotonic()
    futures: dict[Future[Any], int] = {}
    try:
        for index, call in enumerate(calls):
            futures[_carried(executor.submit, function, *call)] = index
        left = set(futures)
        while left:
            try:
                for future in as_completed(left, timeout=TELL_S):
                    left.discard(future)
                    yield futures[future], _carried(future.result)
            except TimeoutError:
                if waiting is not None:
                    waiting(time.monotonic() - begun, len(left))
    finally:
        for future in futures:
            future.cancel()


def _carried(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a call to an executor gives; raise in a line what went wrong with the executor.

    A cancelled future is one whose scheduler is gone: nobody else cancels while results are read.
    """
    try:
        return call(*arguments)
    except ShardsimError:
        raise
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")[:300]
        raise ShardsimError(f"what runs the calls has failed ({words})") from error


@contextmanager
def executor_of(workers: int, scheduler: str | None) -> Iterator[Executor | None]:
    """Give a Dask cluster's executor, or a pool of `workers` processes; none for a single one."""
    if scheduler is not None:
        with cluster(scheduler) as executor:
            yield executor
    elif workers > 1:
        with processes(workers) as executor:
            yield executor
    else:
        yield None


@contextmanager
def processes(workers: int) -> Iterator[Executor]:
    """Give a pool of processes of this machine; leaving waits for what has begun."""
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=signal.signal,  # an interrupt is for the parent
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def cluster(address: str) -> Iterator[Executor]:
    """Give the executor of the Dask cluster whose scheduler is at `address`.

    Its workers need the same shardsim, and the extra for what they run. A call whose worker ends
    is run by another one. Leaving cancels what has not begun.
    """
    if find_spec("distributed") is None:
        raise ShardsimError("--scheduler needs Dask: pip install 'shardsim[cluster]'")
    from distributed import Client
    from distributed.comm.addressing import resolve_address

    _quiet("distributed")
    try:
        resolve_address(address)
        connect: Any = Client
        client = connect(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ShardsimError(f"--scheduler {address}: no Dask scheduler there ({reason})") from error
    executor: Executor = client.get_executor()
    try:
        yield executor
    except ShardsimError as error:
        if client.status == "running":
            raise
        raise ShardsimError(f"--scheduler {address}: the Dask scheduler is gone") from error
    finally:
        executor.shutdown(wait=False)
        client.close(timeout=CONNECT_S)


def _quiet(library: str) -> None:
    """Let a library's loggers be silent: what goes wrong is told in a line."""
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] == library:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
