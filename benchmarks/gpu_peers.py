"""The whole surgery on gradients that are there already, for benchmarks/gpu.py: ours, plain ones, and the peers'."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_bench import Bench
from benchmarks.gpu_model import combine_work, gramian_work
from gradsurg.solvers.problem import HOST

__all__ = ["measure_peers"]


def shapes_of_resnet50() -> list[tuple[int, ...]]:
    """The 161 parameters of a ResNet-50 (25.6 M)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for out, inp, k in ((width, width_in, 1), (width, width, 3), (4 * width, width, 1)):
                shapes += [(out, inp, k, k), (out,), (out,)]
            if block == 0:
                shapes += [(4 * width, width_in, 1, 1), (4 * width,), (4 * width,)]
            width_in = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def measure_peers(bench: Bench) -> None:
    """The whole surgery on gradients that are there already, ours and others': from m lists of tensors to p.grad."""
    from gradsurg.linalg.combine import combine as combine_on_host
    from gradsurg.linalg.gramian import gramian as gramian_on_host
    from gradsurg.linalg.kernels import combine, cone, gramian

    shapes = [(3, 2), (5,)] if bench.rehearse else shapes_of_resnet50()
    for m in (2,) if bench.rehearse else (2, 4, 8):
        rows = [[torch.randn(shape, device=bench.device) for shape in shapes] for _ in range(m)]
        out = [torch.empty_like(g) for g in rows[0]]
        parameters = [nn.Parameter(torch.zeros_like(g)) for g in out]

        def ours(rows: list[list[Tensor]] = rows, out: list[Tensor] = out) -> None:
            G = gramian.gramian(rows)
            combine.combine(rows, 1 + cone.nonnegative(G, G.sum(-1)), out)

        def concatenated(rows: list[list[Tensor]] = rows) -> Tensor:
            J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
            return J @ J.T

        def torch_path(rows: list[list[Tensor]] = rows, parameters: list[nn.Parameter] = parameters) -> None:
            G = gramian_on_host(rows).cpu()
            weights = 1 + HOST.nonnegative(G, G.sum(-1))
            combine_on_host(rows, weights.tolist(), parameters)

        contestants: dict[str, Callable[[], object]] = {
            "gradsurg cone": ours,
            "cuBLAS Gramian of a concatenated matrix (Gramian alone)": concatenated,
            "plain torch path": torch_path,
        }
        if not bench.rehearse:
            contestants["torch.compile of a plain Gramian and sum"] = compiled_twin(rows)
        contestants |= dict(peers(rows, parameters))
        work = [gramian_work(m, torch.float32), combine_work(m, torch.float32)]
        count = sum(g.numel() for g in out)
        for name, run in contestants.items():
            if bench.late(f"{name}, {m} tasks"):
                continue
            # On the device and on the host apart: ours launches more than it takes the device to compute.
            bench.attempt(
                "surgery",
                functools.partial(bench.watch, run, ahead=True),
                m=m,
                by=name,
                path="triton" if run is ours else "torch",
                model_bytes=sum(one["bytes"] for one in work) * count,
                model_fma=sum(one["fma"] for one in work) * count,
            )


def compiled_twin(rows: list[list[Tensor]]) -> Callable[[], object]:
    # One product a parameter, not one a pair of tasks: ten thousand of these would be compiled for longer than all else
    # here takes.
    def twin() -> list[Tensor]:
        matrices = [torch.stack(column).flatten(1) for column in zip(*rows, strict=True)]
        G = torch.stack([J @ J.T for J in matrices]).sum(0)
        weights = 1 + 0 * G.sum(-1)  # the program itself does not compile: it is left out
        return [weights @ J for J in matrices]

    return torch.compile(twin)


def peers(rows: list[list[Tensor]], parameters: list[nn.Parameter]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the others that are installed, in the fastest form of each that takes gradients."""
    try:
        from torchjd.aggregation import DualProj, UPGrad
        from torchjd.autojac import jac_to_grad
    except ImportError:
        print("torchjd is not installed: left out")
    else:
        jacobians = [torch.stack(column) for column in zip(*rows, strict=True)]  # as its backward pass leaves them
        for summed in (False, True):  # concatenated, or one Gramian a parameter, added up
            for name, aggregator in (("DualProj", DualProj()), ("UPGrad", UPGrad())):

                def run(aggregator: Any = aggregator, summed: bool = summed) -> object:
                    for p, jacobian in zip(parameters, jacobians, strict=True):
                        p.jac, p.grad = jacobian, None  # type: ignore[attr-defined]
                    return jac_to_grad(parameters, aggregator, optimize_gramian_computation=summed)

                yield f"TorchJD {name}{', Gramian summed' if summed else ''}", run
    try:
        from pytorch_optimizer import PCGrad
    except ImportError:
        print("pytorch_optimizer is not installed: left out")
    else:
        wrapper = PCGrad(torch.optim.SGD(parameters, lr=0.0))
        flat = [torch.cat([g.reshape(-1) for g in row]) for row in rows]
        reached = [torch.ones_like(g) for g in flat]
        yield "pytorch_optimizer PCGrad", lambda: wrapper.project_conflicting([g.clone() for g in flat], reached)
