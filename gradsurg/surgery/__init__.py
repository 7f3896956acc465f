"""One file a published method: m x m Gramian -> m weights."""

from __future__ import annotations

from gradsurg.errors import choose
from gradsurg.surgery.aligned_mtl import AlignedMTL
from gradsurg.surgery.base import Surgery
from gradsurg.surgery.cagrad import CAGrad
from gradsurg.surgery.cone import Cone
from gradsurg.surgery.config import ConFIG
from gradsurg.surgery.cr_mogm import CRMOGM
from gradsurg.surgery.elementwise import ElementwiseSurgery
from gradsurg.surgery.excess_mtl import ExcessMTL
from gradsurg.surgery.fairgrad import FairGrad
from gradsurg.surgery.graddrop import GradDrop
from gradsurg.surgery.gradvac import GradVac
from gradsurg.surgery.imtl_g import IMTLG
from gradsurg.surgery.krum import Krum
from gradsurg.surgery.mean import Mean
from gradsurg.surgery.mgda import MGDA
from gradsurg.surgery.modo import MoDo
from gradsurg.surgery.nash_mtl import NashMTL
from gradsurg.surgery.pcd import PCD
from gradsurg.surgery.pcgrad import PCGrad
from gradsurg.surgery.random import Random
from gradsurg.surgery.sdmgrad import SDMGrad
from gradsurg.surgery.sum import Sum
from gradsurg.surgery.trimmed_mean import TrimmedMean
from gradsurg.surgery.upgrad import UPGrad

__all__ = [
    "CRMOGM",
    "IMTLG",
    "MGDA",
    "PCD",
    "SURGERIES",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "Cone",
    "ElementwiseSurgery",
    "ExcessMTL",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "Krum",
    "Mean",
    "MoDo",
    "NashMTL",
    "PCGrad",
    "Random",
    "SDMGrad",
    "Sum",
    "Surgery",
    "TrimmedMean",
    "UPGrad",
    "resolve_surgery",
]

SURGERIES: dict[str, type[Surgery]] = {
    cls.name: cls
    for cls in (
        Sum,
        Mean,
        Cone,
        UPGrad,
        MGDA,
        PCGrad,
        GradVac,
        CAGrad,
        IMTLG,
        NashMTL,
        FairGrad,
        AlignedMTL,
        ConFIG,
        SDMGrad,
        MoDo,
        CRMOGM,
        ExcessMTL,
        PCD,
        Krum,
        TrimmedMean,
        GradDrop,
        Random,
    )
}


def resolve_surgery(surgery: str | Surgery) -> Surgery:
    """Return the Surgery that a name stands for; an instance is returned as it is."""
    if isinstance(surgery, Surgery):
        return surgery
    return choose("surgery", surgery, SURGERIES, "a gradsurg.surgery.Surgery instance")()
