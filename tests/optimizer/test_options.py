"""The options of wrap(): every wrong one is an error that says what would be right."""

import inspect

import pytest
import torch
from torch import nn

import gradsurg
from gradsurg.linalg.kernels import dispatch
from gradsurg.normalize import NORMALIZERS
from gradsurg.optimizer.options import WrapOptions
from gradsurg.surgery import SURGERIES, Cone
from tests.networks import build
from tests.wrap_options import options_from


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_the_defaults_are_those_of_the_design():
    settings = options_from({}, [optimizer_of(build())])
    assert settings.pipeline.normalizer.name == "norm"
    assert settings.pipeline.surgery.name == "cone"
    assert settings.pipeline.levels is None
    assert (settings.guarantee, settings.granularity, settings.nonfinite) == ("update", "model", "propagate")
    assert (settings.tasks, settings.shared, settings.row_dtype, settings.seed) == (None, None, None, 0)


def test_every_option_is_documented_in_wrap():
    for name in inspect.signature(gradsurg.wrap).parameters:
        assert f"\n    {name}: " in inspect.getdoc(gradsurg.wrap), name


def test_checkers_see_the_options_of_the_signature():
    spelled = list(inspect.signature(gradsurg.wrap).parameters.values())[1:]
    assert list(WrapOptions.__annotations__) == [p.name for p in spelled]
    assert all(p.kind is p.KEYWORD_ONLY for p in spelled)
    assert {p.name: str(p.annotation) for p in spelled} == {
        name: hint.__forward_arg__ for name, hint in WrapOptions.__annotations__.items()
    }


@pytest.mark.parametrize("surgery", SURGERIES)
@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_names_and_instances_mean_the_same(surgery, normalize):
    by_name = options_from({"surgery": surgery, "normalize": normalize}, [])
    given = {"surgery": SURGERIES[surgery](), "normalize": NORMALIZERS[normalize]()}
    assert options_from(given, []) == by_name


@pytest.mark.parametrize("guarantee", ["update", "gradient", "none"])
@pytest.mark.parametrize("granularity", ["model", "group", "tensor"])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip_task", "raise"])
def test_valid_words(guarantee, granularity, nonfinite):
    settings = options_from({"guarantee": guarantee, "granularity": granularity, "nonfinite": nonfinite}, [])
    assert (settings.guarantee, settings.granularity, settings.nonfinite) == (guarantee, granularity, nonfinite)
    assert settings.pipeline.guarantee == guarantee


# option, wrong value, what the message must hold
WRONG = [
    ("surgery", "conee", "'cone', 'upgrad'.*Did you mean 'cone'"),
    ("surgery", None, "'cone'"),
    ("surgery", Cone, "Surgery instance"),
    ("surgery", 3, "'cone'"),
    ("normalize", "norms", "'none', 'norm'.*Did you mean 'norm'"),
    ("normalize", len, "Normalizer instance"),
    ("guarantee", "updates", "'update', 'gradient', 'none'.*Did you mean 'update'"),
    ("guarantee", True, "'update'"),
    ("guarantee", None, "'none'"),
    ("granularity", "layer", "'model', 'group', 'tensor'"),
    ("nonfinite", "skip", "'propagate', 'skip_task', 'raise'"),
    ("auxiliary", "helps", "'protect', 'help'.*Did you mean 'help'"),
    ("primary", [], "empty level"),
    ("primary", [["a"], []], "empty level"),
    ("primary", [["a"], "b"], "mixes names and lists"),
    ("primary", [["a"], ["a"]], "names a task twice"),
    ("primary", 3, "primary=3"),
    ("primary", [1, 2], r"primary=\[1, 2\]"),
    ("primary", [["a"], [2]], "primary="),
    ("preferences", {"a": 0.0}, r"preferences\['a'\]=0.0: must be positive"),
    ("preferences", {"a": -1}, "must be positive"),
    ("preferences", {"a": float("nan")}, "must be positive and finite"),
    ("preferences", {"a": float("inf")}, "must be positive and finite"),
    ("preferences", {"a": "high"}, r"preferences\['a'\]='high'"),
    ("preferences", {"a": None}, r"preferences\['a'\]=None"),
    ("preferences", [1.0, 2.0], "dict from task name"),
    ("preferences", {1: 2.0}, "task name"),
    ("tasks", "left", r"\['segment', 'depth'\]"),
    ("tasks", [], "list of strings"),
    ("tasks", ["a", 1], "list of strings"),
    ("tasks", 3, "list of strings"),
    ("tasks", ["a", "a"], "twice"),
    ("tasks", {"a", "b"}, "a set, which has no order"),
    ("shared", torch.ones(2), "one tensor"),
    ("shared", [], "empty"),
    ("shared", 5, "shared"),
    ("shared", ["trunk"], "must hold parameters"),
    ("shared", [nn.Parameter(torch.ones(2))], "1 of 1 parameters that the optimizer does not train"),
    ("row_dtype", "bfloat16", "torch.bfloat16"),
    ("row_dtype", torch.int32, "floating dtype"),
    ("row_dtype", torch.complex64, "floating dtype"),
    ("seed", -1, "nonnegative integer"),
    ("seed", 1.5, "nonnegative integer"),
    ("seed", True, "nonnegative integer"),
    ("seed", None, "nonnegative integer"),
    ("check_sync_every", -1, "0 for never"),
    ("check_sync_every", True, "0 for never"),
]


@pytest.mark.parametrize(("option", "value", "match"), WRONG, ids=[f"{o}={v!r}"[:40] for o, v, _ in WRONG])
def test_a_wrong_value_says_what_is_right(option, value, match):
    optimizer = optimizer_of(build())
    with pytest.raises(ValueError, match=match) as caught:
        gradsurg.wrap(optimizer, **{option: value})
    assert option in str(caught.value)
    assert type(optimizer) is torch.optim.SGD


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"primary": "lefd"}, r"primary names the task 'lefd'.*\['left', 'right'\].*Did you mean 'left'"),
        ({"primary": [["left"], ["wrong"]]}, "primary names the task 'wrong'"),
        ({"preferences": {"righd": 1.0}}, "preferences names the task 'righd'.*Did you mean 'right'"),
    ],
)
def test_names_are_checked_against_the_declared_ones(options, match):
    with pytest.raises(ValueError, match=match):
        options_from({"tasks": ["left", "right"], **options}, [])


@pytest.mark.parametrize(
    ("available", "interpret", "device", "options", "match"),
    [
        (False, "1", "cpu", {}, "Triton is not installed"),
        (True, "0", "cpu", {}, "the gradients are on cpu, not on a CUDA device"),
        (True, "1", "meta", {}, "the gradients are on meta, not on a CUDA device"),
        (True, "1", "cpu", {"surgery": "graddrop"}, "surgery='graddrop' decides number by number"),
        (True, "1", "cpu", {"surgery": "trimmed_mean"}, "surgery='trimmed_mean' decides number by number"),
        (True, "1", "cpu", {"margin": 0.1}, "margin= is kept on the host"),
        (True, "1", "cpu", {"margin": {"left": 0.1}}, "margin= is kept on the host"),
    ],
)
def test_triton_that_cannot_run_is_an_error_at_wrap(monkeypatch, available, interpret, device, options, match):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(dispatch, "triton_is_available", lambda: available)
    held = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device=device))]
    optimizer = torch.optim.SGD(held, lr=0.1)
    with pytest.raises(ValueError, match=f"backend='triton' cannot run: .*{match}.*backend='auto'"):
        gradsurg.wrap(optimizer, backend="triton", **options)
    assert type(optimizer) is torch.optim.SGD
    assert "gradsurg" not in optimizer.param_groups[0]
    for fallback in ("auto", "torch"):
        assert options_from({"backend": fallback, **options}, [optimizer]).backend == fallback


@pytest.mark.parametrize("margin", [0.0, {"left": 0.0}])
def test_triton_where_it_can_run(monkeypatch, margin):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "triton_is_available", lambda: True)
    options = {"backend": "triton", "margin": margin}
    assert options_from(options, [optimizer_of(build())]).backend == "triton"


def test_an_unknown_option_lists_the_known_and_the_nearest():
    with pytest.raises(
        TypeError, match=r"unexpected keyword argument 'surgerys'. Did you mean 'surgery'\? .*normalize, surgery"
    ):
        gradsurg.wrap(optimizer_of(build()), surgerys="cone")
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'modell'. Did you mean 'model'"):
        gradsurg.wrap(optimizer_of(build()), modell=None)


@pytest.mark.parametrize("kind", ["module", "list", "generator", "tuple"])
def test_shared_may_be_a_module_or_parameters(kind):
    model = build()
    shared = {
        "module": model.trunk,
        "list": list(model.trunk.parameters()),
        "generator": model.trunk.parameters(),
        "tuple": tuple(model.trunk.parameters()),
    }[kind]
    settings = options_from({"shared": shared}, [optimizer_of(model)])
    assert [id(p) for p in settings.shared] == [id(p) for p in model.trunk.parameters()]


def test_shared_may_be_spread_over_several_optimizers():
    model = build()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model.trunk[0], model.trunk[2])]
    assert len(options_from({"shared": model.trunk}, optimizers).shared) == 4


def test_whole_numbers_of_other_types_are_seeds():
    import numpy as np

    assert options_from({"seed": np.int64(3)}, []).seed == 3


def test_settings_do_not_follow_later_changes_of_what_was_passed():
    preferences, tasks = {"a": 2.0}, ["a", "b"]
    settings = options_from({"preferences": preferences, "tasks": tasks}, [])
    preferences["a"], tasks[0] = 9.0, "z"
    assert settings.preferences == {"a": 2.0}
    assert settings.tasks == ("a", "b")


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"surgery": "cagrad", "c": 0.4}, r"surgery=gradsurg\.surgery\.CAGrad\(c=0\.4\)"),
        ({"normalize": "dwa", "temperature": 1.0}, r"normalize=gradsurg\.normalize\.DWA\(temperature=1\.0\)"),
    ],
)
def test_an_option_of_a_method_says_how_to_build_it(options, match):
    with pytest.raises(TypeError, match=match):
        gradsurg.wrap(optimizer(), **options)


def test_a_class_says_how_to_build_it():
    with pytest.raises(ValueError, match=r"surgery is the class CAGrad, not a .* build it, as in surgery=CAGrad\(\)"):
        gradsurg.wrap(optimizer(), surgery=gradsurg.surgery.CAGrad)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("UPGrad", "upgrad"), ("dualproj", "cone"), ("DualProj", "cone"), ("Nash_MTL", "nash_mtl"), ("IMTLG", "imtl_g")],
)
def test_names_of_other_libraries(theirs, ours):
    with pytest.raises(ValueError, match=f"Did you mean '{ours}'"):
        gradsurg.wrap(optimizer(), surgery=theirs)
    with pytest.raises(ValueError, match=f"Did you mean '{ours}'"):
        gradsurg.weights(torch.eye(2), theirs)
