"""The tables of `shardsim.views` as pandas frames, with units in the column names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ParamSpec

from shardsim.cost.predict import Prediction
from shardsim.planner.found import SearchResult
from shardsim.report.roofline import matmuls
from shardsim.report.timeline import spans
from shardsim.views import evidence, step, what_ifs
from shardsim.views.plans import PLANS
from shardsim.views.table import Table, table
from shardsim.views.write import frame

if TYPE_CHECKING:
    import pandas as pd

P = ParamSpec("P")


def framed(make: Callable[P, Table]) -> Callable[P, pd.DataFrame]:
    """Return a function that makes the same table as a frame."""

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> pd.DataFrame:
        return frame(make(*args, **kwargs))

    return made


def plans_frame(items: SearchResult | Iterable[Prediction]) -> pd.DataFrame:
    """Return one row per plan, in the order given.

    >>> from shardsim.cost.predict import predict
    >>> from shardsim.plan import load_plan
    >>> list(plans_frame([predict(load_plan("vit-22b-published-tp8"))]).chips)
    [1024]
    """
    return frame(table(PLANS, items.predictions if isinstance(items, SearchResult) else items))


computes_frame = framed(step.operations)
collectives_frame = framed(step.collectives)
matmuls_frame = framed(matmuls)
timeline_frame = framed(spans)
ablation_frame = framed(what_ifs.ablations)
sensitivity_frame = framed(what_ifs.sensitivities)
sweep_frame = framed(what_ifs.swept)
validation_frame = framed(evidence.published)
compiled_frame = framed(evidence.compiled)
