"""Train one PyTorch model on several losses: wrap any optimizer, and no update hurts a task to first order."""

import sys

from gradsurg.distributed.check_sync import check_sync
from gradsurg.errors import MultiTaskError
from gradsurg.gradients.compile import prepare_compile
from gradsurg.monitor import loggers, plot
from gradsurg.monitor.history import History
from gradsurg.normalize import Normalizer
from gradsurg.optimizer.optimizer import MultiTaskOptimizer
from gradsurg.optimizer.proxies import backward, report, total
from gradsurg.optimizer.report import Report
from gradsurg.optimizer.wrap import unwrap, wrap
from gradsurg.solvers.problem import Problem
from gradsurg.surgery import Surgery
from gradsurg.surgery.catalogue import methods
from gradsurg.surgery.functional import combine, weights
from gradsurg.surgery.steps import Steps

__version__ = "0.1.0.dev0"

# Both live in monitor/; `import gradsurg.plot` and `from gradsurg.loggers import TensorBoard` find them here too.
sys.modules[f"{__name__}.plot"] = plot
sys.modules[f"{__name__}.loggers"] = loggers

__all__ = [
    "History",
    "MultiTaskError",
    "MultiTaskOptimizer",
    "Normalizer",
    "Problem",
    "Report",
    "Steps",
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
