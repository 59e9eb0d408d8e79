"""The ops that models are made of, one file each: what an op is, costs, keeps, and its JAX.

The first half of a file adds the op to a list (`shardsim.graph.build.Builder`): its arrays, what
its gradient reads, what it moves through HBM. The second half is what the emitted program runs for
it, found by name (`@runs`). Planning never runs that half, so JAX is imported when it is called.
"""
