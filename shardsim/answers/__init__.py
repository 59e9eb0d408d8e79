"""Answers about plans: what limits them, what would help, which slice, what it costs."""
