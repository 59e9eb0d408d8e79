"""Event simulation on the torus: links, overlap, contention, stragglers, failures.

SimPy and networkx are imported here and nowhere else, so that planning does not need them.
"""

from shardsim.simulate.compiled import CompiledSimulation, simulate_compiled
from shardsim.simulate.engine import Contention
from shardsim.simulate.outcome import Outcome
from shardsim.simulate.perturb import Perturbation
from shardsim.simulate.reading import twisted, what_if
from shardsim.simulate.step import simulate_plan
from shardsim.simulate.topology import Fault

__all__ = [
    "CompiledSimulation",
    "Contention",
    "Fault",
    "Outcome",
    "Perturbation",
    "simulate_compiled",
    "simulate_plan",
    "twisted",
    "what_if",
]
