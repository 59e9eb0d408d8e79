"""Where compilations run, other than in a local pool."""

from __future__ import annotations

from concurrent.futures import Executor
from importlib.util import find_spec
from typing import Any

from shardsim.errors import ShardsimError

CONNECT_S = 10


def dask_executor(address: str) -> Executor:
    """Return the executor of the Dask cluster whose scheduler is at `address`.

    Its workers need shardsim and its extra `tpu`.
    """
    if find_spec("distributed") is None:
        raise ShardsimError("--scheduler needs Dask: pip install distributed")
    from distributed import Client  # type: ignore[import-not-found,unused-ignore]

    try:
        client: Any = Client(address, timeout=CONNECT_S)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ShardsimError(f"--scheduler {address}: no Dask scheduler there ({reason})") from error
    executor: Executor = client.get_executor()
    return executor
