"""What the values of a trainer's compiled step are: weights, gradients, activations, workspace."""

from __future__ import annotations

import math
import re
from collections import Counter

from shardsim.plan import Plan, resolve
from shardsim.xla.hlo.buffers import Assignment, Buffer

_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = .*?\b([a-z][\w\-]*)\(([^)]*)", re.MULTILINE)
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_SAME = ("copy", "bitcast", "reshape", "transpose", "copy-done", "copy-start", "all-reduce")
_GATHERS = ("all-gather", "async-collective")


def classified(held: Assignment, text: str, plan: Plan) -> list[tuple[str, Buffer]]:
    """Return what is live at a step's peak beside its arguments, each with its kind, largest first.

    `text` is the program. Kinds are told by shape (a stack of layers, a weight's) and by what made
    a value; what is neither is workspace.
    """
    shapes = _Shapes(plan)
    origins = _origins(text)
    there = held.at(held.fullest[0])
    found = [(shapes.kind(buffer, *_origin(buffer.name, origins)), buffer) for buffer in there]
    return sorted(found, key=lambda pair: -pair[1].size_bytes)


class _Shapes:
    """The shapes of a plan's weights."""

    def __init__(self, plan: Plan) -> None:
        self.layers = plan.model.layers
        self.vocab = plan.model.vocab
        layout = resolve(plan)
        self.tensor_ways = int(layout.tensor.size)
        self.stored_ways = int(layout.tensor.size * layout.gather.size)
        matrices = [tensor for tensor in plan.model.tensors if len(tensor.shape) > 1]
        self.weights = [tensor.shape for tensor in matrices]
        for tensor in matrices:
            if {"embed", "head_dim"} <= set(tensor.axes):  # heads and their dimension in one
                embed = tensor.shape[tensor.axes.index("embed")]
                self.weights.append((embed, tensor.size_of_one // embed))

    def kind(self, buffer: Buffer, made: str, name: str) -> str:
        """Return the kind of a value; `made` and `name` say what made it."""
        match = _SHAPE.match(buffer.shape)
        if match is None:
            return "workspace"
        sizes = [int(d) for d in match[2].split(",") if d]
        dims = [d for d in sizes if d > 1]
        ways = self._ways(dims)
        if ways and min(ways) <= self.tensor_ways:
            gathered = made.startswith(_GATHERS) or "transpose(" not in name or "rematted" in name
            kind = "gathered weights" if gathered else "whole gradients"
            table = self.vocab in dims and "while/body" not in name
            return f"{kind} (vocabulary)" if table else kind
        if self.layers > 1 and self.layers in dims:
            dims.remove(self.layers)
            if self.stored_ways not in self._ways(dims):
                stacked = sizes[0] == self.layers and len(dims) > 1
                return "kept activations" if stacked else "workspace"
        elif self.stored_ways not in ways:
            return "workspace"
        return "gradients" if match[1] == "f32" else "weights cast ahead"

    def _ways(self, dims: list[int]) -> list[int]:
        """Return how many ways each weight would be split to have these dimensions; or none."""
        found = []
        for shape in self.weights:
            own, other = Counter(dims), Counter(shape)
            left = sorted((own - other).elements())
            whole = sorted((other - own).elements())
            if len(left) > 1 or len(whole) - len(left) not in (0, 1) or len(whole) > 1:
                continue
            split = math.prod(whole) / math.prod(left)
            if split >= 1 and split == int(split):
                found.append(int(split))
        return found


def _origins(text: str) -> dict[str, tuple[str, str, str]]:
    """Return by name: an instruction's operation, its first operand, and JAX's name of it."""
    found = {}
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            name = _OP_NAME.search(line)
            operand = match[3].split(",")[0].strip().lstrip("%").partition("#")[0]
            found[match[1]] = (match[2], operand, name[1] if name else "")
    return found


def _origin(name: str, origins: dict[str, tuple[str, str, str]]) -> tuple[str, str]:
    """Return the name of what a value is a copy of, and what JAX calls the operation."""
    seen = 0
    while seen < 20 and (found := origins.get(name)):
        operation, operand, op_name = found
        if operation not in _SAME or operand not in origins:
            return name, op_name
        name, seen = operand, seen + 1
    return name, ""
