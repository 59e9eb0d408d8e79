"""The utilisation of one step in every way in which FLOPs have been counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardsim.cost.mfu import mfu_of
from shardsim.cost.predict import Prediction
from shardsim.cost.real import flops_per_token
from shardsim.model import Accounting

COUNTS = {
    Accounting.SIX_N: "6N: weights alone, no attention",
    Accounting.PALM: "6N + 12LHQT: attention in full (PaLM); shardsim's own",
    Accounting.PALM_CAUSAL: "6N + 6LHQT: attention halved, as a causal mask needs",
    Accounting.MAXTEXT_2024: "3 x forward matmuls, attention in full: MaxText before July 2025",
    Accounting.MAXTEXT_2025: "the same, attention halved: MaxText since July 2025",
    Accounting.MAXTEXT_MIXED: "the same, half of each window too: MaxText of early 2025",
    Accounting.MEGATRON: "the same, attention in full, vocabulary padded to 128s: Megatron",
}
HFU = "hfu"


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """What share of the peak a step reaches, by one way to count."""

    name: str  # as `Accounting` and runs files call it; "hfu"
    counts: str
    flops_per_token: float
    utilisation: float

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "convention": self.name,
            "utilisation": self.utilisation,
            "flops_per_token": self.flops_per_token,
            "counts": self.counts,
        }


def utilisations(item: Prediction) -> list[Utilisation]:
    """Return the utilisation of a step by every convention, HFU last.

    HFU counts what the chip executes: what is computed again too, and of masked attention what the
    kernel does not skip. So it may be below an MFU that counts what is never computed.
    """
    plan = item.plan
    found = [
        Utilisation(
            name=accounting.value,
            counts=COUNTS[accounting],
            flops_per_token=flops_per_token(plan, accounting),
            utilisation=mfu_of(plan, item.step_time_s, accounting),
        )
        for accounting in Accounting
    ]
    peak = plan.machine.chip.peak(plan.precision.compute)
    executed = item.hfu * peak / item.tokens_per_s_per_chip
    counts = "all that the chip executes, recomputation too (HFU)"
    hfu = Utilisation(name=HFU, counts=counts, flops_per_token=executed, utilisation=item.hfu)
    return [*found, hfu]
