"""Every learning rate scheduler of torch, weight averaging and distributed checkpoints, over a resumed run."""

import copy
import inspect
import io

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

import gradsurg
from tests.networks import build, data, equal_weights, run_backward, same, twins

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda k: 1 / (1 + k)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


def test_every_scheduler_of_torch_has_a_row():
    shipped = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert shipped - {"LRScheduler"} == set(SCHEDULERS)


class Training:
    """A model, its optimizer and its schedule, wrapped or not."""

    def __init__(self, name, model, wrapped):
        self.model, self.wrapped, self.name = model, wrapped, name
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if wrapped:
            gradsurg.wrap(self.optimizer)
        self.schedule = SCHEDULERS[name](self.optimizer)
        self.rates = []

    def run(self, batches):
        for batch in batches:
            self.optimizer.zero_grad(set_to_none=False)
            loss = sum(self.model.losses(batch).values())
            (self.optimizer.total([loss]) if self.wrapped else loss).backward()
            self.optimizer.step()
            self.schedule.step(*([1.0] if self.name == "ReduceLROnPlateau" else []))
            self.rates.append([(g["lr"], g["momentum"]) for g in self.optimizer.param_groups])

    def save(self):
        file = io.BytesIO()
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        torch.save({key: part.state_dict() for key, part in parts.items()}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, saved):
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_resumed_schedule_is_that_of_the_plain_optimizer_never_interrupted(name):
    # One task: equal to the bit. A schedule that no longer reached the optimizer after loading would show at once.
    model, plain_model = twins()
    plain = Training(name, plain_model, wrapped=False)
    plain.run(range(8))
    first = Training(name, model, wrapped=True)
    first.run(range(4))
    second = Training(name, build(seed=9), wrapped=True)
    second.load(first.save())
    second.run(range(4, 8))
    assert len({rate for step in plain.rates for rate in step}) > 1
    assert first.rates + second.rates == plain.rates
    assert equal_weights(second.model, plain_model)


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averages_of_the_weights(average):
    model, plain_model = twins()
    function = swa_utils.get_ema_multi_avg_fn(0.9) if average == "ema" else swa_utils.get_swa_multi_avg_fn()
    averages = [swa_utils.AveragedModel(m, multi_avg_fn=function) for m in (model, plain_model)]
    optimizer = gradsurg.wrap(torch.optim.Adam(model.parameters(), lr=0.01))
    plain = torch.optim.Adam(plain_model.parameters(), lr=0.01)
    for a, m, o in zip(averages, (model, plain_model), (optimizer, plain), strict=True):
        # After the step, the guarantee included: that is when post hooks run.
        o.register_step_post_hook(lambda *_, a=a, m=m: a.update_parameters(m))
    for batch in range(4):
        for o, m in [(optimizer, model), (plain, plain_model)]:
            o.zero_grad()
            loss = sum(m.losses(batch).values())
            (o.total([loss]) if o is optimizer else loss).backward()
            o.step()
    assert equal_weights(*(a.module for a in averages))
    assert not equal_weights(averages[0].module, model)


def test_batch_norm_of_an_averaged_model():
    model = build()
    model.trunk.insert(1, torch.nn.BatchNorm1d(7))
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    averaged = swa_utils.AveragedModel(model)
    run_backward("total", optimizer, model.losses(0))
    optimizer.step()
    averaged.update_parameters(model)
    swa_utils.update_bn([data(0, 16, 5), data(1, 16, 5)], averaged.module.trunk)
    assert averaged.module.trunk[1].num_batches_tracked == 2


# torch says so of every save and load in one process.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_distributed_checkpoints_on_disk(tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def training(seed):
        model = build(seed=seed)
        # Both have a state of their own: famo's normaliser, and pcgrad's count of steps that its order is drawn by.
        options = {"surgery": "pcgrad", "normalize": "famo"}
        return model, gradsurg.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), **options)

    def run(model, optimizer, batches):
        for batch in batches:
            optimizer.zero_grad()
            run_backward("total", optimizer, model.losses(batch))
            optimizer.step()

    model, optimizer = training(0)
    run(model, optimizer, range(3))
    optimizer.zero_grad()
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    run(model, optimizer, range(3, 6))

    resumed, other = training(9)
    weights, state = get_state_dict(resumed, other)
    loaded = {"model": weights, "optimizer": state}
    checkpoint.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(resumed, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    run(resumed, other, range(3, 6))
    assert equal_weights(model, resumed)
    assert same(copy.deepcopy(optimizer.state_dict()), other.state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_a_distributed_checkpoint_of_the_bare_optimizer_loads(tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, other = twins()
    plain = torch.optim.Adam(model.parameters(), lr=0.01)
    sum(model.losses(0).values()).backward()
    plain.step()
    plain.zero_grad()
    weights, state = get_state_dict(model, plain)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    optimizer = gradsurg.wrap(torch.optim.Adam(other.parameters(), lr=0.5))
    weights, state = get_state_dict(other, optimizer)
    loaded = {"model": weights, "optimizer": state}
    planner = checkpoint.DefaultLoadPlanner(allow_partial_load=True)  # as docs/compatibility.md says
    checkpoint.load(loaded, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    set_state_dict(other, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for o, m in [(plain, model), (optimizer, other)]:
        loss = sum(m.losses(1).values())
        (o.total([loss]) if o is optimizer else loss).backward()
        o.step()
    assert equal_weights(model, other)
    assert optimizer.param_groups[0]["lr"] == 0.01
