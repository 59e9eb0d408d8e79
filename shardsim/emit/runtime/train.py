"""The train step: microbatches, gradients, optimizer update; and a run on synthetic data."""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from shardsim.emit.runtime.collectives import own, scatter, total
from shardsim.emit.runtime.config import Data, build_mesh, make_group
from shardsim.emit.runtime.data import batch_shapes, whole_batch
from shardsim.emit.runtime.explicit import Explicit
from shardsim.emit.runtime.host import ONE_BY_ONE, use_host_devices
from shardsim.emit.runtime.lending import SUMS, Fetching, on_device, whole_first, with_sums
from shardsim.emit.runtime.model import loss_sum
from shardsim.emit.runtime.optimizer import by_layer, in_float32, make_optimizer, merged, of, stored
from shardsim.emit.runtime.partitioned import Partitioned, to_spec
from shardsim.emit.runtime.phases import in_phases, scattered
from shardsim.ops.whole import Array, Params, Whole, dtype

SYNTHETIC_BATCHES = 4  # then they come again


class Trainer:
    """One plan, ready to run: `start`, `step`, and the shardings of everything.

    `mesh` None runs the same model on one device, unsharded.
    """

    def __init__(self, data: Data, mesh: Any = None, learning_rate: float = 0) -> None:
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        self.plan, self.model = {**data["plan"], "platform": platform}, data["model"]
        self.parameters, self.activations = data["parameters"], data["activations"]
        self.calls, self.parts = data["calls"], data.get("parts", ())
        self.mesh = mesh
        self.optimizer = make_optimizer(self.plan["optimizer"], learning_rate)
        roles = self.plan["roles"]
        batch = roles["data"] + roles["fsdp"] + roles["expert"]
        self.batch_spec = PartitionSpec(tuple(batch) or None)
        # Parameters in the host's memory.
        away = {name: e["memory"] for name, e in self.parameters.items() if "memory" in e}
        self.away = {} if mesh is None else away
        self.specs = {name: to_spec(e["spec"]) for name, e in self.parameters.items()}
        self.state_specs = {
            name: to_spec(e["optimizer_spec"])
            for name, e in self.parameters.items()
            if e.get("trained", True)
        }

    @property
    def units(self) -> int:
        """What the loss is a mean over: tokens, or images."""
        return int(self.plan["batch"] * (self.plan["sequence"] if self.model["vocab"] else 1))

    def shardings(self, specs: Any) -> Any:
        """Return specs as shardings on the mesh, or nothing without one."""
        if self.mesh is None:
            return None
        is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=is_spec)

    def places(self) -> Any:
        """Return where parameters lie, on the mesh and in which memory, or nothing without one."""
        found = self.shardings(self.specs)
        for name, memory in self.away.items():
            found[name] = found[name].with_memory_kind(memory)
        return found

    # The state: parameters in the plan's format, and what the optimizer keeps.

    def initial_parameters(self, key: Array) -> Params:
        """Return random first values, each made where it belongs."""
        params = {}
        for i, (name, entry) in enumerate(self.parameters.items()):
            noise = jax.random.normal(jax.random.fold_in(key, i), entry["shape"])
            value = entry["start"] * noise if entry["start"] else jnp.ones(entry["shape"])
            params[name] = value.astype(dtype(self.plan["parameters"]))
        return params

    def first_state(self, params: Params) -> Any:
        """Return the optimizer's first state, in float32 whatever the format of parameters."""
        return self.optimizer.init(in_float32(self.trained(params)))

    def trained(self, params: Params) -> Params:
        """Return the parameters that have gradients."""
        return {name: value for name, value in params.items() if name in self.state_specs}

    def state_places(self) -> Any:
        """Return the specs of the optimizer's state: like the parameters' own, where alike."""
        shapes, state, _ = self.whole_shapes()

        def place(path: Any, leaf: Any) -> Any:
            name = next((k.key for k in reversed(path) if getattr(k, "key", None) in shapes), None)
            alike = name is not None and leaf.shape == shapes[name].shape
            return self.state_specs[name] if alike else PartitionSpec()

        return jax.tree_util.tree_map_with_path(place, state)

    def state_shardings(self) -> Any:
        """Return `state_places` as shardings on the mesh, or nothing without one; arrays lie in the
        memory that the plan says."""
        if self.mesh is None:
            return None
        memory = self.plan.get("state_memory")

        def where(place: Any, leaf: Any) -> Any:
            return place.with_memory_kind(memory) if memory and leaf.ndim else place

        _, state, _ = self.whole_shapes()
        return jax.tree.map(where, self.shardings(self.state_places()), state)

    def start(self, key: Array) -> tuple[Params, Any]:
        """Return parameters and optimizer state on the mesh."""
        init = jax.jit(self.initial_parameters, out_shardings=self.places())
        return self.start_from(init(key))

    def start_from(self, params: Params) -> tuple[Params, Any]:
        """Return given parameters with the optimizer's first state."""
        state = jax.jit(self.first_state, out_shardings=self.state_shardings())(params)
        return params, state

    def whole_shapes(self) -> tuple[Params, Any, Params]:
        """Return parameters, state and batch as shapes over all devices."""
        kind = dtype(self.plan["parameters"])
        params = {n: jax.ShapeDtypeStruct(e["shape"], kind) for n, e in self.parameters.items()}
        batch = {
            name: jax.ShapeDtypeStruct(shape, integer)
            for name, (shape, integer) in batch_shapes(self.plan, self.model, self.parts).items()
        }
        return params, jax.eval_shape(self.first_state, params), batch

    def shapes(self) -> tuple[Params, Any, Params]:
        """Return `whole_shapes` with their shardings, to compile without arrays."""

        def placed(shape: Any, place: Any) -> Any:
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)

        params, state, batch = self.whole_shapes()
        if self.mesh is None:
            return params, state, batch
        here = NamedSharding(self.mesh, self.batch_spec)
        return (
            jax.tree.map(placed, params, self.places()),
            jax.tree.map(placed, state, self.state_shardings()),
            {name: placed(value, here) for name, value in batch.items()},
        )

    # Loss and gradients.

    def loss_and_gradients(self, params: Params, batch: Params) -> tuple[Array, Params]:
        """Return the mean loss of a batch and its gradients, sharded as the parameters, in the
        format in which they were summed; what is not trained has none."""
        if self.mesh is None:
            way = Whole(self.plan, self.model, self.parameters, self.activations)
            return self.accumulate(way, params, batch)
        if self.plan["execution"] == "partitioned":
            way = Partitioned(self.plan, self.model, self.parameters, self.activations, self.mesh)
            loss, gradients = self.accumulate(way, params, batch)
            keep = lax.with_sharding_constraint
            return loss, keep(gradients, self.shardings(self.state_specs))
        explicit = jax.shard_map(
            self.explicit,
            mesh=self.mesh,
            in_specs=(self.specs, self.batch_spec),
            out_specs=(PartitionSpec(), self.state_specs),
            check_vma=False,
        )
        return explicit(params, batch)

    def explicit(self, params: Params, batch: Params) -> tuple[Array, Params]:
        """What one device does: its share of the loss, then sums over devices."""
        way = Explicit(self.plan, self.model, self.parameters, self.activations)
        if self.plan["accumulation"] == "gathered" and way.stages.size == 1:
            loss, gradients = whole_first(way, params, partial(self.accumulate, batch=batch))
        elif self.plan["accumulation"] != "repeated" or way.stages.size > 1:
            count, units = self.plan["microbatches"], self.units
            parts = {name: self.split(way, value, count) for name, value in batch.items()}
            walk = scattered if self.plan["accumulation"] == "scattered" else in_phases
            loss, gradients = walk(way, self.calls, params, parts, units)
        else:
            loss, gradients = self.accumulate(way, params, batch)
        everyone = make_group(self.plan, [axis["name"] for axis in self.plan["mesh"]])
        with jax.named_scope("loss"):
            loss = total(loss, everyone)
        return loss, {name: self.reduce(name, g) for name, g in gradients.items()}

    def reduce(self, name: str, gradient: Array) -> Array:
        """Sum a gradient over the devices that hold the same weight.

        With optimizer state over the data axis, each device keeps only the part it updates.
        """
        entry = self.parameters[name]
        if "detached" in entry:  # zero on all devices
            for dim, (mine, wanted) in enumerate(
                zip(entry["spec"], entry["optimizer_spec"], strict=True)
            ):
                gradient = own(gradient, make_group(self.plan, wanted[len(mine) :]), dim)
            return gradient
        used = {axis for axes in entry["optimizer_spec"] for axis in axes}
        left = [axis["name"] for axis in self.plan["mesh"] if axis["name"] not in used]
        axes = [axis for axis in entry["axes"] if axis not in ("expert", "register")]
        if "embed" not in axes or len(axes) == 1:  # a vector
            with jax.named_scope("reduce_small_gradients"):
                return total(gradient, make_group(self.plan, left))
        gradient = gradient.astype(dtype(self.plan["reduce"]))
        roles = self.plan["roles"]
        replicas = roles["data"] + roles["expert"] + roles["context"]
        with jax.named_scope("reduce_gradients"):
            for dim, (mine, wanted) in enumerate(
                zip(entry["spec"], entry["optimizer_spec"], strict=True)
            ):
                extra = make_group(self.plan, wanted[len(mine) :])
                gradient = scatter(gradient, extra, dim)
            gradient = total(gradient, make_group(self.plan, [a for a in left if a in replicas]))
        with jax.named_scope("reduce_shared_gradients"):
            others = make_group(self.plan, [a for a in left if a not in replicas])
            return total(gradient, others)

    def accumulate(self, way: Whole, params: Params, batch: Params) -> tuple[Array, Params]:
        """Return loss and float32 gradients summed over the microbatches, one after another."""
        units, count, calls = self.units, self.plan["microbatches"], self.calls
        away = self.trained(self.away)
        if self.away:
            way = Fetching(way.plan, self.model, self.parameters, self.activations)
            calls = with_sums(calls, away)

        def loss(trained: Params, still: Params, part: Params) -> Array:
            return loss_sum(way, calls, {**still, **trained}, part, self.parts) / units

        def run(params: Params, part: Params) -> tuple[Array, Params]:
            trained = self.trained(params)
            sums = {name + SUMS: jnp.zeros(trained.pop(name).shape, jnp.float32) for name in away}
            still = {name: value for name, value in params.items() if name not in trained}
            value, gradients = jax.value_and_grad(loss)(trained | sums, still, part)
            return value, {
                name.removesuffix(SUMS): gradient.astype(jnp.float32)
                for name, gradient in gradients.items()
            }

        if count == 1:
            return run(params, batch)

        def body(sums: Any, part: Params) -> tuple[Any, None]:
            # Tied to its microbatch, so that weights gathered for one need not stay for the next.
            here = {name: value for name, value in params.items() if name not in self.away}
            here, part = lax.optimization_barrier((here, part))
            own = {**params, **here}
            # Apart from the sum, into which the TPU compiler would move the scatters, and fails.
            found = lax.optimization_barrier(run(own, part))
            return jax.tree.map(jnp.add, sums, found), None

        parts = {name: self.split(way, value, count) for name, value in batch.items()}
        own = self.trained(params)
        zeros = {name: jnp.zeros(value.shape, jnp.float32) for name, value in own.items()}
        return lax.scan(body, (jnp.zeros(()), zeros), parts)[0]

    def split(self, way: Whole, value: Array, count: int) -> Array:
        """Return a batch as [microbatch, batch / count, ...]; each device splits its own part."""
        parts = value.reshape(value.shape[0] // count, count, *value.shape[1:]).swapaxes(0, 1)
        if isinstance(way, Partitioned):
            spec = PartitionSpec(None, *self.batch_spec)
            return lax.with_sharding_constraint(parts, NamedSharding(self.mesh, spec))
        return parts

    # The step.

    def step(self, params: Params, state: Any, batch: Params) -> tuple[Params, Any, Array]:
        """Return parameters and state after one update, and the loss before it."""
        params, state, loss, _ = self.full_step(params, state, batch)
        return params, state, loss

    def full_step(self, params: Params, state: Any, batch: Params) -> Any:
        """Do one step and return the gradients too."""
        loss, gradients = self.loss_and_gradients(params, batch)
        mine, state = self.updated(gradients, state, self.trained(params))
        mine = {**params, **mine}
        if self.mesh is not None:
            mine = jax.tree.map(stored, mine, self.places())
            state = jax.tree.map(stored, state, self.state_shardings())
        return mine, state, loss, gradients

    def updated(self, gradients: Params, state: Any, params: Params) -> Any:
        """Return parameters and state after an update.

        Stacks of layers of which something lies in the host's memory are updated layer by layer,
        so that those of one are fetched at a time.
        """
        alone = self.layer_by_layer(params)
        rest = [name for name in params if name not in alone]
        done = [self.update(of(rest, gradients), of(rest, state), of(rest, params))]
        for length in {len(params[name]) for name in alone}:
            mine = [name for name in alone if len(params[name]) == length]
            update = partial(self.update, dropped=1)
            done.append(by_layer(update, of(mine, gradients), of(mine, (params, state))))
        return merged(done)

    def layer_by_layer(self, params: Params) -> list[str]:
        """Return the stacks of matrices that are updated so: not where they lie on stages, nor
        where state is split otherwise, nor by an optimizer that looks at whole arrays."""
        if self.mesh is None or (not self.away and "state_memory" not in self.plan):
            return []
        if self.plan["stages"] > 1 or self.plan["optimizer"].startswith("adafactor"):
            return []
        stacks = [name for name, entry in self.parameters.items() if entry["part"] == "block"]
        alike = [name for name in stacks if self.specs[name] == self.state_specs.get(name)]
        return [name for name in alike if params[name].ndim > 2]

    def update(
        self, gradients: Params, state: Any, params: Params, dropped: int = 0
    ) -> tuple[Params, Any]:
        """Update some arrays, without as many leading dimensions as are `dropped`."""
        params, state = jax.tree.map(on_device, (params, state))

        def at(specs: Any) -> Any:
            cut = jax.tree.map(lambda spec: PartitionSpec(*spec[dropped:]), of(params, specs))
            return self.shardings(cut)

        keep = lax.with_sharding_constraint
        if self.mesh is not None:  # update where the optimizer's state is
            params = keep(params, at(self.state_specs))
        with jax.named_scope("optimizer_update"):
            wide = in_float32(gradients), state, in_float32(params)
            updates, state = self.optimizer.update(*wide)
        with jax.named_scope("update"):  # where only a part was updated, it is gathered from here
            params = optax.apply_updates(params, updates)
        if self.mesh is not None:
            params, state = keep(params, at(self.specs)), keep(state, at(self.state_places()))
        return params, state

    def compiled(self, function: Any, *arguments: Any) -> Any:
        """Compile a step for its arguments (arrays or their shapes); it consumes its state."""
        options = self.plan["tpu_options"] if self.plan["platform"] == "tpu" else None
        if self.plan["platform"] == "cpu" and self.plan["weights_apart"]:
            options = ONE_BY_ONE
        jitted = jax.jit(function, donate_argnums=(0, 1))
        return jitted.lower(*arguments).compile(compiler_options=options)

    def batch(self, index: int) -> Params:
        """Return synthetic batch `index`, on the mesh."""
        arrays = whole_batch(self.plan, self.model, self.parts, index)
        if self.mesh is None:
            return {name: jnp.asarray(value) for name, value in arrays.items()}
        place = NamedSharding(self.mesh, self.batch_spec)
        return {
            name: jax.make_array_from_callback(value.shape, place, value.__getitem__)
            for name, value in arrays.items()
        }


def main(full: Data, tiny: Data | None) -> None:
    """Train on synthetic data: the full plan where its devices are, else its tiny copy."""
    parser = argparse.ArgumentParser(description=f"Train {full['model']['name']}")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", choices=("full", "tiny"), help="default: what the devices fit")
    parser.add_argument("--host-devices", type=int, help="run on so many devices made of the CPU")
    parser.add_argument("--distributed", action="store_true", help="one process a host of a pod")
    options = parser.parse_args()
    if options.host_devices:
        use_host_devices(options.host_devices)
    if options.distributed:
        jax.distributed.initialize()
    tiny = tiny or full
    sizes = {
        "full": math.prod(axis["size"] for axis in full["plan"]["mesh"]),
        "tiny": math.prod(axis["size"] for axis in tiny["plan"]["mesh"]),
    }
    there = jax.device_count()
    scale = options.scale or ("full" if there == sizes["full"] else "tiny")
    if there != sizes[scale]:
        raise SystemExit(
            f"the plan needs {sizes['full']} devices and its tiny copy {sizes['tiny']}, but there "
            f"are {there}; try --host-devices {sizes['tiny']}"
        )
    data = full if scale == "full" else tiny
    mesh = build_mesh(data["plan"])
    trainer = Trainer(data, mesh)
    with jax.set_mesh(mesh):
        params, state = trainer.start(jax.random.key(0))
        step = trainer.compiled(trainer.step, params, state, trainer.batch(0))
        for index in range(options.steps):
            begun = time.perf_counter()
            params, state, loss = step(params, state, trainer.batch(index % SYNTHETIC_BATCHES))
            loss = float(loss)
            print(f"step {index}: loss {loss:.4f}, {time.perf_counter() - begun:.3f} s", flush=True)
