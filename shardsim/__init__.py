"""Predict the MFU of sharding plans on TPU slices, search for the best plan, and run it in JAX."""

__version__ = "0.1.0"
