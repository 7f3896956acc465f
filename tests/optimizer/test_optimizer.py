"""wrap(): the object stays its own optimizer, under every optimizer that torch ships."""

import copy
import inspect
import io
import pickle
import types
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import gradsurg
from tests.networks import build, data, equal_weights, same, trained, twins

# (class, options), one row per way in which the step's code differs. `fused` where the CPU has it.
DENSE = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "foreach": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "fused": True}),
    ("SGD", {"lr": 0.1, "maximize": True}),
    ("SGD", {"lr": torch.tensor(0.1), "momentum": 0.9}),
    ("Adam", {"lr": 0.01}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01}),
    ("Adam", {"lr": 0.01, "foreach": True}),
    ("Adam", {"lr": 0.01, "fused": True}),
    ("Adam", {"lr": 0.01, "maximize": True}),
    ("Adam", {"lr": torch.tensor(0.01)}),
    ("Adam", {"lr": torch.tensor(0.01), "fused": True}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01, "foreach": False, "amsgrad": True}),
    ("AdamW", {"lr": 0.01, "fused": True}),
    ("NAdam", {"lr": 0.01}),
    ("NAdam", {"lr": 0.01, "foreach": True, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("RAdam", {"lr": 0.01}),
    ("RAdam", {"lr": 0.01, "foreach": True, "maximize": True}),
    ("Adamax", {"lr": 0.01}),
    ("Adamax", {"lr": 0.01, "foreach": True}),
    ("Adagrad", {"lr": 0.1}),
    ("Adagrad", {"lr": 0.1, "fused": True, "lr_decay": 0.1}),
    ("Adadelta", {"lr": 1.0}),
    ("Adadelta", {"lr": 1.0, "foreach": True, "maximize": True}),
    ("RMSprop", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True, "foreach": True}),
    ("Rprop", {"lr": 0.01}),
    ("Rprop", {"lr": 0.01, "foreach": True}),
    ("ASGD", {"lr": 0.01, "t0": 2.0}),
    ("ASGD", {"lr": 0.01, "foreach": True, "weight_decay": 0.1}),
    ("Adafactor", {"lr": 0.01}),
    ("Adafactor", {"lr": 0.01, "foreach": True, "weight_decay": 0.1}),
    ("LBFGS", {"lr": 0.5, "max_iter": 4}),
    ("LBFGS", {"lr": 0.5, "max_iter": 4, "line_search_fn": "strong_wolfe"}),
]
# Optimizers that take only some parameters, with the model that has nothing else.
SPECIAL = [
    ("SparseAdam", {"lr": 0.05}, "sparse"),
    ("SparseAdam", {"lr": 0.05, "maximize": True}, "sparse"),
    ("SGD", {"lr": 0.1}, "sparse"),
    ("Adagrad", {"lr": 0.1}, "sparse"),
    ("Muon", {"lr": 0.02}, "matrices"),
    ("Muon", {"lr": 0.02, "nesterov": False, "weight_decay": 0.0}, "matrices"),
]


def _id(row):
    return " ".join([row[0], *(f"{k}={v}" for k, v in row[1].items() if k != "lr" or torch.is_tensor(v)), *row[2:]])


ROWS = [
    pytest.param(*row, id=_id(row))
    for row in [*((*r, "heads") for r in DENSE), *SPECIAL]
    if hasattr(torch.optim, row[0])  # Muon came with torch 2.9
]


def make(name, options, model):
    options = {k: v.clone() if torch.is_tensor(v) else v for k, v in options.items()}
    return getattr(torch.optim, name)(trained(model), **options)


def models(kind, seed=0):
    if kind == "matrices":
        torch.manual_seed(seed)
        model = build("heads", seed)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.bias = None
        return model, copy.deepcopy(model)
    return twins(kind, seed)


def train(optimizer, model, losses, batches, clip=None):
    """Train with total(losses), or with the only loss where the optimizer is plain."""
    for batch in batches:

        def closure(batch=batch):
            optimizer.zero_grad()
            given = losses(model, batch)
            if isinstance(optimizer, gradsurg.MultiTaskOptimizer):
                total = optimizer.total(given)
            else:
                (total,) = given.values()
            total.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            return total

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def one_task(model, batch):
    return {"all": sum(model.losses(batch).values())}


def several(model, batch):
    return model.losses(batch)


def test_every_optimizer_of_torch_has_a_row():
    shipped = {name for name, cls in vars(torch.optim).items() if inspect.isclass(cls) and name != "Optimizer"}
    assert shipped == {row[0] for row in [*DENSE, *SPECIAL]} & set(dir(torch.optim))


# -- item 1: one line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "kind"), ROWS)
def test_snippet_runs_and_no_update_hurts_a_task(name, options, kind):
    model, _ = models(kind)
    optimizer = gradsurg.wrap(make(name, options, model))
    shared = list(model.trunk.parameters()) if kind != "sparse" else trained(model)
    up = -1.0 if options.get("maximize") else 1.0
    for batch in range(4):
        gradients = [
            [g.to_dense() for g in torch.autograd.grad(loss, shared, retain_graph=True)]
            for loss in model.losses(batch).values()
        ]
        before = [p.detach().clone() for p in shared]
        train(optimizer, model, several, [batch])
        moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, shared, strict=True)]).double() * up
        assert moved.isfinite().all()
        assert moved.any(), "a step that does not move anything would pass every check below"
        for row in gradients:
            g = torch.cat([g.flatten() for g in row]).double()
            # float32 parameters: a step of 1e-3 of their size is stored to 1e-4 of itself.
            assert torch.dot(moved, g) >= -1e-4 * moved.norm() * g.norm()
    assert optimizer.report.tasks == tuple(model.losses(0))


@pytest.mark.parametrize(("name", "options", "kind"), ROWS)
@pytest.mark.parametrize("guarantee", ["update", "none"])
def test_one_task_is_the_plain_optimizer_to_the_bit(name, options, kind, guarantee):
    model, plain_model = models(kind)
    optimizer = gradsurg.wrap(make(name, options, model), guarantee=guarantee)
    plain = make(name, options, plain_model)
    for batch in range(5):
        train(optimizer, model, one_task, [batch], clip=None if kind == "sparse" else 0.5)
        train(plain, plain_model, one_task, [batch], clip=None if kind == "sparse" else 0.5)
        assert equal_weights(model, plain_model)
        assert same([p.grad for p in trained(model)], [p.grad for p in trained(plain_model)])
    assert same(states(optimizer), states(plain))


def states(optimizer):
    """Optimizer state in the order of the parameters; LBFGS keeps its own under its first parameter."""
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"] if p in optimizer.state]


@pytest.mark.parametrize("guarantee", ["update", "gradient", "none"])
@pytest.mark.parametrize("kind", ["heads", "tied", "complex", "dtypes", "patchy", "scalar"])
def test_one_task_to_the_bit_in_every_kind_of_model(kind, guarantee):
    model, plain_model = twins(kind)
    optimizer = gradsurg.wrap(torch.optim.Adam(trained(model), lr=0.01), guarantee=guarantee)
    plain = torch.optim.Adam(trained(plain_model), lr=0.01)
    train(optimizer, model, one_task, range(4))
    train(plain, plain_model, one_task, range(4))
    assert equal_weights(model, plain_model)
    assert same(states(optimizer), states(plain))


@pytest.mark.parametrize("zero", ["optimizer none", "optimizer zeros", "model none", "model zeros", "by hand"])
def test_one_task_to_the_bit_however_gradients_are_cleared(zero):
    model, plain_model = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    plain = torch.optim.SGD(plain_model.parameters(), lr=0.1, momentum=0.9)
    for batch in range(4):
        for m, o in [(model, optimizer), (plain_model, plain)]:
            if zero == "by hand":
                for p in m.parameters():
                    p.grad = None
            else:
                (o if "optimizer" in zero else m).zero_grad(set_to_none="none" in zero)
            loss = one_task(m, batch)
            (o.total(loss) if o is optimizer else loss["all"]).backward()
            o.step()
    assert equal_weights(model, plain_model)


def test_without_zero_grad_gradients_pile_up_as_they_do_in_torch():
    model, plain_model = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.01))
    plain = torch.optim.SGD(plain_model.parameters(), lr=0.01)
    for batch in range(4):
        optimizer.total(one_task(model, batch)).backward()
        one_task(plain_model, batch)["all"].backward()
        optimizer.step()
        plain.step()
    assert equal_weights(model, plain_model)


# -- it is the optimizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "kind"), ROWS)
def test_same_object_same_class(name, options, kind):
    model, _ = models(kind)
    bare = make(name, options, model)
    groups, state, defaults = bare.param_groups, bare.state, bare.defaults
    optimizer = gradsurg.wrap(bare)
    assert optimizer is bare
    assert isinstance(optimizer, gradsurg.MultiTaskOptimizer)
    assert isinstance(optimizer, getattr(torch.optim, name))
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    assert optimizer.defaults is defaults
    assert gradsurg.unwrap(optimizer) is bare
    assert type(bare) is getattr(torch.optim, name)
    assert not hasattr(bare, "total")
    assert all("gradsurg" not in group for group in bare.param_groups)
    train(bare, model, one_task, [0])  # and it still trains


def test_unwrapped_trains_as_if_never_wrapped():
    model, plain_model = twins()
    plain = torch.optim.Adam(plain_model.parameters())
    optimizer = gradsurg.unwrap(gradsurg.wrap(torch.optim.Adam(model.parameters())))
    train(optimizer, model, one_task, range(3))
    train(plain, plain_model, one_task, range(3))
    assert equal_weights(model, plain_model)
    assert same(optimizer.state_dict(), plain.state_dict())


def test_wrap_again_after_unwrap_with_other_options():
    model, other = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1), surgery="sum")
    optimizer = gradsurg.wrap(gradsurg.unwrap(optimizer), surgery="mgda")
    train(optimizer, model, several, range(2))
    train(gradsurg.wrap(torch.optim.SGD(other.parameters(), lr=0.1), surgery="mgda"), other, several, range(2))
    assert equal_weights(model, other)


class Renamed(torch.optim.Adam):
    """An optimizer of one's own."""


class Own(torch.optim.Optimizer):
    """One written from scratch, whose step takes another argument."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"])


@pytest.mark.parametrize("cls", [Renamed, Own])
def test_optimizers_from_elsewhere(cls):
    model, plain_model = twins()
    optimizer, plain = gradsurg.wrap(cls(model.parameters(), lr=0.01)), cls(plain_model.parameters(), lr=0.01)
    train(optimizer, model, one_task, range(3))
    train(plain, plain_model, one_task, range(3))
    assert equal_weights(model, plain_model)
    train(optimizer, model, several, range(3))
    assert (optimizer.report.update_cosines >= -1e-4).all()


@pytest.mark.parametrize("first", ["Adam", "AdamW"])
def test_hooks_run_exactly_once(first):
    # AdamW inherits its step from Adam: whichever of them torch instruments first must not make hooks run twice.
    model = build()
    getattr(torch.optim, first)(model.parameters())
    counts = []
    for cls in (torch.optim.Adam, torch.optim.AdamW):
        optimizer = cls(model.parameters())
        seen = []
        optimizer.register_step_pre_hook(lambda *_: seen.append("own before"))  # noqa: B023
        optimizer.register_step_post_hook(lambda *_: seen.append("own after"))  # noqa: B023
        handles = [
            register_optimizer_step_pre_hook(lambda *_: seen.append("global before")),  # noqa: B023
            register_optimizer_step_post_hook(lambda *_: seen.append("global after")),  # noqa: B023
        ]
        gradsurg.wrap(optimizer)
        train(optimizer, model, several, range(2))
        for handle in handles:
            handle.remove()
        counts.append(seen)
    assert counts == [["global before", "own before", "own after", "global after"] * 2] * 2


def test_hooks_of_a_copy_run_exactly_once():
    # Unpickling makes torch instrument the class again, unless it is told that this was done.
    model, optimizer = copy.deepcopy((model := build(), gradsurg.wrap(torch.optim.Adam(model.parameters()))))
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(optimizer, model, several, range(2))
    assert seen == ["after"] * 2


def test_post_hooks_see_the_guarded_parameters():
    model = build("all shared")
    optimizer = gradsurg.wrap(torch.optim.Adam(model.parameters(), lr=0.05))
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append([p.detach().clone() for p in model.parameters()]))
    corrected = 0
    for batch in range(12):
        train(optimizer, model, several, [batch])
        assert same(seen[-1], [p.detach() for p in model.parameters()])
        corrected += optimizer.report.movement.corrected
    assert corrected, "Adam was never corrected, so this test has not seen what it is for"


def test_state_dict_hooks_run_once():
    optimizer = gradsurg.wrap(torch.optim.Adam(build().parameters()))
    seen = []
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("save"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("load"))
    optimizer.load_state_dict(state_dict=optimizer.state_dict())  # by keyword, as distributed checkpoints do
    assert seen == ["save", "load"]


def test_attributes_that_trainers_set_reach_the_optimizer():
    # GradScaler hands a fused optimizer its scale this way.
    model, plain_model = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1, fused=True))
    plain = torch.optim.SGD(plain_model.parameters(), lr=0.1, fused=True)
    assert optimizer._step_supports_amp_scaling
    for o, m in [(optimizer, model), (plain, plain_model)]:
        loss = one_task(m, 0)
        ((o.total(loss) if o is optimizer else loss["all"]) * 8).backward()
        o.grad_scale, o.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        o.step()
        del o.grad_scale, o.found_inf
    assert equal_weights(model, plain_model)


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("when", ["before", "after", "before, unwrapped"])
def test_schedulers_built_before_and_after(scheduler, when):
    model, plain_model = twins()
    plain = torch.optim.SGD(plain_model.parameters(), lr=0.1, momentum=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if when == "after":
        gradsurg.wrap(optimizer)
    schedule, plain_schedule = SCHEDULERS[scheduler](optimizer), SCHEDULERS[scheduler](plain)
    if when != "after":
        gradsurg.wrap(optimizer)
    if "unwrapped" in when:
        gradsurg.unwrap(optimizer)
    lrs = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()", "step() has been overridden"
        for batch in range(6):
            for s, o, m in [(schedule, optimizer, model), (plain_schedule, plain, plain_model)]:
                train(o, m, one_task, [batch])
                s.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
            lrs.append((optimizer.param_groups[0]["lr"], plain.param_groups[0]["lr"]))
    assert all(a == b for a, b in lrs)
    assert len({a for a, _ in lrs}) > 1
    assert equal_weights(model, plain_model)
    if "unwrapped" not in when:
        train(optimizer, model, several, [0])
        assert optimizer.report.movement is not None, "the scheduler's patch went past our step"


def test_a_scheduler_still_warns_of_the_wrong_order():
    optimizer = gradsurg.wrap(torch.optim.SGD(build().parameters(), lr=0.1))
    schedule = lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        schedule.step()


def test_step_replaced_by_somebody_else_is_refused():
    optimizer = torch.optim.SGD(build().parameters(), lr=0.1)
    optimizer.step = types.MethodType(lambda self: None, optimizer)
    with pytest.raises(TypeError, match="replaced"):
        gradsurg.wrap(optimizer)
    assert type(optimizer) is torch.optim.SGD


def test_average_of_weights_and_swa():
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05)
    for batch in range(3):
        train(optimizer, model, several, [batch])
        averaged.update_parameters(model)
        schedule.step()
    assert not equal_weights(model, averaged.module)


def test_add_param_group():
    model, plain_model = twins()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.trunk.parameters(), lr=0.1))
    plain = torch.optim.SGD(plain_model.trunk.parameters(), lr=0.1)
    for o, m in [(optimizer, model), (plain, plain_model)]:
        o.add_param_group({"params": m.heads.parameters(), "lr": 0.3})
    train(optimizer, model, one_task, range(3))
    train(plain, plain_model, one_task, range(3))
    assert equal_weights(model, plain_model)


def test_parameters_replaced_inside_the_groups():
    # Trainers do it (fully_shard); nothing of ours may hold on to the old ones.
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    train(optimizer, model, several, [0])
    for layer in model.trunk:
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.detach().clone())
    optimizer.param_groups[0]["params"] = list(model.parameters())
    before = model.trunk[0].weight.detach().clone()
    train(optimizer, model, several, [1])
    assert not torch.equal(before, model.trunk[0].weight)
    assert optimizer.report.movement is not None


def test_step_without_any_gradient_is_a_step_of_the_plain_optimizer():
    # Distributed checkpoints call step() on zero gradients, with a learning rate of 0, to make the state.
    model, plain_model = twins()
    optimizer, plain = (torch.optim.Adam(m.parameters(), lr=0.0) for m in (model, plain_model))
    gradsurg.wrap(optimizer)
    for o in (optimizer, plain):
        o.step()
        for group in o.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        assert o.step(closure=None) is None
    assert equal_weights(model, plain_model)
    assert same(states(optimizer), states(plain))


def test_step_returns_what_the_closure_returns():
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))

    def closure():
        optimizer.zero_grad()
        total = optimizer.total(model.losses(0))
        total.backward()
        return total

    want = sum(model.losses(0).values()).item()
    assert optimizer.step(closure).item() == pytest.approx(want, rel=1e-6)


# -- checkpoints --------------------------------------------------------------------------------------------------

RESUMABLE = [row for row in ROWS if "LBFGS" not in row.id]


@pytest.mark.parametrize(("name", "options", "kind"), ROWS)
@pytest.mark.parametrize("surgery", ["cone", "pcgrad"])
def test_resume_is_bit_equal_to_an_uninterrupted_run(name, options, kind, surgery):
    # pcgrad draws its order from (seed, step), so a step counter that is not saved shows.
    whole, part = models(kind)
    one = gradsurg.wrap(make(name, options, whole), surgery=surgery)
    two = gradsurg.wrap(make(name, options, part), surgery=surgery)
    train(one, whole, several, range(6))
    train(two, part, several, range(3))
    file = io.BytesIO()
    torch.save({"model": part.state_dict(), "optimizer": two.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, _ = models(kind, seed=9)
    resumed.load_state_dict(saved["model"])
    three = gradsurg.wrap(make(name, options, resumed), surgery=surgery)
    three.load_state_dict(saved["optimizer"])
    train(three, resumed, several, range(3, 6))
    assert equal_weights(whole, resumed)
    assert same(one.state_dict(), three.state_dict())


@pytest.mark.parametrize(("name", "options", "kind"), RESUMABLE)  # torch's own LBFGS cannot be copied or pickled
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_carry_on_to_the_bit(name, options, kind, how):
    model, _ = models(kind)
    optimizer = gradsurg.wrap(make(name, options, model), surgery="pcgrad", preferences={"left": 2.0})
    train(optimizer, model, several, range(2))
    together = (model, optimizer)  # one copy of both: the optimizer's parameters stay those of the model
    if how == "deepcopy":
        model_copy, copied = copy.deepcopy(together)
    elif how == "pickle":
        model_copy, copied = pickle.loads(pickle.dumps(together))
    else:
        file = io.BytesIO()
        torch.save(together, file)
        file.seek(0)
        model_copy, copied = torch.load(file, weights_only=False)
    assert type(copied) is type(optimizer)
    assert copied.param_groups[0]["params"][0] is trained(model_copy)[0]
    train(optimizer, model, several, range(2, 5))
    train(copied, model_copy, several, range(2, 5))
    assert equal_weights(model, model_copy)
    assert same(optimizer.state_dict(), copied.state_dict())
    assert same(optimizer.report.weights, copied.report.weights)
    assert copied.report.movement is not None


def test_a_copy_does_not_share_anything_with_its_original():
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.total(model.losses(0)).backward()
    model_copy, copied = copy.deepcopy((model, optimizer))
    gradients = [p.grad.clone() for p in model.parameters()]
    copied.zero_grad()
    train(copied, model_copy, several, [1, 2])
    assert same(gradients, [p.grad for p in model.parameters()])
    assert optimizer.state_dict()["param_groups"][0]["gradsurg"]["step"] == 0
    optimizer.step()
    assert optimizer.report.movement is not None


def test_copies_of_several_optimizers_still_share_their_rows():
    model = build()
    pair = gradsurg.wrap(
        [torch.optim.SGD(model.trunk.parameters(), lr=0.1), torch.optim.Adam(model.heads.parameters())]
    )
    first, second = copy.deepcopy(pair)
    assert first._gradsurg is second._gradsurg
    assert first._gradsurg is not pair[0]._gradsurg
    assert first._gradsurg.optimizers == [first, second]


def test_copies_keep_the_declared_shared_parameters():
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1), shared=model.trunk[0])
    for model_copy, copied in (
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        shared = copied._gradsurg.options.shared
        assert [id(p) for p in shared] == [id(p) for p in model_copy.trunk[0].parameters()]
        train(copied, model_copy, several, [0])
        assert copied.report.movement is not None


def test_a_shallow_copy_has_rows_of_its_own():
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    other = copy.copy(optimizer)
    assert type(other) is type(optimizer)
    optimizer.total(model.losses(0)).backward()
    other.zero_grad()
    assert len(optimizer._gradsurg.capture.rows) == 3
    train(optimizer, model, several, range(2))
    assert optimizer.report.step == 1


def test_distributed_checkpoints_of_one_process():
    # They call step() on zero gradients to make the state, rename everything by parameter name, and load by keyword.
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, other = twins()
    one = gradsurg.wrap(torch.optim.Adam(model.parameters(), lr=0.01), surgery="pcgrad")
    two = gradsurg.wrap(torch.optim.Adam(other.parameters(), lr=0.01), surgery="pcgrad")
    train(one, model, several, range(3))
    one.zero_grad()
    saved = copy.deepcopy(get_optimizer_state_dict(model, one))
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, two, saved)
    train(one, model, several, range(3, 6))
    train(two, other, several, range(3, 6))
    assert equal_weights(model, other)
    assert same(one.state_dict(), two.state_dict())


@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_a_distributed_checkpoint_leaves_the_run_as_it_is(cls, rate):
    # For it torch steps once with learning rates of 0 where there is no state, with SGD each time: no step of the run.
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, other = twins()
    saved, plain = (
        gradsurg.wrap(cls(m.parameters(), lr=copy.copy(rate)), surgery="pcgrad", refresh_every=2)
        for m in (model, other)
    )
    for step in range(4):
        get_optimizer_state_dict(model, saved)
        train(saved, model, several, [step])
        train(plain, other, several, [step])
        assert saved.report.step == plain.report.step == step
        saved.zero_grad()
    assert cls is torch.optim.Adam or equal_weights(model, other)  # Adam itself counts that step, bare too


@pytest.mark.parametrize(("name", "options", "kind"), ROWS)
def test_checkpoints_go_to_and_from_the_bare_optimizer(name, options, kind):
    model, plain_model = models(kind)
    optimizer, plain = gradsurg.wrap(make(name, options, model)), make(name, options, plain_model)
    train(plain, plain_model, one_task, range(2))
    model.load_state_dict(plain_model.state_dict())
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))  # torch's load shares its tensors with the saver
    train(optimizer, model, one_task, range(2, 4))
    train(plain, plain_model, one_task, range(2, 4))
    assert equal_weights(model, plain_model)
    # and back
    train(optimizer, model, several, range(2))
    bare_model, _ = models(kind, seed=4)
    bare = make(name, options, bare_model)
    bare_model.load_state_dict(model.state_dict())
    bare.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(bare, bare_model, one_task, [7])
    train(optimizer, model, one_task, [7])
    assert equal_weights(model, bare_model)


@pytest.mark.parametrize("entry", [None, 3, {}, {"version": 99}, {"step": "x"}, {"version": 1, "state": {}}])
def test_an_unknown_entry_in_a_checkpoint_is_a_fresh_start(entry):
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["gradsurg"] = entry
    optimizer.load_state_dict(saved)
    train(optimizer, model, several, range(2))
    assert optimizer.state_dict()["param_groups"][0]["gradsurg"]["step"] == 2


def test_a_state_dict_in_hand_is_not_changed_by_later_steps():
    # Tensors in a state dict are torch's own references; numbers are not, and the step counter is a number.
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    train(optimizer, model, several, [0])
    kept = optimizer.state_dict()
    train(optimizer, model, several, [1, 2])
    assert kept["param_groups"][0]["gradsurg"]["step"] == 1


def test_names_known_before_a_checkpoint_are_known_after_it():
    # "left" is absent from the first step after resuming; that it is primary is no typo.
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1), primary="left", preferences={"left": 2.0})
    train(optimizer, model, several, [0])
    resumed = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1), primary="left", preferences={"left": 2.0})
    resumed.load_state_dict(optimizer.state_dict())
    losses = model.losses(1)
    del losses["left"]
    resumed.total(losses).backward()
    resumed.step()
    assert resumed.report.step == 1
    assert resumed.report.tasks == tuple(losses)
    fresh = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1), primary="left")
    with pytest.raises(ValueError, match="primary names the task 'left'"):
        fresh.total({"right": model.losses(1)["right"]})


# -- several optimizers -------------------------------------------------------------------------------------------


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


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.optim.Adam, r"class Adam: build it first"),
        (nn.Linear(2, 2), "given a Linear"),
        (None, "given a NoneType"),
        ("adam", "given a str"),
        ([], "no optimizer"),
        ([nn.Linear(2, 2)], "given a Linear"),
    ],
)
def test_wrap_says_what_to_pass(value, match):
    with pytest.raises(TypeError, match=match):
        gradsurg.wrap(value)


def test_wrap_twice_is_refused():
    optimizer = gradsurg.wrap(torch.optim.SGD(build().parameters(), lr=0.1))
    with pytest.raises(TypeError, match="wrapped already"):
        gradsurg.wrap(optimizer)


def test_the_same_optimizer_twice_in_a_list_is_refused():
    optimizer = torch.optim.SGD(build().parameters(), lr=0.1)
    with pytest.raises(TypeError, match="twice"):
        gradsurg.wrap([optimizer, optimizer])
    assert type(optimizer) is torch.optim.SGD


def test_a_refused_list_leaves_all_of_it_bare():
    good = torch.optim.SGD(build().parameters(), lr=0.1)
    with pytest.raises(TypeError):
        gradsurg.wrap([good, "bad"])
    with pytest.raises(ValueError, match="surgery"):
        gradsurg.wrap([good], surgery="conee")
    assert type(good) is torch.optim.SGD
    assert "gradsurg" not in good.param_groups[0]


@pytest.mark.parametrize("call", ["unwrap", "total", "backward", "report"])
def test_free_functions_say_when_nothing_is_wrapped(call):
    optimizer = torch.optim.SGD(build().parameters(), lr=0.1)
    arguments = [{}] if call in ("total", "backward") else []
    with pytest.raises(TypeError, match="not a wrapped optimizer"):
        getattr(gradsurg, call)(optimizer, *arguments)


class Proxy:
    def __init__(self, optimizer, name):
        setattr(self, name, optimizer)


@pytest.mark.parametrize("names", [["optimizer"], ["_optimizer"], ["optimizer", "_optimizer"]])
def test_free_functions_see_through_proxies(names):
    model, other = twins()
    proxy = optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    direct = gradsurg.wrap(torch.optim.SGD(other.parameters(), lr=0.1))
    for name in names:
        proxy = Proxy(proxy, name)
    gradsurg.total(proxy, model.losses(0)).backward()
    gradsurg.backward(direct, other.losses(0))
    assert same([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])
    assert gradsurg.report(proxy) is optimizer.report is not None


def subclass_with_a_copied_dict(optimizer):
    """What Lightning puts around an optimizer."""
    base = type("Proxy", (), {"optimizer": property(lambda self: self._optimizer)})
    proxy = object.__new__(type("Proxied", (base, type(optimizer)), {}))
    proxy.__dict__ = {k: v for k, v in vars(optimizer).items() if k != "step"}
    proxy._optimizer = optimizer
    return proxy


def test_a_proxy_with_a_copied_dict_sees_the_same_rows():
    model, other = twins()
    optimizer = gradsurg.wrap(torch.optim.Adam(model.parameters(), lr=0.05))
    direct = gradsurg.wrap(torch.optim.Adam(other.parameters(), lr=0.05))
    proxy = subclass_with_a_copied_dict(optimizer)
    for batch in range(3):
        proxy.zero_grad()
        proxy.total(model.losses(batch)).backward()
        optimizer.step()
        train(direct, other, several, [batch])
        assert same(proxy.report.weights, direct.report.weights)
        assert proxy.report.movement is not None
    assert equal_weights(model, other)
    assert gradsurg.unwrap(optimizer) is optimizer


def test_agreeing_tasks_of_equal_norm_get_the_gradient_of_the_sum():
    # A regression whose tasks are turned copies of each other: equal norms, positive inner products.
    w = nn.Parameter(data(0, 6).double())
    gradients = torch.eye(6, dtype=torch.float64)[:3] + 0.2
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
    optimizer.total([g @ w for g in gradients]).backward()
    torch.testing.assert_close(w.grad, gradients.sum(0), rtol=1e-12, atol=0)  # float64; scaled by norms and back
