"""Several ranks: torch.distributed as it is, made exact for task gradients."""

from gradsurg.distributed.check import check_sync
from gradsurg.distributed.layout import ALONE, Layout, Measure
from gradsurg.distributed.modules import check_model, refuse_optimizer
from gradsurg.distributed.ranks import Ranks, several_ranks
from gradsurg.distributed.talk import RanksError, fingerprint
from gradsurg.distributed.traffic import Traffic

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
