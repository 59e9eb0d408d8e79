"""How a MaxText config attends: in which kernel, and over a context axis."""

from __future__ import annotations

import math
from collections.abc import Mapping

from shardsim.carried import Keys, is_one_of
from shardsim.emit.dialects.maxtext_tables import blocks_of
from shardsim.errors import FileError, shown
from shardsim.machine import Machine
from shardsim.ops.attend_mask import BLOCKS
from shardsim.plan.plan import CONTEXT_ORDERS, Context
from shardsim.validate.words import whole

CONTEXTS = {"all_gather": "gathered", "ring": "ring", "ulysses": "ulysses"}


def context_of(keys: Keys, reorders: bool) -> Context:
    """Return how members of a context axis attend; `reorders`: they may have tokens in another
    order, so that a causal mask leaves all the same work.

    Source: AI-Hypercomputer/maxtext#4687: of a ring no hop runs beside the blocks.
    """
    strategy = keys["context_parallel_strategy"]
    if strategy not in CONTEXTS:
        raise FileError(
            f"context_parallel_strategy: {shown(strategy)} is not modelled; choose from: "
            f"{', '.join(CONTEXTS)}"
        )
    found = CONTEXTS[strategy]
    striped = reorders and found != "ulysses" and keys.flag("context_parallel_load_balance")
    order = None if found == "ulysses" else CONTEXT_ORDERS[striped]
    return Context(keys=found, order=order, overlap=found != "ring")


def is_fused(keys: Keys, machine: Machine) -> bool:
    """Return whether attention is a fused kernel's; those of GPUs run on GPUs alone."""
    kernel = keys["attention"]
    if kernel in ("cudnn_flash_te", "cudnn_flash_jax") and machine.chip.interconnect == "switch":
        return True
    if not is_one_of(kernel, ("autoselected", "flash", "dot_product")):
        raise FileError(
            f"attention: {shown(kernel)} is not modelled on {machine.chip.name}; autoselected, "
            "flash and dot_product are"
        )
    return bool(kernel != "dot_product")


def kernel_of(keys: Keys) -> str:
    """Return the fused kernel whose largest blocks forward and back come nearest to a config's.

    The larger of a block's sides decides what a mask saves. Keys that are not as the kernel has
    them stay unread, and are listed.
    """
    longer = blocks_of("flash-2048")
    given = {key: whole(keys.given[key], key) for key in longer if key in keys.given}

    def sides(blocks: Mapping[str, int]) -> tuple[int, int]:
        own = [(key, blocks.get(key, BLOCKS[0])) for key in longer]
        ways = [[side for key, side in own if ("_d" in key) == back] for back in (False, True)]
        return max(ways[0]), max(ways[1])

    wanted = sides(given)

    def apart(name: str) -> float:
        had = sides(blocks_of(name))
        return sum(abs(math.log2(max(a, 1) / b)) for a, b in zip(wanted, had, strict=True))

    name = min(("flash", "flash-2048"), key=apart)
    keys.read |= {key for key, side in given.items() if blocks_of(name).get(key, BLOCKS[0]) == side}
    return name
