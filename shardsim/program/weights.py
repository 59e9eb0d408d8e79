"""What each device stores of every weight, and which collectives each kind of weight needs.

A matrix or table is gathered along embed before use and its gradient is scattered back; then it is
summed over the devices that hold the same part. A vector (bias, scale, probe) is stored whole, but
for what the tensor axis splits, and its gradient is summed over everyone else.
"""

from __future__ import annotations

import numpy as np

from shardsim.model import Model, Tensor, parameters
from shardsim.plan.layout import Layout, Number


def is_matrix(tensor: Tensor) -> bool:
    """Return whether a weight is a matrix or a table rather than a vector."""
    return tensor.kind != "vector"


def block_matrices(model: Model) -> list[Tensor]:
    """Return the matrices of the layers."""
    return [t for t in parameters(model) if is_matrix(t) and t.part == "block"]


def vocabulary(model: Model) -> list[Tensor]:
    """Return the token embedding and the output head, as far as the model has them."""
    return [t for t in parameters(model) if is_matrix(t) and "vocab" in t.axes]


def end_matrices(model: Model) -> list[Tensor]:
    """Return the other matrices and tables before and after the layers."""
    return [
        t for t in parameters(model) if is_matrix(t) and t.part != "block" and "vocab" not in t.axes
    ]


def vectors(model: Model) -> list[Tensor]:
    """Return biases, scales, probes and the class token."""
    return [t for t in parameters(model) if not is_matrix(t)]


def by_tensor(tensor: Tensor, layout: Layout) -> Number:
    """Return over how many members of the tensor axis a weight is split.

    A mesh axis cannot split fewer key-value heads than it has members, so all members hold them.
    """
    for axis, length in zip(tensor.axes, tensor.shape, strict=True):
        if axis in ("heads", "mlp", "vocab"):
            return layout.tensor.size
        if axis == "kv_heads":
            return np.where(np.mod(length, layout.tensor.size) == 0, layout.tensor.size, 1)
    return 1


def split(tensor: Tensor, layout: Layout) -> Number:
    """Return over how many devices one weight is split."""
    by = by_tensor(tensor, layout)
    if tensor.stack > 1:
        by = by * layout.pipeline.size
    if is_matrix(tensor) and "embed" in tensor.axes:
        by = by * layout.gather.size * layout.tensor2.size
    return by


def stored_elements(tensors: list[Tensor], layout: Layout) -> Number:
    """Return how many elements of `tensors`, all layers, one device stores.

    A vocabulary is padded to a multiple of the tensor axis.
    """
    total: Number = 0.0
    for tensor in tensors:
        size: Number = tensor.size
        if "vocab" in tensor.axes:
            vocab = tensor.shape[tensor.axes.index("vocab")]
            members = layout.tensor.size
            size = size / vocab * np.ceil(vocab / members) * members
        total = total + size / split(tensor, layout)
    return total


def shared_elements(tensors: list[Tensor], layout: Layout) -> Number:
    """Return how many of the stored elements every member of the tensor axis stores too."""
    total: Number = 0.0
    for tensor in tensors:
        whole = np.equal(by_tensor(tensor, layout), 1) & (layout.tensor.size > 1)
        total = total + whole * stored_elements([tensor], layout)
    return total


def parameter_elements(model: Model, layout: Layout) -> Number:
    """Return how many parameters one device stores."""
    return stored_elements(list(parameters(model)), layout)
