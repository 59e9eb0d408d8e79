"""What a product or a transfer is for, by its arrays: prices, passes and formats go by it."""

from __future__ import annotations

from collections.abc import Iterable

from shardsim.graph.arrays import Array, Op
from shardsim.graph.derive import Transfer
from shardsim.graph.place import HEAD_WIDTHS, logical_axis
from shardsim.ops.exchange import ROUTED
from shardsim.ops.predict import PREDICTIONS
from shardsim.ops.vocabulary import LOSS_STATISTICS
from shardsim.program.sizes import role_of
from shardsim.program.tasks import BY_HEAD, KEYS, LOSS, QUERY_KEY_NORM, SOFTMAX

APART = (ROUTED, PREDICTIONS)  # purposes of what no collective matmul moves
ENDS = ("tables", "ends")  # purposes of weights before and after the layers


def product_of(op: Op) -> str:
    """Return which of `precision.PRODUCTS` a product is, by its weight; none of two activations."""
    weights = [array for array in op.ins if array.weight in ("matrix", "table")]
    return product_of_dims(weights[0].dims, weights[0].purpose) if weights else ""


def product_of_dims(dims: Iterable[str], purpose: str = "") -> str:
    """Return the same by the dimensions of the weight, and by what moving it is for."""
    axes = {logical_axis(d, False) for d in dims}
    if "expert" in axes:
        return "experts"
    if purpose in ENDS:
        return "head"
    return "mlp" if "mlp" in axes else "attention"


def purpose_of_transfer(transfer: Transfer) -> str:
    """Return what a transfer is for, if it says so. Over context, what lies inside a block is keys
    and values."""
    if transfer.purpose == "second axis" and role_of(transfer.axes) == "context":
        return KEYS
    return transfer.purpose


def works_by_head(op: Op) -> bool:
    """Return whether an op works through queries or keys element by element."""
    by_element = not op.product and not op.kernel and bool(op.stream.passes)
    return by_element and purpose_of(op, op.out) in (QUERY_KEY_NORM, BY_HEAD)


def purpose_of(op: Op, array: Array) -> str:
    """Return the purpose of what makes `array`: attention reads queries and the like by head, a
    loss logits."""
    if op.stream.by_head:
        return QUERY_KEY_NORM
    if op.unit == "attention" and not op.product:
        return SOFTMAX
    if array.purpose == LOSS_STATISTICS and not op.product:
        return LOSS
    return BY_HEAD if HEAD_WIDTHS & {*array.dims} and op.unit != "attention" else ""


def sums_heads(op: Op, inner: Iterable[str]) -> bool:
    """Return whether a product sums over what attention made by head: its result, or gradients."""
    return bool(HEAD_WIDTHS & {*inner}) and op.unit != "attention"


def over_tensor(transfer: Transfer, kind: str) -> bool:
    """Return whether a collective matmul may take the place of a collective."""
    alone = transfer.kind == kind and role_of(transfer.axes) == "tensor"
    return alone and not transfer.weight and transfer.purpose not in APART
