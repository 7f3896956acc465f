"""docs/formulas.py finds the formulas of a docstring, and leaves words, code and numbers as they are."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from gradsurg.normalize import NORMALIZERS
from gradsurg.surgery import SURGERIES

PATH = Path(__file__).parents[2] / "docs" / "formulas.py"


@pytest.fixture(scope="module")
def dollars():
    spec = importlib.util.spec_from_file_location("formulas", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.dollars


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("u = Σ r_i g_i, no surgery", r"$u = \sum r_{i} g_{i}$, no surgery"),
        ("½ λᵀGλ + λᵀGr, solved", r"$\tfrac12 \lambda^{T} G \lambda + \lambda^{T} G r$, solved"),
        ("‖d − g_0‖ ≤ c ‖g_0‖", r"$\lVert d - g_{0} \rVert \le c \lVert g_{0} \rVert$"),
        ("|w_i ‖g_i‖ − G|", r"$\lvert w_{i} \lVert g_{i} \rVert - G \rvert$"),
        ("{u : ⟨u, g_i⟩ ≥ 0 for all i}", r"$\{ u \colon \langle u , g_{i} \rangle \ge 0 \ \text{for all}\ i \}$"),
        ("(r_i / w_i)^(1/α) > 0", r"$( r_{i} / w_{i} )^{1 / \alpha} > 0$"),
        ("E = g_ip² / √(Σ g_ip²)", r"$E = g_{i p}^{2} / \sqrt{\sum g_{i p}^{2}}$"),
        ("s_i = (mean of the norms) / ‖g_i‖", r"$s_{i} = ( \text{mean of the norms} ) / \lVert g_{i} \rVert$"),
        ("only u = 0 (Pareto stationary)", "only $u = 0$ (Pareto stationary)"),
        ("φ̂_ij and r̃ and ĝ", r"$\hat{\varphi}_{i j}$ and $\tilde{r}$ and $\hat g$"),
    ],
)
def test_a_formula_becomes_latex(dollars, text, expected):
    assert dollars(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "A task whose gradient is 0 gets a weight of 1e-30.",
        "everybody's step, like 1 / steps",
        '`lr` = 10, curvature="parameter" and wrap() with [0, 1)',
        "Désidéri 2012, e.g. on an H100; frank_wolfe",
        "Task name -> loss, written to p.grad",
    ],
)
def test_prose_stays_as_it_is(dollars, text):
    assert dollars(text) == text


@pytest.mark.parametrize(("name", "cls"), [*SURGERIES.items(), *NORMALIZERS.items()])
def test_formulas_of_every_method_are_whole(dollars, name, cls):
    """No symbol of a formula is left outside of one, and each formula closes what it opens."""
    text = dollars(inspect.getdoc(cls).partition("Example:")[0])
    assert not re.search("[Σ⟨⟩‖λ∝≥≤]", re.sub(r"\$[^$]*\$", "", text)), name
    for formula in re.findall(r"\$([^$]*)\$", text):
        assert formula.count("{") == formula.count("}"), formula
        assert formula.count(r"\lVert") == formula.count(r"\rVert"), formula
        assert formula.count(r"\langle") == formula.count(r"\rangle"), formula
