"""Write Unicode mathematics in LaTeX, so that ``x² ≥ ½`` and its LaTeX are one answer."""

from __future__ import annotations

import re

GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "θ": "theta", "λ": "lambda",
    "μ": "mu", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi", "ω": "omega",
    "Γ": "Gamma", "Δ": "Delta", "Σ": "Sigma", "Φ": "Phi", "Ω": "Omega",
}  # fmt: skip
COMMANDS = {
    "·": "cdot", "⋅": "cdot", "∙": "cdot", "×": "times", "÷": "div", "±": "pm", "∓": "mp", "∞": "infty",
    "≤": "leq", "≥": "geq", "⩽": "leq", "⩾": "geq", "≠": "neq", "≈": "approx", "∪": "cup", "∩": "cap",
    "∈": "in", "∅": "emptyset", "ℝ": "mathbb{R}", "ℤ": "mathbb{Z}", "ℚ": "mathbb{Q}", "ℕ": "mathbb{N}",
}  # fmt: skip
SIGNS = {
    "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2044": "/", "\u2215": "/",
    "\u2236": ":", "\u00a0": " ", "\u202f": " ", "\u2009": " ", "\u3000": " ",
}  # fmt: skip
FULL_WIDTH = {chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)}
FRACTIONS = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5),
    "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8),
}  # fmt: skip
CHARACTERS = str.maketrans(
    SIGNS
    | FULL_WIDTH
    | {character: rf"\{name} " for character, name in COMMANDS.items()}
    | {character: rf"\frac{{{top}}}{{{bottom}}}" for character, (top, bottom) in FRACTIONS.items()}
)
# A longer run of Greek letters is a word in Greek.
GREEK_RUN = re.compile(r"[\u0370-\u03ff]+")
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()")
RAISED_RUN = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+")
LOWERED_RUN = re.compile(r"[₀₁₂₃₄₅₆₇₈₉₊₋₍₎]+")
DEGREE = re.compile(r"\^?°|\^?\\degree(?![A-Za-z])")
ROOT = re.compile(
    r"(?P<sign>[√∛]) ?(?:\((?P<group>[^()]*)\)|\{(?P<braces>[^{}]*)\}|(?P<bare>\d+(?:\.\d+)?|[a-zA-Z]))?"
)


def to_latex(text: str) -> str:
    """Replace Unicode's mathematical characters with LaTeX; all other text stays as it is."""
    if text.isascii() and r"\degree" not in text:
        return text
    text = DEGREE.sub(r"^\\circ ", text)
    text = RAISED_RUN.sub(lambda run: f"^{{{run.group().translate(RAISED)}}}", text)
    text = LOWERED_RUN.sub(lambda run: f"_{{{run.group().translate(LOWERED)}}}", text)
    return GREEK_RUN.sub(_greek, ROOT.sub(_root, text)).translate(CHARACTERS)


def _root(match: re.Match[str]) -> str:
    under = match["group"] or match["braces"] or match["bare"]
    root = r"\sqrt" if match["sign"] == "√" else r"\sqrt[3]"
    return f"{root}{{{under}}}" if under else f"{root} "


def _greek(run: re.Match[str]) -> str:
    letters = run.group()
    if len(letters) > 2:
        return letters
    return "".join(rf"\{GREEK[letter]} " if letter in GREEK else letter for letter in letters)
