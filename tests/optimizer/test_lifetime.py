"""An optimizer and its model are freed as soon as nobody holds them, without the garbage collector."""

import gc
import weakref

import pytest
import torch

import gradsurg
from tests.networks import build, trained


def total(optimizer, model):
    optimizer.total(model.losses(0)).backward()


def task(optimizer, model):
    with optimizer.task("left"):
        model.losses(0)["left"].backward()
    with optimizer.task("right"):
        model.losses(0)["right"].backward()


def features(optimizer, model):
    h = model.trunk(torch.ones(3, 5))
    optimizer.total({name: head(h).square().mean() for name, head in model.heads.items()}, features=h).backward()


def accumulated(optimizer, model):
    with optimizer.accumulate():
        total(optimizer, model)


def scheduled(optimizer, model):
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    total(optimizer, model)


def recorded(optimizer, model):
    gradsurg.History(optimizer, every=1)
    total(optimizer, model)


WAYS = {way.__name__: (way, {}) for way in (total, task, features, accumulated, scheduled, recorded)}
WAYS |= {"nothing": (lambda *_: None, {})}
WAYS |= {
    str(options): (total, options)
    for options in ({"rotate": 1}, {"refresh_every": 2}, {"batched": True}, {"surgery": "cagrad", "normalize": "dwa"})
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_del_frees_optimizer_and_model_at_once(way, stepped, several):
    use, options = WAYS[way]

    def life(steps):
        model = build()
        if several:
            halves = [torch.optim.Adam(part.parameters()) for part in (model.trunk, model.heads)]
            optimizers = gradsurg.wrap(halves, **options)
        else:
            optimizers = [gradsurg.wrap(torch.optim.Adam(trained(model)), **options)]
        for step in range(steps):
            use(optimizers[0], model)
            if stepped or step < steps - 1:
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.load_state_dict(optimizer.state_dict())
        return [weakref.ref(each) for each in (*optimizers, *model.parameters())]

    life(1)  # what torch and Python build once
    gc.collect()
    gc.disable()
    try:
        assert [each() for each in life(2) if each() is not None] == []
    finally:
        gc.enable()


def test_of_several_optimizers_one_may_go():
    model = build()
    first, second = gradsurg.wrap(
        [torch.optim.SGD(model.trunk.parameters(), lr=0.1), torch.optim.SGD(model.heads.parameters(), lr=0.1)]
    )
    del second
    for batch in range(2):
        first.total(model.losses(batch)).backward()
        first.step()
    assert first.report.step == 1


def test_a_total_keeps_its_optimizer_until_its_backward_pass():
    w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    total = gradsurg.wrap(torch.optim.SGD([w], lr=0.1), normalize="none").total({"a": w[0] ** 2, "b": (w[1] - 3) ** 2})
    total.backward()
    assert w.grad.tolist() == [2.0, -4.0]
