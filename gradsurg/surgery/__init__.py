"""The table of surgeries, one file per published method: from the m x m Gramian to m weights. For users and options."""

from __future__ import annotations

from gradsurg.errors import choose
from gradsurg.surgery.base import ElementwiseSurgery, Surgery
from gradsurg.surgery.methods.aligned_mtl import AlignedMTL
from gradsurg.surgery.methods.cagrad import CAGrad
from gradsurg.surgery.methods.cone import Cone
from gradsurg.surgery.methods.config import ConFIG
from gradsurg.surgery.methods.cr_mogm import CRMOGM
from gradsurg.surgery.methods.excess_mtl import ExcessMTL
from gradsurg.surgery.methods.fairgrad import FairGrad
from gradsurg.surgery.methods.graddrop import GradDrop
from gradsurg.surgery.methods.gradvac import GradVac
from gradsurg.surgery.methods.imtl_g import IMTLG
from gradsurg.surgery.methods.krum import Krum
from gradsurg.surgery.methods.mean import Mean
from gradsurg.surgery.methods.mgda import MGDA
from gradsurg.surgery.methods.modo import MoDo
from gradsurg.surgery.methods.nash_mtl import NashMTL
from gradsurg.surgery.methods.pcd import PCD
from gradsurg.surgery.methods.pcgrad import PCGrad
from gradsurg.surgery.methods.random import Random
from gradsurg.surgery.methods.sdmgrad import SDMGrad
from gradsurg.surgery.methods.sum import Sum
from gradsurg.surgery.methods.trimmed_mean import TrimmedMean
from gradsurg.surgery.methods.upgrad import UPGrad

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
