"""Compiles the samples in `data/` anew; run it by hand, with jax[tpu] installed. No TPU needed.

python tests/xla/hlo/make_samples.py [NAME ...]
"""

from __future__ import annotations

import lzma
import os
import re
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import hlo_samples as samples
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardsim.emit.runtime.config import build_mesh
from shardsim.emit.runtime.data import synthetic_batch
from shardsim.emit.runtime.train import Trainer
from shardsim.emit.specs import plan_data
from shardsim.ops.whole import dtype


def devices(name: str) -> list[Any]:
    """Return the devices of a slice, as the compiler sees them."""
    more = {"chip_config_name": "megacore"} if name.startswith(("v4", "v5p")) else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices


def train_step(name: str) -> str:
    """Return the scheduled HLO of a plan's train step."""
    plan = samples.plan_of(name)
    data = plan_data(plan)
    mesh = build_mesh(data["plan"], devices(plan.machine.name))
    trainer = Trainer(data, mesh)
    kind = dtype(data["plan"]["parameters"])
    places = trainer.shardings(trainer.specs)
    params = {
        key: jax.ShapeDtypeStruct(tuple(entry["shape"]), kind, sharding=places[key])
        for key, entry in trainer.parameters.items()
    }
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(trainer.first_state, params),
        trainer.state_shardings(),
    )
    one = synthetic_batch({**data["plan"], "batch": 1}, data["model"], 0)
    place = NamedSharding(mesh, trainer.batch_spec)
    batch = {
        key: jax.ShapeDtypeStruct((plan.batch, *value.shape[1:]), value.dtype, sharding=place)
        for key, value in one.items()
    }
    with jax.set_mesh(mesh):
        lowered = jax.jit(trainer.step, donate_argnums=(0, 1)).lower(params, state, batch)
        return lowered.compile(compiler_options=data["plan"]["tpu_options"]).as_text()


def matmuls() -> str:
    """Return the scheduled HLO of products of known shapes and one collective of each kind."""
    sizes = samples.MATMULS_MESH
    mesh = Mesh(np.array(devices("v5e:4x4")).reshape(tuple(sizes.values())), tuple(sizes))

    @partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    def run(x: Any, y: Any, q: Any, k: Any) -> Any:
        def one(carry: Any, _: Any) -> Any:
            z = jnp.tanh(carry @ y)  # [m, n]
            z = lax.psum(z, "a")
            z = lax.all_gather(z, "b", tiled=True)  # [4 m, n]
            z = lax.psum_scatter(z, "b", tiled=True)
            z = lax.ppermute(z, "a", [(i, (i + 1) % 4) for i in range(4)])
            z = lax.all_to_all(z, "b", 1, 1, tiled=True)
            return (z @ y.T).astype(carry.dtype), None

        out, _ = lax.scan(one, x, None, length=5)
        scores = jnp.einsum("bqd,bkd->bqk", q, k)
        pairs = [[0, 1], [2, 3]]
        return out, lax.psum(scores, "b", axis_index_groups=pairs)

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P()))

    m, k, n, b = samples.ROWS, samples.INNER, samples.COLUMNS, samples.BATCH
    with jax.set_mesh(mesh):
        lowered = jax.jit(run).lower(array(m, k), array(k, n), array(b, m, k), array(b, n, k))
        return lowered.compile().as_text()


def packed(text: str) -> bytes:
    """Return a text as it is kept: compressed, without the binary code of kernels."""
    text = re.sub(r'"body":"[A-Za-z0-9+/=]*"', '"body":""', text)
    return lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)


def main(names: list[str]) -> None:
    """Compile the samples called `names`, or all."""
    for name in names or [*samples.DATA, "matmuls"]:
        text = matmuls() if name == "matmuls" else train_step(name)
        head = f"// {name}: jax {version('jax')}, libtpu {version('libtpu')}\n"
        root = str(Path(__file__).parents[3]) + os.sep
        packages = str(Path(jax.__file__).parents[1]) + os.sep
        text = (head + text).replace(root, "").replace(packages, "")
        (samples.FOLDER / f"{name}.hlo.xz").write_bytes(packed(text))
        print(name, len(text), (samples.FOLDER / f"{name}.hlo.xz").stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1:])
