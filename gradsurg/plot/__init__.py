"""Pictures of a history, and of paths in two dimensions; needs matplotlib, the extra gradsurg[plot].

Each function draws into `ax`, or into a figure of its own, and returns the Axes: `ax.figure.savefig("a.png")`. No
display is needed. Tasks differ in lightness, dashes and markers, not in hue alone; shares are darker where larger.
"""

from gradsurg.plot.matrices import conflict_matrix, layers
from gradsurg.plot.over_time import angles, conflicts, losses, norms, weights
from gradsurg.plot.paths import trajectory

__all__ = ["angles", "conflict_matrix", "conflicts", "layers", "losses", "norms", "trajectory", "weights"]
