"""The colours of every picture and page, on light and on dark paper.

Series differ in lightness, so that they are told apart in greyscale and by the colour-blind.
"""

from __future__ import annotations

# name -> (on light, on dark). Pages have each as a variable, `--name`.
COLOURS: dict[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#5f6875", "#a3abb8"),
    "grid": ("#d9dde3", "#3a404a"),
    "paper": ("#fdfdfe", "#16191e"),
    "c0": ("#17406d", "#9cc7f0"),
    "c1": ("#c4562f", "#e2764e"),
    "c2": ("#2f9c8f", "#2f857b"),
    "c3": ("#e8b64a", "#f2cb6c"),
    "c4": ("#7a4b8c", "#c39ad3"),
    "c5": ("#b9c2ce", "#5d6675"),
}
# Of pages alone: what lies on paper, and warnings.
PAGE: dict[str, tuple[str, str]] = {"soft": ("#f1f3f6", "#1f242b"), "warn": ("#a33b12", "#ff9d73")}


def root_css() -> str:
    """Return the style rule that gives a page all colours, those of dark paper where it is dark."""
    light, dark = (
        "".join(f"--{name}:{pair[which]};" for name, pair in (COLOURS | PAGE).items())
        for which in (0, 1)
    )
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    )
