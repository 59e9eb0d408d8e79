"""What optimizers keep of each weight, and its bytes on one device.

Moments with one element for each of the weight's lie as `split` says of its state. A factored
second moment (arXiv 1804.04235, section 3) keeps the means over each of an array's two largest
dimensions instead, as `optax.adafactor` does: arrays of a stack of layers are factored as one,
and those without two dimensions of at least 128 keep every element. The means are float32, and
every device of a pipeline stage holds them whole, as in the emitted code. Counters of steps are
not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from shardsim.model import Tensor
from shardsim.plan.layout import Layout, Number
from shardsim.plan.split import named, split, stored_elements

LEAST_FACTORED = 128  # optax.adafactor's min_dim_size_to_factor
_F32_BYTES = 4.0


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What one optimizer keeps: bytes of an element of each moment, and whether one is factored.

    Formats do not follow the weights': moments are float32 where nothing else is said.
    """

    moments: tuple[float, ...]
    factored: bool = False  # one more moment, in float32


# AdamW: two moments. Adafactor as ViT-G trained with it (arXiv 2106.04560, section 3.6): first
# moment in bf16, second moment factored. "adafactor-full": PaLM's, which does not factor the
# second moment and keeps no first (arXiv 2204.02311, section 5).
OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw": Optimizer(moments=(4.0, 4.0)),
    "adamw-bf16-mu": Optimizer(moments=(2.0, 4.0)),
    "adafactor": Optimizer(moments=(2.0,), factored=True),
    "adafactor-full": Optimizer(moments=(4.0,)),
    "momentum": Optimizer(moments=(4.0,)),
    "sgd": Optimizer(moments=()),
}


def state_bytes(
    name: str,
    tensors: Sequence[Tensor],
    layout: Layout,
    element_bytes: float = 4.0,
    master_bytes: float = 0.0,
) -> Number:
    """Return the bytes of optimizer state of `tensors` that one device holds.

    No element of a moment takes more than `element_bytes`; one of the optimizer's own weights takes
    `master_bytes`.
    """
    optimizer = OPTIMIZERS[name]
    total: Number = 0.0
    if each := bytes_of_each(name, element_bytes, master_bytes):
        total = each * stored_elements(tensors, layout, state=True)
    if optimizer.factored:
        for tensor in tensors:
            total = total + _F32_BYTES * _second_moment_elements(tensor, layout)
    return total


def bytes_of_each(name: str, element_bytes: float = 4.0, master_bytes: float = 0.0) -> float:
    """Return the bytes of state of each weight, but for what is factored."""
    return master_bytes + sum(min(moment, element_bytes) for moment in OPTIMIZERS[name].moments)


def _second_moment_elements(tensor: Tensor, layout: Layout) -> Number:
    """Return the elements of a weight's factored second moment on one device."""
    dimensions = split(*named(tensor, state=True), layout)
    own = prod(item.local for item in dimensions)
    if len(dimensions) < 2:
        return own
    sizes = np.sort(np.stack(np.broadcast_arrays(*(item.size for item in dimensions))), axis=0)
    stages = prod(item.ways for item in dimensions if item.axis == "layers")
    of_stage = np.prod(sizes, axis=0) / stages
    means = of_stage / sizes[-1] + of_stage / sizes[-2]
    return np.where(sizes[-2] >= LEAST_FACTORED, means, own)
