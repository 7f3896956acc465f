"""What a state dict says of the surgery is checked wholly before anything changes; foreign state is dropped."""

import copy
import warnings

import pytest
import torch

import gradsurg
from gradsurg.normalize import DWA, FAMO, Norm
from gradsurg.surgery import CAGrad, GradVac
from gradsurg.surgery.methods.cr_mogm import CRMOGM
from tests.networks import build, same, trained

STATEFUL = {
    "dwa": {"normalize": DWA(period=2)},
    "famo": {"normalize": "famo", "surgery": "excess_mtl"},
    "gradnorm": {"normalize": "gradnorm", "surgery": "modo", "granularity": "tensor"},
    "smoothed": {"normalize": Norm(smoothing=0.5), "surgery": GradVac(beta=0.3), "granularity": "group"},
    "levels": {"normalize": "initial_loss", "surgery": "sdmgrad", "primary": "left"},
    "inner": {"normalize": "uncertainty", "surgery": CRMOGM(inner=CAGrad())},
    "rotate": {"normalize": "imtl_l", "rotate": 1},
    "refresh": {"refresh_every": 2},
}
# What stands in the place of each part, in turn.
WRONG = ["x", None, -1, 1.5, float("nan"), float("inf"), 1e308, True, [], {}, [1], {"left": "x"}, b"", 10**400]


def wrapped(model, **options):
    return gradsurg.wrap(torch.optim.Adam(trained(model), lr=0.01), **options)


def step(optimizer, model, batch):
    optimizer.zero_grad()
    optimizer.total(model.losses(batch)).backward()
    optimizer.step()


def piece_of(state_dict):
    return state_dict["param_groups"][0]["gradsurg"]["sealed"][0]


def places(value, path=()):
    """Return the path of every part of nested dicts and lists, at most three entries of each."""
    yield path
    if isinstance(value, dict):
        inside = list(value.items())[:3]
    else:
        inside = list(enumerate(value))[:3] if isinstance(value, list) else []
    for key, each in inside:
        yield from places(each, (*path, key))


def tampered(state_dict, path, wrong):
    changed = copy.deepcopy(state_dict)
    place = changed["param_groups"][0]["gradsurg"]["sealed"]
    if not path:
        changed["param_groups"][0]["gradsurg"]["sealed"] = (wrong,)
        return changed
    for key in (0, *path[:-1]):
        place = place[key]
    place[path[-1]] = wrong
    return changed


@pytest.mark.parametrize("name", STATEFUL)
def test_a_tampered_dict_is_refused_before_anything_changes_or_does_no_harm(name):
    options, model = STATEFUL[name], build()
    source = wrapped(model, **options)
    for batch in range(3):
        step(source, model, batch)
    good = source.state_dict()
    weights = copy.deepcopy(model.state_dict())
    refused = tried = 0
    for k, path in enumerate(places(piece_of(good))):
        for wrong in WRONG[k % 5 :: 5]:
            model.load_state_dict(weights)
            optimizer = wrapped(model, **options)
            step(optimizer, model, 5)
            before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            tried += 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # state of no method that is known here is dropped with a warning
                error = None
                try:
                    optimizer.load_state_dict(tampered(good, path, wrong))
                except ValueError as raised:
                    error = raised
                if error is not None:
                    refused += 1
                    assert "'gradsurg'" in str(error)
                    assert same((model.state_dict(), optimizer.state_dict()), before)
            for batch in range(2):
                step(optimizer, model, batch)
            assert all(p.isfinite().all() for p in trained(model)), (path, wrong)
    assert tried >= 15
    assert refused > tried / 2


@pytest.mark.parametrize("wrong", [None, 1, [], {"left": [None]}, "nan", "shape", "int"])
def test_averages_that_do_not_fit_are_refused(wrong):
    model = build()
    optimizer = wrapped(model, rotate=1)
    for batch in range(2):
        step(optimizer, model, batch)
    state = optimizer.state_dict()
    row = piece_of(state)["rows"]["left"]
    tensors = {"nan": row[0] * float("nan"), "shape": row[0][:1], "int": row[0].int()}
    changed = copy.deepcopy(state)
    if isinstance(wrong, str):
        piece_of(changed)["rows"]["left"][0] = tensors[wrong]
    else:
        piece_of(changed)["rows"] = wrong
    before = copy.deepcopy(state)
    if wrong is None:  # no averages: all tasks are due
        optimizer.load_state_dict(changed)
    else:
        with pytest.raises(ValueError, match="average"):
            optimizer.load_state_dict(changed)
        assert same(optimizer.state_dict(), before)
    step(optimizer, model, 2)


@pytest.mark.parametrize("wrong", ["too few", "other sizes"])
def test_a_refused_load_changes_nothing(wrong):
    """torch refuses a dict with another number of groups, or of parameters."""
    model = build()
    optimizer = wrapped(model, rotate=1, normalize="dwa")
    for batch in range(3):
        step(optimizer, model, batch)
    before = copy.deepcopy(optimizer.state_dict())
    changed = copy.deepcopy(before)
    del changed["param_groups"][0]["gradsurg"]
    if wrong == "too few":
        changed["param_groups"].pop()
    else:
        changed["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(changed)
    assert same(optimizer.state_dict(), before)


@pytest.mark.parametrize("version", [2, 0, "1", None, True])
def test_another_version_is_refused(version):
    model = build()
    state = wrapped(model).state_dict()
    entry = state["param_groups"][0]["gradsurg"]
    entry["version"] = piece_of(state)["version"] = version
    with pytest.raises(ValueError, match=f"its version is {version!r}"):
        wrapped(model).load_state_dict(state)
    bare = torch.optim.Adam(trained(model), lr=0.01)
    bare.load_state_dict(state)
    with pytest.raises(ValueError, match=f"its version is {version!r}"):
        gradsurg.wrap(bare)
    assert type(bare) is torch.optim.Adam


def test_a_refused_wrap_changes_nothing():
    """Of two optimizers that loaded checkpoints, the second one's cannot be read."""
    model = build()
    source = wrapped(model, rotate=1)
    for batch in range(2):
        step(source, model, batch)
    good = torch.optim.Adam(trained(model), lr=0.01)
    good.load_state_dict(source.state_dict())
    other = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=0.01)
    other.param_groups[0]["gradsurg"] = {"version": 9}
    before = copy.deepcopy(good.state_dict())
    with pytest.raises(ValueError, match="its version is 9"):
        gradsurg.wrap([good, other], rotate=1)
    assert same(good.state_dict(), before)
    # Without rotate= there is no use for the averages, and the rest goes on.
    optimizer = gradsurg.wrap(good)
    assert optimizer._gradsurg.checkpoint.step == 2
    assert "rows" not in piece_of(optimizer.state_dict())


PAIRS = [
    ({"normalize": "uncertainty"}, {"normalize": "dwa"}, "normalize='uncertainty 1'"),
    ({"surgery": "modo"}, {"surgery": "sdmgrad"}, "surgery='modo 1'"),
    ({"surgery": "modo"}, {"surgery": "modo", "primary": "left"}, "surgery='modo 1'"),
    ({"surgery": CRMOGM()}, {"surgery": CRMOGM(inner=CAGrad())}, "cr_mogm 1 of mgda 1"),
    ({"surgery": "modo"}, {"surgery": "graddrop"}, "surgery='modo 1'"),
]


@pytest.mark.parametrize(("theirs", "ours", "match"), PAIRS)
@pytest.mark.parametrize("way", ["load", "wrap what loaded it"])
def test_state_of_another_method_is_dropped_with_a_warning(theirs, ours, match, way):
    model = build("all shared")
    source = wrapped(model, **theirs)
    for batch in range(3):
        step(source, model, batch)
    state = source.state_dict()
    other = copy.deepcopy(model)
    if way == "load":
        optimizer = wrapped(model, **ours)
        with pytest.warns(UserWarning, match=match):
            optimizer.load_state_dict(state)
    else:
        bare = torch.optim.Adam(trained(model), lr=0.01)
        bare.load_state_dict(state)
        with pytest.warns(UserWarning, match=match):
            optimizer = gradsurg.wrap(bare, **ours)
    step(optimizer, model, 3)
    fresh = wrapped(other, **ours)
    step(fresh, other, 3)
    assert same(optimizer.report.weights, fresh.report.weights)
    assert optimizer.report.step == 3


def test_state_of_another_version_of_a_method_is_dropped_with_a_warning(monkeypatch):
    model = build()
    source = wrapped(model, normalize="dwa")
    step(source, model, 0)
    state = source.state_dict()
    monkeypatch.setattr(DWA, "version", 2)
    optimizer = wrapped(model, normalize="dwa")
    with pytest.warns(UserWarning, match="'dwa 1' remembers, and here it is normalize='dwa 2'"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["gradsurg"]["state"]["normalize"] == {}


def test_weights_of_another_surgery_are_not_reused():
    model = build()
    source = wrapped(model, refresh_every=5)
    step(source, model, 0)
    optimizer = wrapped(model, refresh_every=5, surgery="mgda")
    optimizer.load_state_dict(source.state_dict())
    step(optimizer, model, 1)
    assert optimizer.report.level != "reused weights"


def test_a_method_of_ones_own_that_cannot_be_tried_is_loaded():
    """Its state is not judged by steps that are made up, if it fails on them without state too."""

    class Picky(FAMO):
        name = "picky"

        def scales(self, problem, state):
            if float(problem.losses[0]) == 1.0:
                raise ValueError("a loss of exactly 1")
            return super().scales(problem, state)

    model = build()
    source, optimizer = (wrapped(model, normalize=Picky()) for _ in range(2))
    step(source, model, 0)
    optimizer.load_state_dict(source.state_dict())
    assert same(source.state_dict(), optimizer.state_dict())
