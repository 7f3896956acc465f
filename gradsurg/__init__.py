"""Train one PyTorch model on several losses: wrap any optimizer, and no update hurts a task to first order."""

from gradsurg import loggers, plot
from gradsurg._version import __version__
from gradsurg.compiled import prepare_compile
from gradsurg.distributed import check_sync
from gradsurg.errors import MultiTaskError
from gradsurg.functional import combine, weights
from gradsurg.history import History
from gradsurg.methods import methods
from gradsurg.normalize import Normalizer
from gradsurg.optimizer import MultiTaskOptimizer, backward, report, total
from gradsurg.problem import Problem
from gradsurg.report import Report
from gradsurg.surgery import Surgery
from gradsurg.wrapping import unwrap, wrap

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
