"""Pictures of a history, and of paths in two dimensions. They need matplotlib, the extra gradsurg[plot].

Each function draws into `ax`, or into a new figure, and returns the Axes: `ax.figure.savefig("a.png")`. No display is
needed. Tasks differ in lightness, dashes and markers, not in hue alone; larger shares are darker.

Example:
    >>> import torch, gradsurg, gradsurg.plot
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
    >>> history = gradsurg.History(optimizer, every=1)
    >>> for _ in range(5):
    ...     optimizer.backward({"a": w[0] ** 2, "b": (w[0] - w[1] - 3) ** 2})
    ...     optimizer.step()
    >>> gradsurg.plot.conflict_matrix(history).get_title()
    'Steps in conflict (above 90°), and mean angle'
    >>> gradsurg.plot.angles(history, of="direction").get_ylabel()
    'degrees'
"""

from gradsurg.monitor.plot.matrices import conflict_matrix, layers
from gradsurg.monitor.plot.over_time import angles, conflicts, losses, norms, weights
from gradsurg.monitor.plot.paths import trajectory

__all__ = ["angles", "conflict_matrix", "conflicts", "layers", "losses", "norms", "trajectory", "weights"]
