"""Steps by the kernels that read a report before the step, average over steps, or have more tasks than a kernel."""

import pytest
import torch

import gradsurg
from gradsurg.linalg.kernels.dispatch import PROGRAM_UP_TO
from tests.kernels.interpreted import harness  # noqa: F401 (has the interpreter round bfloat16 as hardware does)
from tests.networks import same


def steps(backend, tasks=3, read=False, **options):
    """Return parameters and the report after two steps."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh(), torch.nn.Linear(3, tasks))
    x, y = torch.randn(8, 5), torch.randn(8, tasks)
    optimizer = gradsurg.wrap(
        torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), shared=net, backend=backend, **options
    )
    for _ in range(2):
        optimizer.zero_grad()
        errors = (net(x) - y).square().mean(0)
        optimizer.total({f"task {k}": error for k, error in enumerate(errors)}).backward()
        if read:
            assert optimizer.report.movement is None
        optimizer.step()
    return [p.detach() for p in net.parameters()], optimizer.report


@pytest.mark.parametrize("options", [{"granularity": "tensor"}, {"rotate": 1}], ids=str)
def test_reading_the_report_before_the_step_changes_nothing(options):
    mine, report = steps("triton", read=True, **options)
    unread, other = steps("triton", **options)
    assert same(mine, unread)
    assert same(report.update_cosines, other.update_cosines)


@pytest.mark.parametrize(
    "options",
    [
        {"rotate": 1},
        {"rotate": 2, "read": True},
        {"tasks": PROGRAM_UP_TO + 1, "read": True},
    ],
    ids=str,
)
def test_they_do_what_the_torch_path_does(options):
    (mine, report), (theirs, other) = steps("triton", **options), steps("torch", **options)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(report.update_cosines, other.update_cosines, rtol=0, atol=1e-3)
    fresh = range(len(report.tasks)) if report.fresh is None else map(report.tasks.index, report.fresh)
    assert all(report.update_cosines[i] >= -1e-4 for i in fresh)
