"""Checkpoints and copies: a resumed run is an uninterrupted one, to the bit."""

import copy
import io
import pickle

import pytest
import torch

import gradsurg
from tests.networks import build, equal_weights, same, trained, twins
from tests.optimizer.every_optimizer import ROWS, make, models, one_task, several, train

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


@pytest.mark.parametrize("entry", [None, {}])
def test_no_entry_in_a_checkpoint_is_a_fresh_start(entry):
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["gradsurg"] = entry
    optimizer.load_state_dict(saved)
    train(optimizer, model, several, range(2))
    assert optimizer.state_dict()["param_groups"][0]["gradsurg"]["step"] == 2


@pytest.mark.parametrize("entry", [3, {"version": 99}, {"step": "x"}, {"version": 1, "state": {}}])
def test_an_unknown_entry_in_a_checkpoint_is_refused(entry):
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    train(optimizer, model, several, range(2))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["gradsurg"] = entry
    with pytest.raises(ValueError, match="Delete 'gradsurg' there to load the rest and start afresh"):
        optimizer.load_state_dict(saved)
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


@pytest.mark.parametrize("options", [{"normalize": "dwa", "surgery": "modo"}, {"rotate": 1}], ids=str)
def test_names_without_end_do_not_grow_the_state(monkeypatch, options):
    monkeypatch.setattr("gradsurg.optimizer.checkpoint.MOST_NAMES", 20)
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.01), **options)
    sizes = []

    def run():
        for step in range(60):
            optimizer.zero_grad()
            optimizer.total({"a": (w - 3).square().sum() + 1, f"batch {step}": w.square().sum() + 1}).backward()
            optimizer.step()
            sizes.append(len(pickle.dumps(optimizer.state_dict())))

    with pytest.warns(UserWarning, match="more than 20 different task names were met, the last one 'batch"):
        run()
    assert max(sizes[20:]) <= 1.1 * max(sizes[:20])
    assert optimizer.report.step == 59
    assert w.isfinite().all()


def test_many_tasks_at_once_are_no_names_without_end(monkeypatch):
    monkeypatch.setattr("gradsurg.optimizer.checkpoint.MOST_NAMES", 2)
    model = build()
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1), normalize="dwa")
    train(optimizer, model, several, range(3))
    assert len(optimizer.param_groups[0]["gradsurg"]["state"]["normalize"]) == 3
