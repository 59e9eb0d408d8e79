"""Compiling plans for TPU slices on a machine without one, several side by side.

Each compilation is a process of its own with a time and a memory limit, started by a thread of
a local pool or by whatever `concurrent.futures.Executor` is given (a Dask cluster's, say).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from shardsim.emit.jax_code import jax_code
from shardsim.emit.tpu_options import tpu_options
from shardsim.errors import ShardsimError
from shardsim.executors import outcomes
from shardsim.plan import Plan
from shardsim.xla.tpu.cache import Cache, key_of
from shardsim.xla.tpu.topology import topology_options

WORKER = "shardsim.xla.tpu.worker"
TIMEOUT_S = 1200.0
MEMORY_BYTES = 12e9  # of one compiling process; a ViT-22B step for 1,024 chips needs 3.5e9
_POLL_S = 0.2
_SIZES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE)
_TOTAL = re.compile(
    r"total memory required[^(]*\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    re.IGNORECASE,
)

Progress = Callable[[str], None]

# What this process is compiling, so that an interrupt can end it.
_running: set[subprocess.Popen[bytes]] = set()
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """What the TPU compiler made of one plan."""

    plan: Plan
    result: dict[str, Any]
    text: str | None = field(repr=False)  # the scheduled HLO
    code: str = field(repr=False)  # the emitted train.py that was compiled
    cached: bool = False

    @property
    def ok(self) -> bool:
        """Whether it compiled, so that it also fits."""
        return "error" not in self.result

    @property
    def peak_bytes(self) -> float | None:
        """HBM that a device needs at its fullest moment; also where it was too much."""
        if self.ok:
            return peak_bytes(self.result["memory"])
        used = hbm_needed(self.result["message"])
        return used[0] if used else None

    @property
    def does_not_fit(self) -> bool:
        """Whether the compiler refused the plan because it needs too much HBM."""
        return not self.ok and hbm_needed(self.result["message"]) is not None

    @property
    def versions(self) -> dict[str, str]:
        """Versions of jax and libtpu."""
        return dict(self.result.get("versions") or compiler_versions())

    @property
    def problem(self) -> str:
        """One line that says why there is no program."""
        return problem_of(self.result)


def peak_bytes(memory: dict[str, int]) -> float:
    """Return the HBM in use at the fullest moment.

    The compiler's own figure, but where something lies in the host's memory: then that is the
    larger of both memories, and the sum of the sizes that it says more than either, so that the
    assigned buffers are counted.
    """
    away = memory.get("host_temp_size") or memory.get("host_argument_size")
    return float(memory["assigned_peak" if away else "peak_memory"])


def problem_of(result: dict[str, Any]) -> str:
    """Return one line that says why a compiling process gave no program."""
    message = result.get("message", "")
    if used := hbm_needed(message):
        needed, offered = (size / 2**30 for size in used)
        return f"does not fit: needs {needed:.2f} GiB of {offered:.2f} GiB HBM on a device"
    return " ".join(f"{result['error']}: {message}".split())[:400]


def hbm_needed(message: str) -> tuple[float, float] | None:
    """Return (needed, offered) HBM bytes of an out-of-memory message, or None if it is none.

    >>> hbm_needed("total memory required (159.30G) exceeds available HBM (30.75G)")[1] / 2**30
    30.75
    """
    match = _TOTAL.search(message) or _USED.search(message)
    if match is None:
        return None
    return (float(match[1]) * _SIZES[match[2].upper()], float(match[3]) * _SIZES[match[4].upper()])


def run_compiler(
    request: dict[str, Any], code: str, timeout_s: float, memory_bytes: float
) -> tuple[dict[str, Any], str | None]:
    """Compile `code` in a process of its own; return its result and the HLO text, if any.

    The process is the `worker` of the request, a module; left out, that of emitted programs.
    """
    folder = Path(tempfile.mkdtemp(prefix="shardsim-tpu-"))
    try:
        (folder / "train.py").write_text(code, encoding="utf-8")
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", request.get("worker", WORKER), str(folder)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.PIPE,  # closed when this process ends, however it ends
                env={
                    **compiler_environment(folder),
                    "XLA_FLAGS": f"--xla_dump_to={folder / 'dump'} --xla_dump_hlo_as_text",
                },
                start_new_session=True,  # an interrupt is for the parent, which ends this one
            )
        with _lock:
            _running.add(process)
        try:
            stopped = _watch(process, timeout_s, memory_bytes)
        finally:
            _kill(process)
            with _lock:
                _running.discard(process)
        answer = folder / "result.json"
        if not answer.exists():
            tail = (folder / "log").read_bytes()[-2000:].decode("utf-8", "replace").strip()
            why = stopped or f"the compiling process ended early: {tail}"
            return {"error": "stopped" if stopped else "crashed", "message": why}, None
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        program = folder / "hlo.txt"
        return result, program.read_text(encoding="utf-8") if program.exists() else None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compile_once(
    request: dict[str, Any],
    code: str,
    timeout_s: float,
    memory_bytes: float,
    folder: str | None,
    left: threading.Event | None = None,
) -> tuple[dict[str, Any], str | None]:
    """Return what is kept in a cache's `folder`, or compile and keep it, as `run_compiler` does.

    Whoever wants the same at the same time waits, until it is there or `left` is set. It is kept
    before it is returned: if this process ends in between, nobody compiles it again.
    """
    cache, key = Cache(Path(folder)) if folder else None, key_of(request, code, compiler_versions())
    try:
        if cache is not None:
            cache.folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a cluster's worker may have no such place
        cache = None
    if cache is None:
        return run_compiler(request, code, timeout_s, memory_bytes)
    with cache.alone(key, left.is_set if left else lambda: False) as alone:
        if not alone:
            return {"error": "stopped", "message": "interrupted"}, None
        if kept := cache.get(key):
            return kept
        result, text = run_compiler(request, code, timeout_s, memory_bytes)
        if is_answer(result):
            cache.put(key, result, text)
        return result, text


def is_answer(result: dict[str, Any]) -> bool:
    """Return whether the compiler said what comes of a plan, so that it would say so again."""
    return result.get("error") not in ("stopped", "crashed")


def check_libtpu() -> None:
    """Raise one line that says what to install if the TPU compiler is missing."""
    if find_spec("libtpu") is None:
        raise ShardsimError(
            "compiling for a TPU needs JAX with libtpu (Linux only): pip install 'shardsim[tpu]'"
        )


def without_tpu() -> dict[str, str]:
    """Return this process's environment, changed so that libtpu compiles without a TPU.

    It must neither look for a machine nor lock it; with a machine's name in the environment its
    cost analysis aborts the process (see docs/compiler.md).
    """
    return {key: value for key, value in os.environ.items() if key != "TPU_ACCELERATOR_TYPE"} | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def compiler_environment(folder: Path) -> dict[str, str]:
    """Return the environment of a compiling process whose files are in `folder`."""
    path = os.pathsep.join(path for path in sys.path if path)
    return without_tpu() | {"TMPDIR": str(folder), "PYTHONPATH": path}


def _watch(process: subprocess.Popen[bytes], timeout_s: float, memory_bytes: float) -> str:
    """Wait for the process; return why it had to be ended, or nothing."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_S)
            return ""
        if time.monotonic() > deadline:
            return f"not compiled within {timeout_s:.0f} s"
        if (held := _resident_bytes(process.pid)) > memory_bytes:
            taken, allowed = f"{held / 1e9:.1f} GB", f"{memory_bytes / 1e9:.1f} GB"
            return f"the compiler took {taken} of this machine's memory; {allowed} are allowed"


def _resident_bytes(pid: int) -> float:
    """Return the memory that a process holds; 0 where that cannot be told."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


class TpuCompiler:
    """Compiles plans and keeps what came out.

    `workers` processes run side by side, or an `executor` decides; `cache` None keeps nothing.
    `worker` is the module that each of them runs.
    Leaving the context ends what still runs in processes of its own.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        executor: Executor | None = None,
        timeout_s: float = TIMEOUT_S,
        memory_bytes: float = MEMORY_BYTES,
        cache: Cache | None = None,
        progress: Progress | None = None,
        worker: str = WORKER,
    ) -> None:
        if executor is None:
            check_libtpu()
        self._worker = worker
        self._own = executor is None
        self._executor = executor or ThreadPoolExecutor(max_workers=workers)
        self._left = threading.Event()
        self._limits = (timeout_s, memory_bytes)
        self._cache = cache
        self._say = progress or (lambda text: None)
        self._calls = 0  # under way or done, of the plans asked for last

    def __enter__(self) -> TpuCompiler:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._own:
            self._left.set()
            self._executor.shutdown(wait=False, cancel_futures=True)
            with _lock:
                left = list(_running)
            for process in left:
                _kill(process)
            self._executor.shutdown(wait=True)

    def compile(self, plan: Plan, options: dict[str, str] | None = None) -> Compilation:
        """Compile one plan; `options` replace the plan's own compiler options where named."""
        return next(self.compile_all([plan], options))[1]

    def compile_all(
        self, plans: Sequence[Plan], options: dict[str, str] | None = None
    ) -> Iterator[tuple[int, Compilation]]:
        """Yield (index, compilation) of each plan as they come; kept ones first."""
        places: list[tuple[int, str, str]] = []
        calls: list[tuple[Any, ...]] = []
        folder = str(self._cache.folder) if self._cache else None
        versions = compiler_versions()
        for index, plan in enumerate(plans):
            try:
                code = jax_code(replace(plan, name="plan"))
                topology = topology_options(plan.machine)
            except ShardsimError as error:
                if len(plans) == 1:
                    raise
                yield index, _refused(plan, error)
                continue
            request: dict[str, Any] = {
                "topology": topology,
                "options": tpu_options(plan) | (options or {}),
            }
            if self._worker != WORKER:
                request["worker"] = self._worker
            key = key_of(request, code, versions)
            kept = self._cache.get(key) if self._cache else None
            if kept:
                yield (
                    index,
                    Compilation(plan=plan, result=kept[0], text=kept[1], code=code, cached=True),
                )
                continue
            places.append((index, key, code))
            calls.append((request, code, *self._limits, folder, *([self._left] * self._own)))
        self._calls = len(calls)
        done = outcomes(self._executor, compile_once, calls, self._waiting)
        for count, (place, (result, text)) in enumerate(done, 1):
            index, key, code = places[place]
            # Kept where it was compiled, which may be elsewhere.
            if self._cache and key not in self._cache and is_answer(result):
                made_with = result.get("versions", {})
                if all(versions.get(name) == number for name, number in made_with.items()):
                    if why := self._cache.put(key, result, text):
                        self._say(f"the compilation is not kept: {why}")
            made = Compilation(plan=plans[index], result=result, text=text, code=code)
            took = result.get("compile_s", 0) + result.get("lower_s", 0)
            what = f"compiled in {took:.0f} s" if made.ok else made.problem
            self._say(f"{count} of {len(calls)}: {plans[index].name or 'plan'} {what}")
            yield index, made

    def _waiting(self, seconds: float, left: int) -> None:
        done = self._calls - left
        rest = f", about {seconds * left / done:.0f} s more" if done > 0 else ""
        self._say(f"compiling for {seconds:.0f} s; {left} to come{rest}")


def _refused(plan: Plan, error: ShardsimError) -> Compilation:
    """Return the outcome of a plan that cannot be emitted or has no slice to compile for."""
    result = {"error": "refused", "message": str(error), "versions": compiler_versions()}
    return Compilation(plan=plan, result=result, text=None, code="")


def compiler_versions() -> dict[str, str]:
    """Return the versions on which a compilation depends; empty where a package is missing."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu", "optax"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found
