"""Published effects of techniques as numbers, to stand beside what the formulas give."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedEffect:
    """What leaving a technique out does to the step time, as fractions: low to high."""

    low: float
    high: float
    source: str


# "15 % faster" and "+3 % utilisation" are read as that much more step time without it.
PUBLISHED_EFFECTS: dict[str, PublishedEffect] = {
    "parallel layers": PublishedEffect(
        low=0.15, high=0.15, source="PaLM, arXiv 2204.02311: about 15 % faster at large scale"
    ),
    "bias removal": PublishedEffect(
        low=0.03, high=0.03, source="ViT-22B announcement: 3 % more utilisation"
    ),
    "asynchronous overlap": PublishedEffect(
        low=0.14,
        high=0.38,
        source="ASPLOS 2023, doi 10.1145/3567955.3567959: 1.14x to 1.38x on TPU v4",
    ),
}
