"""The TPU compiler's estimates of single operations, several processes side by side.

Every estimate is kept in a file as it comes, so what was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from shardsim.emit.tpu_options import vmem_options
from shardsim.errors import ShardsimError
from shardsim.machine import Chip, Machine
from shardsim.validate.ops import Op, parse_op
from shardsim.xla.tpu.cache import OPS, default_folder, key_of
from shardsim.xla.tpu.service import check_libtpu, compiler_environment, compiler_versions
from shardsim.xla.tpu.topology import topology_options

# Operands stay in HBM: a program prefetches some of them to on-chip memory beside other work, but
# of an operation on its own the copies would be left out of the estimate.
OPTIONS = {
    "xla_msa_enable": "false",
    "xla_tpu_cmem_memory_space_assignment": "false",
    "xla_vf_vmem_memory_space_assignment": "false",
}

Progress = Callable[[str], None]


class OpCompiler:
    """Estimates operations on one chip; `estimates` maps what is known to cycles.

    `folder` keeps estimates between calls, by chip and versions of the compiler. Operations have
    the on-chip memory that emitted steps give them, or with `own_limit` what the compiler does.
    """

    def __init__(
        self, chip: Chip, *, folder: Path | None = None, workers: int = 1, own_limit: bool = False
    ) -> None:
        check_libtpu()
        machine = Machine(chip=chip, shape=(1,) * chip.torus_dims)
        options = OPTIONS if own_limit else OPTIONS | vmem_options(chip)
        self._request = {"topology": topology_options(machine), "options": options}
        self._workers = workers
        self._lock = threading.Lock()
        self.versions = {name: compiler_versions()[name] for name in ("jax", "libtpu")}
        name = f"{chip.name}-{key_of(self._request, '', self.versions)}"
        self._file = (folder or default_folder() / OPS) / f"{name}.jsonl"
        self.estimates: dict[Op, int] = {}
        self.failed: dict[Op, str] = {}
        self._read()

    def _read(self) -> None:
        """Read what was kept; a line that an interruption cut is left out."""
        with suppress(OSError):
            for line in self._file.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, KeyError, TypeError, AttributeError, ShardsimError):
                    answer = json.loads(line)
                    self.estimates[parse_op(answer["op"])] = int(answer["cycles"])

    def estimate(self, ops: Iterable[Op], progress: Progress | None = None) -> dict[Op, int]:
        """Return the cycles of each of `ops`; those that the compiler refuses are in `failed`."""
        wanted = list(dict.fromkeys(ops))
        waiting = [op for op in wanted if op not in self.estimates]
        total = len(waiting)
        say = progress or (lambda text: None)
        done = 0

        def note(op: Op, answer: dict[str, Any]) -> None:
            nonlocal done
            with self._lock:
                done += 1
                if "error" in answer:
                    self.failed[op] = answer["error"]
                    say(f"{done} of {total}: {op.text} {answer['error']}")
                    return
                self.estimates[op] = answer["cycles"]
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(answer) + "\n")
                say(f"{done} of {total}: {op.text} {answer['cycles']:,} cycles")

        with tempfile.TemporaryDirectory(prefix="shardsim-tpu-") as folder:
            processes = [self._start(Path(folder)) for _ in range(min(self._workers, total))]
            threads = [
                threading.Thread(target=self._feed, args=(process, waiting, note), daemon=True)
                for process in processes
            ]
            try:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            finally:
                for process in processes:
                    process.kill()
                    process.communicate()
            if total and not done:
                tail = (Path(folder) / "log").read_bytes()[-300:].decode("utf-8", "replace")
                raise ShardsimError(
                    f"the compiling process ended early: {' '.join(tail.split())[-200:]}"
                )
        return {op: self.estimates[op] for op in wanted if op in self.estimates}

    def _start(self, folder: Path) -> subprocess.Popen[str]:
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "shardsim.xla.tpu.op_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=compiler_environment(folder),
                encoding="utf-8",
                start_new_session=True,  # an interrupt is for the parent, which ends this one
            )
        return process

    def _feed(
        self,
        process: subprocess.Popen[str],
        waiting: list[Op],
        note: Callable[[Op, dict[str, Any]], None],
    ) -> None:
        """Give one process an operation after another until there are none."""
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError, ValueError):  # the process has ended
            print(json.dumps(self._request), file=process.stdin, flush=True)
            while True:
                with self._lock:
                    if not waiting:
                        return
                    op = waiting.pop(0)
                print(op.text, file=process.stdin, flush=True)
                if not (line := process.stdout.readline()):
                    self.failed[op] = "the compiling process ended early"
                    return
                note(op, json.loads(line))
