"""Event simulation on the torus: links, overlap, contention, stragglers, failures.

SimPy and networkx are imported here and nowhere else, so that planning does not need them.
"""

from shardsim.simulate.step import Simulation, simulate_plan

__all__ = ["Simulation", "simulate_plan"]
