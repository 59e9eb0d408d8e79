"""MaxText's own ahead-of-time compile; a script of its own, run in MaxText's environment.

`PROGRAM.txt PLAN.yml OPTION...`: what follows PROGRAM is train_compile's. Where MaxText prints the
memory analysis, the peak, which JAX leaves out of it, is printed too, and PROGRAM is written.
Imports nothing of shardsim's: the environment may not have it.
"""

# mypy: ignore-errors
from __future__ import annotations

import runpy
import sys
from pathlib import Path

import jax

_COMPILE = "maxtext.trainers.pre_train.train_compile"

if __name__ == "__main__":
    program = Path(sys.argv.pop(1))
    analysis = jax.stages.Compiled.memory_analysis

    def shown(compiled):
        """Print the peak and write the program of what MaxText compiled."""
        memory = analysis(compiled)
        print(f"CompiledMemoryStats peak_memory_in_bytes={memory.peak_memory_in_bytes}")
        program.write_text(compiled.as_text(), encoding="utf-8")
        return memory

    jax.stages.Compiled.memory_analysis = shown
    runpy.run_module(_COMPILE, run_name="__main__", alter_sys=True)
