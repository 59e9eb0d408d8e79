"""Reading scheduled TPU programs: text to module, module to Program. Needs no JAX."""
