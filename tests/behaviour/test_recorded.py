"""The library does what it did when recorded/ was written: to the bit where the computer computes alike.

Whether it does is told by a fingerprint (see record.py). Elsewhere the results must agree up to TOLERANCE.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.behaviour.cases import CHECKPOINTS, RUNS
from tests.behaviour.record import Record, do, fingerprint, load

FOLDER = Path(__file__).parent / "recorded"

# Of the largest number of its kind in a run. With other instructions (torch's ATEN_CPU_CAPABILITY=default, MKL_CBWR=
# COMPATIBLE, ONEDNN_MAX_CPU_ISA=SSE41) float32 differs by 1e-7 in one operation, and 8e-6 at most after all steps:
# Adam divides gradients by their own size, so that small ones, which are mostly rounding, count as much as large ones.
# Changes of what the library does are orders of magnitude larger.
TOLERANCE = 5e-5


@functools.cache
def recorded() -> dict[str, Any]:
    result: dict[str, Any] = load(FOLDER / "runs.pt.gz")
    return result


@functools.cache
def checkpoints() -> dict[str, Any]:
    result: dict[str, Any] = load(FOLDER / "checkpoints.pt.gz")
    return result


@functools.cache
def computes_alike() -> bool:
    return bool(recorded()["fingerprint"] == fingerprint())


def check(now: Record, then: Record) -> None:
    exact = computes_alike()
    found = differences(now, then, exact)
    bound = (
        "to the bit" if exact else f"within {TOLERANCE} of the largest number, on a computer that computes otherwise"
    )
    assert not found, "\n".join([f"results must be as recorded, {bound}:", *found[:10]])


def differences(now: Record, then: Record, exact: bool) -> list[str]:
    """Return a line for everything in which two records differ: to the bit, or beyond the tolerance.

    Steps are counted from the first that both records have. NaN equals NaN; 0 and -0 differ where `exact`.
    """
    found = []
    for what in ("tasks", "absent"):
        for step, (ours, theirs) in enumerate(zip(getattr(now, what), getattr(then, what), strict=True)):
            if ours != theirs:
                found.append(f"{what}, step {step}: {ours}, recorded {theirs}")
    for what, vectors in then.numbers.items():
        largest = _largest(vectors)
        for step, (a, b) in enumerate(zip(now.numbers[what], vectors, strict=True)):
            line = _difference(a, b, exact, largest)
            if line:
                found.append(f"{what}, step {step}: {line}")
    for what, hashes in then.hashes.items() if exact else ():
        for step, (ours, theirs) in enumerate(zip(now.hashes[what], hashes, strict=True)):
            if ours != theirs:
                found.append(f"{what}, step {step}: some number is another one; only a sample of them is recorded")
    return found


def _largest(vectors: Sequence[Tensor]) -> float:
    numbers = torch.cat([v.double() for v in vectors]).abs()
    return float(numbers[numbers.isfinite()].max()) if bool(numbers.isfinite().any()) else 0.0


def _difference(now: Tensor, then: Tensor, exact: bool, largest: float) -> str:
    if now.dtype != then.dtype or now.shape != then.shape:
        return f"{now.dtype}, {tuple(now.shape)}; recorded {then.dtype}, {tuple(then.shape)}"
    same = (now == then) & (now.signbit() == then.signbit()) | (now.isnan() & then.isnan())
    bound = -1.0 if exact else TOLERANCE * largest
    wrong = ~same & ~((now - then).abs().double() <= bound)
    if not bool(wrong.any()):
        return ""
    k = int(wrong.nonzero()[0])
    far = float((now - then)[wrong].abs().double().max())
    share = far / largest if largest else float("inf")
    return (
        f"{int(wrong.sum())} of {len(wrong)} numbers differ, by {far:.1e} at most, {share:.1e} of the largest one; "
        f"number {k} is {now[k].item()!r}, recorded {then[k].item()!r}"
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_run_does_what_it_did(name: str) -> None:
    check(do(RUNS[name]), Record.unpacked(recorded()["runs"][name]))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_old_checkpoint_goes_on_as_the_run_did(name: str) -> None:
    """A checkpoint of the recorded version, loaded now, continues as the run from which it was taken."""
    record = do(RUNS[name], checkpoint=checkpoints()[name])
    check(record, Record.unpacked(recorded()["runs"][name], CHECKPOINTS[name]))


def test_every_record_has_its_run() -> None:
    assert set(recorded()["runs"]) == set(RUNS)
    assert set(checkpoints()) == set(CHECKPOINTS)


@pytest.mark.parametrize("name", ["default, Adam", "surgery upgrad"])
def test_one_flipped_bit_is_seen(name: str) -> None:
    """Of every number, where all are recorded; of the numbers in the sample, where only a hash and a sample are."""
    then, now = (Record.unpacked(recorded()["runs"][name]) for _ in range(2))
    now.numbers["gradients"] = [vector.clone() for vector in now.numbers["gradients"]]
    assert differences(now, then, exact=True) == []
    now.numbers["gradients"][2].view(torch.int32)[5] ^= 1
    (line,) = differences(now, then, exact=True)
    assert line.startswith("gradients, step 2: 1 of ")
    assert differences(now, then, exact=False) == []
    now.numbers["gradients"][2][5] += 1e-3 * now.numbers["gradients"][2].abs().max()
    assert len(differences(now, then, exact=False)) == 1


def test_a_changed_hash_is_seen() -> None:
    packed = recorded()["runs"]["convolutions"]
    then, now = Record.unpacked(packed), Record.unpacked(packed)
    now.hashes["parameters"] = ["0" * 32]
    assert differences(now, then, exact=True) == [
        "parameters, step 0: some number is another one; only a sample of them is recorded"
    ]
