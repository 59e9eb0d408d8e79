"""Single operations: what the TPU compiler is asked for, and how a plan would write them.

An `Op` is written `name:batch,m,k,n:dtype`. For operations without a matmul `m` x `n` is the
array, `k` is 1. `batch` counts arrays; of attention and of head layouts it counts sequences,
which have `HEADS` heads each.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardsim.errors import ShardsimError, nearest
from shardsim.machine.catalog import show
from shardsim.ops.activate import ACTIVATE
from shardsim.ops.add import ADD
from shardsim.ops.attend import SOFTMAX
from shardsim.ops.norm import NORM
from shardsim.program.reductions import OPS_UPDATE
from shardsim.program.tasks import Compute

HEADS = 16
BYTES = {"bf16": 2, "f32": 4}

# Of one element of the result: vector operations fused into the end of a matmul, bytes it reads.
MATMULS = {
    "matmul": (0.0, 0),
    "matmul_dw": (0.0, 0),  # both operands by their rows: a gradient of weights
    "matmul_bias": (ADD.ops, 0),
    "matmul_gelu": (ACTIVATE.fused, 0),
    "matmul_residual": (ADD.ops, 2),
}
# Of one element: vector operations, arrays read or written.
STREAMS = {
    "add": (ADD.ops, 3.0),
    "gelu": (ACTIVATE.fused, 2.0),
    "column_sum": (ADD.ops, 1.0),
    "layer_norm": (NORM.ops, 2.0),
    "rms_norm": (NORM.ops, 2.0),
    "softmax": (SOFTMAX.ops, SOFTMAX.passes),
}
# The axis that lies densest in memory is another one after a transpose, the same after a copy.
COPIES = {"transpose": "transpose", "split_heads": "copy"}
NAMES = (*MATMULS, *STREAMS, *COPIES, "adamw", "attention")

# What a class of operations is called in residuals and tables.
CLASSES = ("matmul", "attention", "elementwise", "optimizer", "copy", "transpose")


@dataclass(frozen=True, kw_only=True, order=True)
class Op:
    """One operation on arrays of known size; `dtype` is that of its result."""

    name: str
    batch: int = 1
    m: int
    k: int = 1
    n: int
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        """Refuse what is not known."""
        if self.name not in NAMES:
            raise ShardsimError(f"unknown operation {show(self.name)}{nearest(self.name, NAMES)}")
        if self.dtype not in BYTES:
            raise ShardsimError(f"{show(self.name)}: unknown dtype{nearest(self.dtype, BYTES)}")
        if min(self.batch, self.m, self.k, self.n) < 1:
            raise ShardsimError(f"{self.text}: sizes must be positive")

    @property
    def text(self) -> str:
        """The operation as one word.

        >>> Op(name="matmul", m=8, k=128, n=256).text
        'matmul:1,8,128,256:bf16'
        """
        return f"{self.name}:{self.batch},{self.m},{self.k},{self.n}:{self.dtype}"

    @property
    def group(self) -> str:
        """The class that the operation belongs to."""
        if self.name in MATMULS:
            return "matmul"
        if self.name in COPIES:
            return COPIES[self.name]
        return {"adamw": "optimizer", "attention": "attention"}.get(self.name, "elementwise")

    def tasks(self) -> tuple[Compute, ...]:
        """Return what a plan's program would say of it."""
        size = BYTES[self.dtype]
        if self.name in MATMULS:
            return (self._matmul(size),)
        elements = float(self.batch * self.m * self.n)
        if self.name == "attention":
            return self._attention()
        if self.name == "adamw":
            # Parameter and two moments are read and written, the gradient is read.
            return (
                Compute(
                    name=self.text,
                    kind="optimizer",
                    hbm_bytes=elements * 7 * size,
                    vector_ops=elements * OPS_UPDATE,
                ),
            )
        if self.name in COPIES:
            whole = elements * self.k
            return (Compute(name=self.text, kind=self.group, hbm_bytes=whole * 2 * size),)
        ops, passes = STREAMS[self.name]
        return (
            Compute(
                name=self.text,
                kind="elementwise",
                hbm_bytes=elements * passes * size,
                vector_ops=elements * ops,
            ),
        )

    def _matmul(self, size: int) -> Compute:
        m, k, n = float(self.m), float(self.k), float(self.n)
        ops, extra = MATMULS[self.name]
        return Compute(
            name=self.text,
            kind="matmul",
            m=m,
            k=k,
            n=n,
            batch=self.batch,
            matmuls=1,
            hbm_bytes=self.batch * ((m * k + k * n) * 2 + m * n * (size + extra)),
            vector_ops=self.batch * m * n * ops,
        )

    def _attention(self) -> tuple[Compute, ...]:
        """Return scores, softmax and weighted values, as an unfused attention has them."""
        batch, m, k, n = self.batch * HEADS, float(self.m), float(self.k), float(self.n)
        product = Compute(
            name=self.text,
            kind="attention",
            m=m,
            k=k,
            n=n,
            batch=batch,
            matmuls=2,
            hbm_bytes=2 * batch * (m * n + (m + n) * k) * 2,
        )
        softmax = Compute(
            name=self.text,
            kind="attention",
            hbm_bytes=batch * m * n * SOFTMAX.passes * 2,
            vector_ops=batch * m * n * SOFTMAX.ops,
        )
        return (product, softmax)


def parse_op(text: str) -> Op:
    """Read an operation as `Op.text` writes it.

    >>> parse_op("matmul:1,8,128,256:f32").n
    256
    """
    name, _, rest = text.partition(":")
    sizes, _, dtype = rest.partition(":")
    try:
        batch, m, k, n = (int(size) for size in sizes.split(","))
    except ValueError:
        raise ShardsimError(
            f"{show(text)}: expected name:batch,m,k,n:dtype, such as matmul:1,8,128,256:bf16"
        ) from None
    return Op(name=name, batch=batch, m=m, k=k, n=n, dtype=dtype)


def _shapes(name: str, *sizes: tuple[int, ...], dtype: str = "bf16", batch: int = 1) -> list[Op]:
    """Return operations of one name; sizes are (m, n), (m, k, n) or (batch, m, k, n)."""
    found = []
    for size in sizes:
        if len(size) == 2:
            size = (size[0], 1, size[1])
        if len(size) == 3:
            size = (batch, *size)
        found.append(Op(name=name, batch=size[0], m=size[1], k=size[2], n=size[3], dtype=dtype))
    return found


def standard_ops() -> list[Op]:
    """Return the operations that the shipped constants are fitted to."""
    cubes = [(size, size, size) for size in (128, 256, 512, 1024, 2048, 4096, 8192)]
    weights = (
        (1024, 1024), (768, 3072), (6144, 6144), (6144, 24576), (24576, 6144), (1024, 8192),
        (8192, 1024), (1408, 6144),
    )  # fmt: skip
    rows = [(m, k, n) for k, n in weights for m in (8, 64, 512, 4096, 16384)]
    awkward = [
        (16384, 588, 1408),
        (4096, 588, 1408),
        (16384, 1408, 4304),
        (4096, 768, 588),
        (4096, 64, 4096),
        (4096, 4096, 64),
        (4096, 192, 4096),
        (1000, 1000, 1000),
        (100, 4096, 4096),
        (2, 4096, 4096),
        (4096, 6144, 1000),
        (32768, 6144, 768),
        (2048, 14336, 4096),
        (4096, 4096, 32000),
        *((16384, k, 8192) for k in (1664, 2048, 2816, 3328)),
    ]
    batched = [
        (64, 1024, 64, 1024), (64, 1024, 1024, 64), (64, 1024, 128, 1024), (64, 1024, 1024, 128),
        (16, 512, 512, 512), (128, 256, 128, 256), (8, 4096, 128, 4096), (8, 2048, 2048, 2048),
    ]  # fmt: skip
    fused = [
        (512, 1024, 4096),
        (4096, 768, 3072),
        (4096, 6144, 6144),
        (4096, 1408, 6144),
        (8192, 4096, 14336),
    ]
    gradients = [
        (1024, 4096, 1024),
        (6144, 4096, 6144),
        (6144, 16384, 24576),
        (768, 16384, 3072),
        (1408, 4096, 6144),
    ]
    arrays = [(256, 1024), (1024, 1024), (4096, 1408), (8192, 6144), (32768, 4096), (4096, 588)]
    squares = [(1, 256, 1, 256), (64, 256, 1, 256), (16, 1024, 1, 1024), (64, 2048, 1, 2048)]
    attention = [
        (16, 256, 64, 256), (16, 256, 128, 256), (4, 512, 128, 512), (4, 1024, 64, 1024),
        (2, 1024, 128, 1024), (2, 2048, 64, 2048), (1, 2048, 128, 2048), (1, 4096, 128, 4096),
        (1, 8192, 128, 8192),
    ]  # fmt: skip
    heads = [
        (4, 1024, HEADS, 64),
        (4, 1024, HEADS, 88),
        (4, 1024, HEADS, 128),
        (16, 256, HEADS, 128),
        (1, 8192, HEADS, 128),
        (1, 4096, HEADS, 256),
    ]
    ops = _shapes("matmul", *cubes, *rows, *awkward, *batched)
    ops += _shapes("matmul", *cubes[2:6], *fused, dtype="f32")
    for name in ("matmul_bias", "matmul_gelu", "matmul_residual"):
        ops += _shapes(name, *fused)
    ops += _shapes("matmul_dw", *gradients) + _shapes("matmul_dw", *gradients, dtype="f32")
    for name in ("add", "gelu", "column_sum", "layer_norm", "rms_norm"):
        ops += _shapes(name, *arrays)
    ops += _shapes("add", *arrays[1:5], dtype="f32")
    ops += _shapes("softmax", *squares, *arrays[:4])
    ops += _shapes("adamw", *arrays, dtype="f32")
    ops += _shapes("attention", *attention)
    ops += _shapes("transpose", *arrays)
    ops += _shapes("split_heads", *heads)
    return ops
