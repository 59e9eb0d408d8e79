"""The tables of `shardsim.views` as pandas frames, with units in the column names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shardsim.cost.predict import Prediction
from shardsim.planner.search import SearchResult
from shardsim.report.roofline import matmuls
from shardsim.report.timeline import spans
from shardsim.views import evidence, step, what_ifs
from shardsim.views.plans import PLANS
from shardsim.views.table import table
from shardsim.views.write import frame

if TYPE_CHECKING:
    import pandas as pd

    from shardsim.cost.sensitivity import Sensitivity
    from shardsim.planner.whatif import Ablation
    from shardsim.validate.runs import Validation
    from shardsim.xla.tpu.agreement import Pair


def plans_frame(items: SearchResult | Iterable[Prediction]) -> pd.DataFrame:
    """Return one row per plan, in the order given.

    >>> from shardsim.cost.predict import predict
    >>> from shardsim.plan import load_plan
    >>> list(plans_frame([predict(load_plan("vit-22b-published-tp8"))]).chips)
    [1024]
    """
    return frame(table(PLANS, items.predictions if isinstance(items, SearchResult) else items))


def computes_frame(item: Prediction) -> pd.DataFrame:
    """Return every computation of a step on one device, the longest first."""
    return frame(step.operations(item))


def collectives_frame(item: Prediction) -> pd.DataFrame:
    """Return the collectives of a step on one device, the longest first."""
    return frame(step.collectives(item))


def matmuls_frame(item: Prediction) -> pd.DataFrame:
    """Return every matmul of a step against the roofline of one device."""
    return frame(matmuls(item))


def timeline_frame(item: Prediction) -> pd.DataFrame:
    """Return the tasks of one layer's forward and backward pass, with start and duration."""
    return frame(spans(item))


def ablation_frame(base: Prediction, items: Sequence[Ablation]) -> pd.DataFrame:
    """Return what each technique is worth; `step_change` is a fraction of the plan's step."""
    return frame(what_ifs.ablations(base, items))


def sensitivity_frame(base: Prediction, items: Sequence[Sensitivity]) -> pd.DataFrame:
    """Return the elasticity of the step time to each figure of the chip."""
    return frame(what_ifs.sensitivities(base, items))


def sweep_frame(
    rows: Iterable[tuple[Mapping[str, Any], Prediction | None, str]],
) -> pd.DataFrame:
    """Return a sweep, one row per combination; what makes no legal plan says why."""
    return frame(what_ifs.swept(rows))


def validation_frame(result: Validation) -> pd.DataFrame:
    """Return published runs beside their predictions, in tokens/s/chip; errors are fractions."""
    return frame(evidence.published(result))


def compiled_frame(found: Sequence[Pair]) -> pd.DataFrame:
    """Return the kept compilations of the TPU compiler beside their predictions."""
    return frame(evidence.compiled(found))
