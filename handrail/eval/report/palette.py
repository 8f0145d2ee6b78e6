"""The colors of reports and plots, by name; in the report they are CSS variables."""

from __future__ import annotations

LIGHT = {
    "paper": "#ffffff", "panel": "#f6f7f8", "ink": "#1b1f24",
    "muted": "#59636e", "grid": "#d5dae0", "link": "#1f5fa8",
    "all-wrong": "#d9764a", "mixed": "#c9ced6", "all-right": "#4fa37c",
    "series-0": "#1f77b4", "series-1": "#d9650a", "series-2": "#2a8a2a",
    "series-3": "#cc2a2a", "series-4": "#8457b3",
    "series-5": "#8c564b", "series-6": "#c2479a", "series-7": "#6b6b6b",
    "series-8": "#86861a", "series-9": "#11838f",
}  # fmt: skip
DARK = {
    "paper": "#14171b", "panel": "#1d2127", "ink": "#e7eaee",
    "muted": "#a0a9b4", "grid": "#363d46", "link": "#86b7ef",
    "all-wrong": "#b85f38", "mixed": "#58616d", "all-right": "#3c8664",
    "series-0": "#74b4e8", "series-1": "#ffa552", "series-2": "#6fce6f",
    "series-3": "#ff8585", "series-4": "#c6a3ec",
    "series-5": "#cda196", "series-6": "#f19ad2", "series-7": "#bdbdbd",
    "series-8": "#cfcf5c", "series-9": "#5fd0dc",
}  # fmt: skip
SERIES = sum(name.startswith("series-") for name in LIGHT)
"""The number of colors for methods; further methods reuse them with other dashes and markers."""


def css() -> str:
    """Return the colors as CSS variables; the printed page is always light."""
    light, dark = (
        " ".join(f"--{name}: {color};" for name, color in colors.items()) for colors in (LIGHT, DARK)
    )
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
