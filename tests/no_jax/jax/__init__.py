"""Stands before JAX on the path of the fast tier: a test there that imports JAX fails."""

raise RuntimeError("a test of the fast tier imports JAX: see STARTS_JAX in tests/conftest.py")
