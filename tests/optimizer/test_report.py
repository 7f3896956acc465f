"""The report: what it derives from the Gramian is what the tests compute from the gradients."""

import math

import pytest
import torch

import gradsurg


def two_tasks(J, **options):
    p = torch.nn.Parameter(torch.zeros(J.shape[1]))
    optimizer = gradsurg.wrap(torch.optim.SGD([p], lr=0.1), **options)
    optimizer.set_gradients({name: [row] for name, row in zip(("a", "b", "c"), J, strict=False)})
    return p, optimizer


def test_before_the_first_step_there_is_none():
    assert gradsurg.wrap(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)).report is None


def test_numbers_are_those_of_the_gradients():
    J = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    J[1] = -J[0] + 0.5 * J[1]
    p, optimizer = two_tasks(J)
    report, u = optimizer.report, p.grad.double()
    unit = J.double() / J.double().norm(dim=1, keepdim=True)
    assert report.tasks == ("a", "b", "c")
    assert torch.allclose(report.norms, J.double().norm(dim=1))
    assert torch.allclose(report.cosines, unit @ unit.T)
    assert torch.allclose(report.direction_cosines, unit @ u / u.norm(), atol=1e-6)
    assert torch.allclose(report.weights[0] @ J.double(), u, atol=1e-5)
    assert report.conflicts == [
        (x, y) for i, x in enumerate("abc") for j, y in enumerate("abc") if i < j and unit[i] @ unit[j] < 0
    ]
    assert report.update_cosines is None
    before = p.detach().clone()
    optimizer.step()
    d = (before - p.detach()).double()
    assert torch.allclose(optimizer.report.update_cosines, unit @ d / d.norm(), atol=1e-5)


def test_what_was_not_measured_is_nan_and_not_zero():
    # The norm of a single task's gradient: nobody needs it. A zero gradient has been measured: its cosine is 0.
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = gradsurg.wrap(torch.optim.SGD([p], lr=0.1))
    optimizer.total({"alone": p.square().sum()}).backward()
    optimizer.step()
    assert optimizer.report.norms.isnan().all()
    assert optimizer.report.direction_cosines.isnan().all()
    assert str(optimizer.report).splitlines()[1].split()[-2:] == ["-", "-"]
    _, optimizer = two_tasks(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    assert optimizer.report.direction_cosines.tolist() == pytest.approx([1, 0])
    assert optimizer.report.cosines.flatten().tolist() == pytest.approx([1, 0, 0, 0])


def test_losses_and_text():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = gradsurg.wrap(torch.optim.SGD([p], lr=0.1))
    optimizer.total({"up": p.sum(), "down": -p.sum() + p[0] * 0.1, "off": None}).backward()
    optimizer.step()
    report = optimizer.report
    assert {name: float(loss) for name, loss in report.losses.items()} == pytest.approx({"up": -1.0, "down": 1.1})
    assert "up and down" in str(report)
    assert str(report).splitlines()[0].split() == ["task", "loss", "norm", "weight", "cos(u,", "g)", "cos(d,", "g)"]
    scalars = report.scalars()
    assert scalars["loss/up"] == -1.0
    assert scalars["conflicting_pairs"] == 1.0
    assert set(scalars) >= {"norm/up", "weight/down", "cos_direction/up", "cos_update/down"}
    assert all(isinstance(value, float) for value in scalars.values())


def test_stationary_points_are_named():
    g = torch.tensor([1.0, 2.0, 3.0])
    p, optimizer = two_tasks(torch.stack([g, -2 * g]))
    assert optimizer.report.stationary
    assert (p.grad == 0).all()
    assert "Pareto stationary" in str(optimizer.report)


def test_held_steps_are_named():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = gradsurg.wrap(torch.optim.SGD([p], lr=0.1, weight_decay=1.0), surgery="sum", normalize="none")
    optimizer.set_gradients({"a": [torch.tensor([1.0, 2.0])], "b": [torch.tensor([-1.0, -2.0])]})
    before = p.detach().clone()
    optimizer.step()  # decay alone moves along (1, 2), which hurts b; the opposite hurts a
    assert torch.equal(p.detach(), before)
    assert optimizer.report.movement.held
    assert "held" in str(optimizer.report)


def test_one_task_and_disjoint_tasks_measure_nothing():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = gradsurg.wrap(torch.optim.SGD([a, b], lr=0.1))
    optimizer.total({"a": a.sum(), "b": b.sum()}).backward()
    report = optimizer.report
    assert report.tasks == ("a", "b")
    assert report.conflicts == []
    assert report.norms.isnan().all()
    assert math.isnan(report.conflict_rate)
    assert math.isnan(report.scalars()["conflicting_pairs"])
    assert "nan" not in str(report)
    assert str(report).endswith("step 0; no two of these tasks share a parameter: no surgery")
    optimizer.step()
    optimizer.zero_grad()
    optimizer.total({"a": a.sum()}).backward()
    assert optimizer.report.conflict_rate == 0
    assert str(optimizer.report).endswith("step 1; one task: nobody to be in conflict with")


def test_a_report_does_not_say_that_nobody_conflicts_where_nobody_looked():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = gradsurg.wrap(torch.optim.SGD([p], lr=0.1), refresh_every=2, normalize="none")
    texts, rates = [], []
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.total({"a": 2 * p[0], "b": p[1] - p[0]}).backward()
        optimizer.step()
        texts.append(str(optimizer.report))
        rates.append(optimizer.report.conflict_rate)
    assert "in conflict: a and b" in texts[0]
    assert "conflicts were not measured" in texts[1]
    assert "nan" not in texts[1]
    assert rates[0] == 1
    assert math.isnan(rates[1])
    optimizer = gradsurg.wrap(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    (q,) = optimizer.param_groups[0]["params"]
    optimizer.total({"a": q.sum(), "b": q.prod() * float("nan")}).backward()
    assert "conflicts were not measured\nnot finite: b" in str(optimizer.report)
    assert str(optimizer.report).splitlines()[2].split()[:3] == ["b", "nan", "nan"]


def test_a_zero_gradient_has_no_angle():
    _, optimizer = two_tasks(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert optimizer.report.direction_cosines.tolist() == [1.0, 0.0]
    assert optimizer.report.cosines.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_a_prompt_and_a_notebook_show_the_table():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = gradsurg.wrap(torch.optim.SGD([p], lr=0.1), normalize="none")
    optimizer.backward({"<up>": p.sum(), "down": -2 * p.sum() + p[0]})
    report = optimizer.report
    assert repr(report) == str(report)
    assert "surgery changed the sum by" in str(report)
    page = report._repr_html_()
    assert "&lt;up&gt;" in page
    assert page.count("<tr>") == 3


def test_blocks_and_change():
    """Two blocks of one number each: in the second the tasks are opposed."""
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = gradsurg.wrap(torch.optim.SGD([a, b], lr=0.1), granularity="tensor", normalize="none")
    optimizer.set_gradients({"x": [torch.ones(1), torch.ones(1)], "y": [torch.ones(1), -2 * torch.ones(1)]})
    report = optimizer.report
    assert report.blocks == ("parameter 0", "parameter 1")
    assert report.gramians.tolist() == [[[1, 1], [1, 1]], [[1, -2], [-2, 4]]]
    assert torch.equal(report.gramians.sum(0), report.gramian)
    assert report.block_cosines[:, 0, 1].tolist() == [1, -1]
    assert report.change == pytest.approx((1 / 5) ** 0.5)  # the sum is (2, -1), the direction (2, 0)
    assert report.conflict_rate == 1.0
    optimizer.zero_grad()
    optimizer.set_gradients({"x": [torch.ones(1), None], "y": [torch.ones(1), torch.ones(1)]})
    assert optimizer.report.change == 0.0
    assert optimizer.report.blocks == ("parameter 0",)


def test_change_is_unknown_number_by_number():
    _, optimizer = two_tasks(torch.tensor([[1.0, -1.0], [2.0, 1.0]]), surgery="graddrop")
    assert optimizer.report.change != optimizer.report.change
    str(optimizer.report)


def test_read_late_it_says_what_it_says_read_early():
    J = torch.randn(3, 20, generator=torch.Generator().manual_seed(2))
    texts = []
    for early in (True, False):
        _, optimizer = two_tasks(J, preferences={"b": 2.0})
        if early:
            assert optimizer.report.movement is None
        optimizer.step()
        report = optimizer.report
        assert report is optimizer.report  # made once
        texts.append((report.scalars(), str(report), report.movement.inner.tolist(), report.movement.square))
    assert texts[0] == texts[1]
