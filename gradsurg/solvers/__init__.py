"""The two small convex programs behind every method here, solved exactly: nonnegative (dual cone) and simplex."""

from gradsurg.solvers.nonnegative import nonnegative
from gradsurg.solvers.problem import HOST, Solvers
from gradsurg.solvers.rows import project_rows
from gradsurg.solvers.simplex import simplex

__all__ = ["HOST", "Solvers", "nonnegative", "project_rows", "simplex"]
