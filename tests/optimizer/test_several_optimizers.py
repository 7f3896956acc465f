"""Several optimizers that are wrapped together share their rows."""

import pytest
import torch

import gradsurg
from tests.networks import build, equal_weights, same, twins
from tests.optimizer.every_optimizer import one_task, several, train


def pair(model, **options):
    return gradsurg.wrap(
        [
            torch.optim.SGD(model.trunk[0].parameters(), lr=0.1, momentum=0.9),
            torch.optim.Adam([*model.trunk[2].parameters(), *model.heads.parameters()], lr=0.05),
        ],
        **options,
    )


def test_several_optimizers_share_their_rows():
    model, one_model = twins()
    first, second = pair(model, guarantee="none")
    one = gradsurg.wrap(torch.optim.SGD(one_model.parameters(), lr=0.1), guarantee="none")
    first.total(model.losses(0)).backward()
    one.total(one_model.losses(0)).backward()
    assert same([p.grad for p in model.parameters()], [p.grad for p in one_model.parameters()])
    assert second.report is first.report


@pytest.mark.parametrize("order", ["steps, then zeros", "step and zero in turn", "zeros first", "one is skipped"])
def test_several_optimizers_each_keep_the_promise(order):
    model = build()
    optimizers = pair(model)
    corrected = []
    for batch in range(12):
        if order in ("zeros first", "one is skipped"):
            for o in optimizers:
                o.zero_grad()
        optimizers[batch % 2].total(model.losses(batch)).backward()
        gradients = {
            name: list(torch.autograd.grad(loss, list(model.trunk.parameters()), retain_graph=True))
            for name, loss in model.losses(batch).items()
        }
        before = [p.detach().clone() for p in model.trunk.parameters()]
        for o in optimizers:
            if order == "one is skipped" and o is optimizers[0] and batch % 2 == 0:
                continue  # as GradScaler does where an overflow is in this optimizer's gradients only
            o.step()
            corrected.append(o.report.movement is not None and o.report.movement.corrected)
            if order == "step and zero in turn":
                o.zero_grad()
        if order == "steps, then zeros":
            for o in optimizers:
                o.zero_grad()
        d = [b - p.detach() for b, p in zip(before, model.trunk.parameters(), strict=True)]
        for part in (slice(0, 2), slice(2, 4)):  # each optimizer's own share, hence the whole
            moved = torch.cat([t.flatten() for t in d[part]]).double()
            for row in gradients.values():
                g = torch.cat([t.flatten() for t in row[part]]).double()
                assert torch.dot(moved, g) >= -1e-4 * moved.norm() * g.norm()  # float32 parameters
    assert any(corrected), "nothing was ever corrected: the promise was not put to the test"
    assert first_memory(optimizers)["step"] == (6 if order == "one is skipped" else 12)


def first_memory(optimizers):
    return optimizers[0].param_groups[0]["gradsurg"]


def test_one_task_with_several_optimizers_is_plain_to_the_bit():
    model, plain_model = twins()
    optimizers = pair(model)
    plain = [gradsurg.unwrap(o) for o in pair(plain_model)]
    for batch in range(4):
        for group, m in [(optimizers, model), (plain, plain_model)]:
            for o in group:
                o.zero_grad()
            loss = one_task(m, batch)
            (optimizers[1].total(loss) if group is optimizers else loss["all"]).backward()
            for o in group:
                o.step()
    assert equal_weights(model, plain_model)


def test_unwrapping_one_of_several_leaves_the_other_working():
    model = build()
    first, second = pair(model)
    gradsurg.unwrap(first)
    before = [p.detach().clone() for p in model.parameters()]
    train(second, model, several, range(2))
    assert (second.report.update_cosines >= -1e-4).all()
    mine = {id(p) for group in second.param_groups for p in group["params"]}
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved == [id(p) in mine for p in model.parameters()]
