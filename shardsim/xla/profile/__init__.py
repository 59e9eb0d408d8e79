"""Profiles of real steps: traces read, lined up with a plan's Schedule, and learned from."""
