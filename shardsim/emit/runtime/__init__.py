"""What an exported train.py is made of: these modules are its text, and run as they are here too.

They import JAX, optax and each other, nothing else of shardsim; `shardsim.emit.jax_code` joins
them into one file. `host` makes
devices of the CPU, `config` has the groups of devices, `collectives` the rings, `attention`
its kernel, `whole` the operations on one device, `explicit` and `partitioned` the same on many,
`model` the Transformer, `train` the step.
"""
