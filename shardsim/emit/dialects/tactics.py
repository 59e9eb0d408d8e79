"""big_vision's sharding strategy: which spec its tactics give an array.

The first regular expression that matches a name in full decides; its tactics, joined by `|`, are
applied in order (big_vision, `sharding.py`, 2025-05).
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shardsim.emit.specs import Spec
from shardsim.errors import PlanError

Strategy = Sequence[tuple[str, str]]
_ITEM_BYTES = 4  # parameters are float32
_FSDP_LEAST_MB = 4.0  # the tactic's own default
_TACTICS = ("replicate", "fsdp", "shard_dim", "logical_partitioning")


def resolve_tactics(
    path: str, shape: Sequence[int], strategy: Strategy, sizes: Mapping[str, int]
) -> Spec:
    """Return the spec of the float32 array at `path`; `sizes` are those of the mesh axes.

    >>> strategy = [(".*/kernel", 'shard_dim("model", -1)|fsdp("data", 0)'), (".*", "replicate")]
    >>> resolve_tactics("params/kernel", (64, 8, 16), strategy, {"data": 4, "model": 2})
    [['data'], [], ['model']]
    """
    spec: Spec = [[] for _ in shape]
    for pattern, tactics in strategy:
        try:
            matches = re.fullmatch(pattern, path) is not None
        except re.error as error:
            raise PlanError(f"sharding_strategy: {pattern!r}: {error}") from None
        if matches:
            for text in tactics.split("|"):
                _apply(text, path, spec, shape, sizes)
            break
    return spec


def parse_tactic(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Return name, arguments and keyword arguments of a tactic; nothing in it is executed."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            name, given, named = call.id, [], {}
        elif isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            name = call.func.id
            given = [ast.literal_eval(entry) for entry in call.args]
            named = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        else:
            raise ValueError
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise PlanError(f"sharding_strategy: {text[:60]!r} is not a tactic") from None
    if name not in _TACTICS:
        raise PlanError(f"sharding_strategy: unknown tactic '{name}'")
    return name, given, named


def _apply(
    text: str, path: str, spec: Spec, shape: Sequence[int], sizes: Mapping[str, int]
) -> None:
    """Change `spec` as one tactic does."""
    name, given, named = parse_tactic(text)
    if name in ("replicate", "logical_partitioning"):
        if name == "replicate" and any(spec):
            raise PlanError(f"sharding_strategy: {path} is split already and cannot be replicated")
        return
    values = [*given, *named.values()]
    axes = (
        [values[0]] if values and isinstance(values[0], str) else list(values[0] if values else ())
    )
    for axis in axes:
        if axis not in sizes:
            raise PlanError(f"sharding_strategy: {text}: the mesh has no axis '{axis}'")
    if name == "shard_dim":
        dim = named.get("dim", given[1] if len(given) > 1 else None)
        if not isinstance(dim, int) or abs(dim) >= len(shape):
            if named.get("ignore_ndim_error", len(given) > 2 and given[2]):
                return
            raise PlanError(f"sharding_strategy: {text}: {path} has {len(shape)} dimensions")
        if spec[dim]:
            raise PlanError(f"sharding_strategy: {text}: {path} is split there already")
        spec[dim] = axes
        return
    least = named.get("min_size_to_shard_mb", given[1] if len(given) > 1 else _FSDP_LEAST_MB)
    if math.prod(shape) * _ITEM_BYTES <= least * 2**20:
        return
    total = math.prod(sizes[axis] for axis in axes)
    # The largest first; of equal ones the last, as numpy's sort reversed gives them.
    for index in sorted(range(len(shape)), key=lambda i: (shape[i], i), reverse=True):
        if shape[index] % total == 0 and not spec[index]:
            spec[index] = axes
            return
