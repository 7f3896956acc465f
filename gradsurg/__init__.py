"""Train one PyTorch model on several losses: wrap any optimizer, and no update hurts a task to first order."""

from gradsurg import loggers, plot
from gradsurg._version import __version__
from gradsurg.gradients.compile import prepare_compile
from gradsurg.distributed.check_sync import check_sync
from gradsurg.errors import MultiTaskError
from gradsurg.surgery.functional import combine, weights
from gradsurg.monitor.history import History
from gradsurg.surgery.catalogue import methods
from gradsurg.normalize import Normalizer
from gradsurg.optimizer.optimizer import MultiTaskOptimizer, backward, report, total
from gradsurg.solvers.problem import Problem
from gradsurg.optimizer.report import Report
from gradsurg.surgery import Surgery
from gradsurg.optimizer.wrap import unwrap, wrap

__all__ = [
    "History",
    "MultiTaskError",
    "MultiTaskOptimizer",
    "Normalizer",
    "Problem",
    "Report",
    "Surgery",
    "__version__",
    "backward",
    "check_sync",
    "combine",
    "loggers",
    "methods",
    "plot",
    "prepare_compile",
    "report",
    "total",
    "unwrap",
    "weights",
    "wrap",
]
