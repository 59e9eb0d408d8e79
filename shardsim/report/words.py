"""Numbers as sentences: what limits a plan, and what would change it."""

from __future__ import annotations

from collections.abc import Sequence

from shardsim.answers.why_not import VISIBLE
from shardsim.cost.predict import Prediction
from shardsim.cost.sensitivity import Sensitivity
from shardsim.cost.words import figure_words
from shardsim.units import show_percent, show_time


def count_words(count: float) -> str:
    """Return a large count as people say it.

    >>> count_words(4e9), count_words(1.5e12), count_words(65536)
    ('4 billion', '1.5 trillion', '65,536')
    """
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.4g} {word}"
    return f"{count:,.0f}"


def days_words(days: float) -> str:
    """Return a training time in the unit that suits it.

    >>> days_words(0.02), days_words(12.3), days_words(2000)
    ('29 minutes', '12.3 days', '2,000 days')
    """
    if days < 1 / 24:
        return f"{days * 1440:.0f} minutes"
    if days < 2:
        return f"{days * 24:.1f} hours"
    return f"{days:.1f} days" if days < 1000 else f"{days:,.0f} days"


def limits_sentence(item: Prediction, figures: Sequence[Sensitivity]) -> str:
    """Return what limits the plan, in one sentence."""
    share = f"{100 * abs(figures[0].elasticity):.0f} %"
    return f"Limited by: {item.limited_by}; {share} of the step time goes with it."


def sensitivity_sentences(item: Prediction, figures: Sequence[Sensitivity]) -> list[str]:
    """Return one sentence per figure that matters, and one for those that do not."""
    lines = []
    idle = []
    for figure in figures:
        word = figure_words(figure.figure, item.plan.machine.chip)
        change = figure.step_time_s_at_110 / item.step_time_s - 1
        if abs(change) < VISIBLE:
            idle.append(word)
            continue
        more = "longer" if "latency" in word or word.startswith("start") else "more"
        way = "shorter" if change < 0 else "longer"
        lines.append(
            f"10 % {more} {word} would give a step of {show_time(figure.step_time_s_at_110)}, "
            f"{100 * abs(change):.1f} % {way}, and an MFU of {show_percent(figure.mfu_at_110)}."
        )
    if idle:
        lines.append(f"10 % more or less of these changes nothing: {', '.join(idle)}.")
    return lines
