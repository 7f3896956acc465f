"""Records what the runs of cases.py do, and keeps the records in two files for test_recorded.py to compare with.

    python -m tests.behaviour.record tests/behaviour/recorded

writes runs.pt.gz and checkpoints.pt.gz with the library that is imported. Recording anew throws away what the tests
hold against the library, so do it only where results are meant to change.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradsurg
from tests.behaviour.cases import CHECKPOINTS, RUNS, Run
from tests.behaviour.nets import data

# The numbers of a brief record: evenly spaced ones of all gradients, or of all parameters.
SAMPLE = 24
REPORTED = ("weights", "gramian", "update_cosines")


class Record:
    """What a run did, from its step `start` on.

    Attributes:
        numbers: "gradients", "weights", … -> a vector a step; "parameters" -> one vector, at the end.
        hashes: "gradients" and "parameters" -> the SHA-256 of each of these vectors before a brief record cut it down
            to a sample; empty for other records.
        tasks: The tasks that the report of each step lists.
        absent: The parameters that had no gradient, step by step.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, list[Tensor]] = {name: [] for name in ("gradients", *REPORTED, "parameters")}
        self.hashes: dict[str, list[str]] = {}
        self.tasks: list[list[str]] = []
        self.absent: list[list[str]] = []

    def add(self, name: str, tensors: Sequence[Tensor], *, brief: bool = False) -> None:
        """Add one vector, made of the tensors."""
        vector = torch.cat([_real(tensor).reshape(-1) for tensor in tensors] or [torch.empty(0, dtype=torch.float64)])
        if brief:
            self.hashes.setdefault(name, []).append(digest(vector))
            count = min(SAMPLE, vector.numel())
            vector = vector[torch.linspace(0, vector.numel() - 1, count, dtype=torch.float64).round().long()]
        self.numbers[name].append(vector.clone())

    def packed(self) -> dict[str, Any]:
        """Return the record as a dict with one tensor a name, which takes less room in a file."""
        numbers = {name: (torch.cat(vectors), [v.numel() for v in vectors]) for name, vectors in self.numbers.items()}
        return {**vars(self), "numbers": numbers}

    @classmethod
    def unpacked(cls, packed: dict[str, Any], start: int = 0) -> Record:
        """Return the record that was packed, without what came before a step."""
        record = cls()
        for name, (values, sizes) in packed["numbers"].items():
            vectors = values.split(sizes)
            record.numbers[name] = list(vectors if name == "parameters" else vectors[start:])
        for name, hashes in packed["hashes"].items():
            record.hashes[name] = hashes if name == "parameters" else hashes[start:]
        record.tasks, record.absent = packed["tasks"][start:], packed["absent"][start:]
        return record


def digest(tensor: Tensor) -> str:
    """Return the start of the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:32]


def _real(tensor: Tensor) -> Tensor:
    """Return the numbers of a sparse or complex tensor as a dense, real one."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce().to_dense()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@contextmanager
def alike() -> Iterator[None]:
    """Let the block compute as it did when the runs were recorded: on one thread, for sums depend on the number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Said outright, because torch warns where nobody said whether sparse tensors are to be checked.
        with torch.sparse.check_sparse_tensor_invariants(True):
            yield
    finally:
        torch.set_num_threads(threads)


Watch = Callable[[int, nn.Module, list[Any]], None]


def do(run: Run, *, checkpoint: dict[str, Any] | None = None, watch: Watch | None = None) -> Record:
    """Do a run, or the rest of it after a checkpoint, and return what it did.

    Args:
        run: The run.
        checkpoint: What `checkpoint_of` returned.
        watch: Called before every step with its number, the model and the optimizers.
    """
    record = Record()
    with alike():
        model, optimizers = run.start()
        start = 0
        if checkpoint is not None:
            start = checkpoint["step"]
            model.load_state_dict(checkpoint["model"])
            for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        for batch in range(start, run.steps):
            if watch is not None:
                watch(batch, model, optimizers)
            for optimizer in optimizers:
                optimizer.zero_grad()
            run.way(optimizers[0], model, batch)
            _note_gradients(record, model, run.brief)
            for optimizer in optimizers:
                optimizer.step()
            _note_report(record, optimizers[0].report)
        record.add("parameters", list(model.parameters()), brief=run.brief)
    return record


def _note_gradients(record: Record, model: nn.Module, brief: bool) -> None:
    named = list(model.named_parameters())
    # Absent gradients are listed by name, and count as zeros, so that a position always means the same parameter.
    record.add("gradients", [torch.zeros_like(p) if p.grad is None else p.grad for _, p in named], brief=brief)
    record.absent.append([name for name, p in named if p.grad is None])


def _note_report(record: Record, report: gradsurg.Report | None) -> None:
    for name in REPORTED:
        value = getattr(report, name, None)
        record.add(name, [] if value is None else [value])
    record.tasks.append([] if report is None else list(report.tasks))


def checkpoint_of(run: Run, step: int) -> dict[str, Any]:
    """Return the states of the model and the optimizers before a step."""
    found: dict[str, Any] = {}

    def watch(batch: int, model: nn.Module, optimizers: list[Any]) -> None:
        if batch == step:
            states = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            found.update(copy.deepcopy(states), step=step)

    do(run, watch=watch)
    return found


def fingerprint() -> dict[str, str]:
    """Return what decides whether results can be equal to the bit: torch's version, and how this CPU computes.

    The hashes are those of operations that the library uses, on seeded numbers, and of the gradients that torch alone
    finds for the models. Equal hashes do not prove that every operation is equal, but where the processor or one of
    the libraries below torch differs, some of them usually do.
    """
    results: dict[str, Tensor] = {}
    with alike():
        for dtype in (torch.float32, torch.float64):
            a, b = data(1, 12, 300).to(dtype), data(2, 300, 40).to(dtype)
            results[f"matmul {dtype}"] = a @ b
            results[f"vector {dtype}"] = torch.cat([a @ b[:, 0], torch.dot(a[0], a[1]).reshape(1)])
            results[f"bmm {dtype}"] = torch.bmm(data(3, 5, 4, 700).to(dtype), data(4, 5, 700, 4).to(dtype))
            results[f"elementwise {dtype}"] = torch.cat([a.tanh(), a.exp(), a.abs().sqrt(), a / 3, torch.hypot(a, a)])
            results[f"sum {dtype}"] = torch.stack([a.sum(), a.square().mean(), a.norm()])
            results[f"lerp {dtype}"] = torch.lerp(a, a.flip(0), 0.1).addcdiv_(a, a.square() + 1, value=-0.3)
        builders = {(run.model, run.dtype): name for name, run in RUNS.items()}
        for (build, dtype), name in builders.items():
            torch.manual_seed(0)
            model: Any = build() if dtype == torch.float32 else build().to(dtype)
            torch.autograd.backward(list(model.losses(0).values()))
            found = [_real(p.grad).reshape(-1) for p in model.parameters() if p.grad is not None]
            results[f"gradients of the run {name!r}"] = torch.cat(found)
    hashes = {name: digest(value) for name, value in results.items()}
    version = torch.__version__.partition("+")[0]
    return {"torch": version, "cpu": torch.backends.cpu.get_cpu_capability(), **hashes}


def save(value: object, path: Path) -> None:
    """Write what torch.save makes of a value into a compressed file, the same bytes for the same value."""
    written = io.BytesIO()
    torch.save(value, written)
    path.write_bytes(gzip.compress(written.getvalue(), mtime=0))


def load(path: Path) -> Any:
    """Return what `save` wrote."""
    return torch.load(io.BytesIO(gzip.decompress(path.read_bytes())), weights_only=True)


def main(folder: Path) -> None:
    """Record everything into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = {name: do(run).packed() for name, run in RUNS.items()}
    save({"fingerprint": fingerprint(), "runs": runs}, folder / "runs.pt.gz")
    save({name: checkpoint_of(RUNS[name], step) for name, step in CHECKPOINTS.items()}, folder / "checkpoints.pt.gz")
    print(f"recorded with {gradsurg.__file__}:")
    for path in sorted(folder.glob("*.pt.gz")):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
