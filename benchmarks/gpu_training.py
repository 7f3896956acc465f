"""A whole training step on the device, for benchmarks/gpu.py: ours, plain ones, and TorchJD in all its modes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import gradsurg
from benchmarks.gpu_model import combine_work, gramian_work
from benchmarks.workloads import Residual

if TYPE_CHECKING:
    from benchmarks.gpu_bench import Bench

__all__ = ["SMALL", "measure_training"]

SEPARATE = "separate backward passes"
SMALL = "perceptron"  # where launches take the time, which batched=True saves; no target is set for its share


class Bottleneck(nn.Module):
    """A block of ResNet-50 (He et al. 2016)."""

    def __init__(self, wide: int, width: int, stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inp, out, k, s in ((wide, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)):
            layers += [nn.Conv2d(inp, out, k, s, k // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers[:-1])
        changes = stride != 1 or wide != 4 * width
        self.short: nn.Module = (
            nn.Sequential(nn.Conv2d(wide, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
            if changes
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.short(x))


def resnet50(blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    wide = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(Bottleneck(wide, width << stage, 2 if block == 0 and stage else 1))
            wide = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Transformer(nn.Module):
    """An encoder of 24 layers of width 1024 and 32 768 tokens: 336 M parameters."""

    def __init__(self, layers: int = 24, width: int = 1024, tokens: int = 32_768) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        encoded: Tensor = self.layers(self.tokens(x))
        return encoded.mean(1)


def training_cases(bench: Bench) -> Iterator[tuple[str, nn.Module, Tensor, int]]:
    if bench.rehearse:
        yield "tiny resnet", resnet50((1, 1), 4), torch.randn(2, 3, 32, 32), 32
        yield "tiny transformer", Transformer(1, 64, 100), torch.randint(100, (2, 8)), 64
        yield f"{SMALL}, tiny", nn.Sequential(Residual(8), Residual(8)), torch.randn(4, 8), 8
        return
    device = bench.device
    small = nn.Sequential(*(Residual(91) for _ in range(12))).to(device)
    yield f"{SMALL} 100 k", small, torch.randn(32, 91, device=device), 91
    yield "ResNet-50", resnet50().to(device), torch.randn(64, 3, 224, 224, device=device), 2048
    yield "transformer 336 M", Transformer().to(device), torch.randint(32_768, (8, 512), device=device), 1024


def contestants(
    model: nn.ModuleList, x: Tensor, narrow: bool, batched: bool
) -> Iterator[tuple[str, Callable[[], object], str]]:
    """Yield a training step each: its name, itself, and the path that its surgery takes; `narrow` is autocast."""

    def features() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=narrow):
            h: Tensor = model[0](x)
        return h

    def losses_of(h: Tensor) -> list[Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=narrow):
            return [head(h).float().square().mean() for head in list(model)[1:]]

    def adamw() -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    inner = adamw()

    def summed() -> None:
        inner.zero_grad()
        torch.stack(losses_of(features())).sum().backward()
        inner.step()

    def separate() -> None:
        inner.zero_grad()
        for loss in (losses := losses_of(features())):
            loss.backward(retain_graph=loss is not losses[-1])
        inner.step()

    yield "one backward pass of the sum", summed, "-"
    yield SEPARATE, separate, "-"
    ways = [(guarantee, at_once) for guarantee in ("gradient", "update") for at_once in (False, True)[: 1 + batched]]
    for guarantee, at_once in ways:
        optimizer = gradsurg.wrap(adamw(), guarantee=guarantee, batched=at_once)

        def ours(optimizer: gradsurg.MultiTaskOptimizer = optimizer) -> None:
            optimizer.zero_grad()
            optimizer.total(losses_of(features())).backward()
            optimizer.step()

        ours()
        report = optimizer.report
        assert report is not None
        yield f"gradsurg, guarantee={guarantee}{', batched' if at_once else ''}", ours, report.path
    if not narrow:  # theirs too are fastest in bfloat16, and time on a card is short
        return
    try:
        from torchjd.aggregation import DualProj
        from torchjd.autojac import jac_to_grad, mtl_backward
    except ImportError:
        print("torchjd is not installed: left out")
        return
    aggregator, shared = DualProj(), list(model[0].parameters())
    for chunk in (None, 1):  # all rows of the Jacobian at once, or one after the other
        for gramians in (False, True):

            def theirs(chunk: int | None = chunk, gramians: bool = gramians) -> None:
                inner.zero_grad()
                h = features()
                mtl_backward(losses_of(h), h, parallel_chunk_size=chunk)
                jac_to_grad(shared, aggregator, optimize_gramian_computation=gramians)
                inner.step()

            name = f"TorchJD, {'row by row' if chunk else 'all rows at once'}{', Gramian summed' if gramians else ''}"
            yield name, theirs, "torch"


def measure_training(bench: Bench) -> None:
    """A step with surgery; its share is what it takes beyond as many backward passes, summed by autograd.

    First as large models are trained, bfloat16 by autocast; then float32, whose longer passes flatter the share.
    """
    for narrow in (True, False):
        for heads in (3,) if bench.rehearse else (2, 4, 8):
            for name, body, x, width in training_cases(bench):
                model = nn.ModuleList([body, *(nn.Linear(width, 10) for _ in range(heads))]).to(bench.device)
                _measure_steps(bench, name, model, x, narrow)


def _measure_steps(bench: Bench, name: str, model: nn.ModuleList, x: Tensor, narrow: bool) -> None:
    heads, count = len(model) - 1, sum(p.numel() for p in model[0].parameters())
    work = [gramian_work(heads, torch.float32), combine_work(heads, torch.float32)]
    separate = float("nan")
    for by, run, path in contestants(model, x, narrow, name.startswith(SMALL)):
        if bench.late(f"{name}, {heads} heads, {by}"):
            continue
        bench.attempt(
            "step",
            functools.partial(_watched, bench, run, separate),
            model=name,
            autocast="bfloat16" if narrow else "no",
            heads=heads,
            by=by,
            path=path,
            model_bytes_of_surgery=sum(one["bytes"] for one in work) * count,
        )
        if by == SEPARATE:
            separate = bench.results[-1].get("seconds", float("nan"))
        model.zero_grad()


def _watched(bench: Bench, run: Callable[[], object], separate: float) -> dict[str, float]:
    watched = bench.watch(run, 5)
    return {"surgery_share": 1 - separate / watched["seconds"], **watched}
