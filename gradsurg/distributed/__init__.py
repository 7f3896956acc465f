"""Several ranks: torch.distributed as it is, made exact for task gradients."""

from gradsurg.distributed.check_sync import check_sync
from gradsurg.distributed.collectives import RanksError, fingerprint
from gradsurg.distributed.detect import Ranks, several_ranks
from gradsurg.distributed.layout import ALONE, Layout
from gradsurg.distributed.modules import check_model, refuse_optimizer
from gradsurg.distributed.session import Traffic
from gradsurg.linalg.measure import Measure

__all__ = [
    "ALONE",
    "Layout",
    "Measure",
    "Ranks",
    "RanksError",
    "Traffic",
    "check_model",
    "check_sync",
    "fingerprint",
    "refuse_optimizer",
    "several_ranks",
]
