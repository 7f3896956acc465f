"""Which path and which kernel: both sides of every threshold."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gradsurg
from gradsurg.distributed.layout import Layout
from gradsurg.gradients.rows import Row, TaskRows
from gradsurg.linalg.kernels import dispatch
from gradsurg.linalg.kernels.dispatch import gramian_kernel, path, path_of, task_tiles, vector
from gradsurg.optimizer.direction import compute_direction
from gradsurg.optimizer.inputs import StepInputs
from gradsurg.optimizer.report import settled
from tests.networks import TASKS, AllShared
from tests.wrap_options import options_from

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
FLOAT = (torch.float32, torch.float32)


@pytest.fixture
def machine(monkeypatch):
    """Sets what dispatch finds: whether Triton is there, whether it interprets, and why a card is unfit for it."""

    dispatch._warn_of.cache_clear()

    def is_found(*, available=True, interpreted=False, misfit=""):
        monkeypatch.setattr(dispatch, "triton_is_available", lambda: available)
        monkeypatch.setattr(dispatch, "is_interpreted", lambda: interpreted)
        monkeypatch.setattr(dispatch, "unfit", lambda device: misfit)

    return is_found


@pytest.mark.filterwarnings("ignore:gradsurg's kernels cannot run")
@pytest.mark.parametrize(
    ("backend", "device", "available", "interpreted", "wanted"),
    [
        ("auto", CUDA, True, False, "triton"),
        ("auto", CUDA, False, False, "torch"),
        ("auto", CPU, True, False, "torch"),
        ("auto", CPU, True, True, "triton"),
        ("torch", CUDA, True, False, "torch"),
        ("triton", CUDA, True, False, "triton"),
        ("triton", CPU, True, True, "triton"),
    ],
)
def test_path(machine, backend, device, available, interpreted, wanted):
    machine(available=available, interpreted=interpreted)
    found = path(backend, device, dtypes=[FLOAT])
    assert found == wanted


@pytest.mark.filterwarnings("ignore:gradsurg's kernels cannot run")
@pytest.mark.parametrize(
    ("device", "available", "sparse", "dtypes", "message"),
    [
        (CUDA, False, False, [FLOAT], "Triton is not installed"),
        (CPU, True, False, [FLOAT], "the gradients are on cpu"),
        (CUDA, True, True, [FLOAT], "there are sparse gradients"),
        (CUDA, True, False, [FLOAT, (torch.float64, torch.float32)], "no kernel"),
        (CUDA, True, False, [(torch.float8_e5m2, torch.float32)], "no kernel"),
    ],
)
def test_triton_asked_for_where_it_cannot_run(machine, device, available, sparse, dtypes, message):
    machine(available=available)
    arguments = {"dtypes": dtypes, "sparse": sparse}
    with pytest.raises(ValueError, match=message):
        path("triton", device, **arguments)
    assert path("auto", device, **arguments) == "torch"


def test_a_card_that_cannot_run_kernels_is_named_once(machine):
    machine(misfit="it is too old")
    with pytest.warns(UserWarning, match="cannot run on cuda: it is too old") as warned:
        assert [path("auto", CUDA, dtypes=[FLOAT]) for _ in range(3)] == ["torch"] * 3
    assert len(warned) == 1
    with pytest.raises(ValueError, match=r"cannot run: it is too old\. Use backend='auto'"):
        path("triton", CUDA, dtypes=[FLOAT])


@pytest.fixture
def card(monkeypatch):
    """An H100 as torch and Triton would tell of it; a test changes what it is about."""
    triton = pytest.importorskip("triton", reason="Triton is not installed: it is asked where it is")
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: None))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton, "__version__", "3.5.0+git")
    monkeypatch.setattr(triton.runtime, "driver", driver)
    dispatch.unfit.cache_clear()
    yield SimpleNamespace(triton=triton, driver=driver.active, patch=monkeypatch.setattr)
    dispatch.unfit.cache_clear()


def test_a_card_that_can(card):
    assert dispatch.unfit(CUDA) == ""
    assert path("triton", CUDA, dtypes=[FLOAT]) == "triton"


def test_a_card_of_another_maker(card):
    card.patch(torch.version, "hip", "6.4")
    assert "ROCm" in dispatch.unfit(CUDA)


@pytest.mark.parametrize(("capability", "able"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_cards_are_told_apart_by_capability(card, capability, able):
    card.patch(torch.cuda, "get_device_capability", lambda device: capability)
    assert ("compute capability 7.5" in dispatch.unfit(CUDA)) is not able


@pytest.mark.parametrize(("version", "able"), [("3.0.0", False), ("3.4.1", False), ("3.5.0", True), ("3.10.0", True)])
def test_tritons_are_told_apart_by_version(card, version, able):
    """Those before 3.5 fail to compile one kernel (up to 3.2: most of them), in the middle of a step."""
    card.patch(card.triton, "__version__", version)
    assert (f"Triton {version} is installed" in dispatch.unfit(CUDA)) is not able


def test_a_machine_without_a_c_compiler(card):
    def build():
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nAnd more.")

    card.driver.get_current_target = build
    assert dispatch.unfit(CUDA) == (
        "Triton does not start (RuntimeError: Failed to find C compiler. Please specify via CC environment variable.)"
    )


def test_unknown_backend():
    with pytest.raises(ValueError, match="'auto', 'torch', 'triton'"):
        path("tritn", CPU)


@pytest.mark.parametrize("row", list(dispatch.DTYPES))
@pytest.mark.parametrize("out", list(dispatch.DTYPES))
def test_every_pair_of_dtypes_has_a_path(machine, row, out):
    machine()
    wanted = "triton" if out in dispatch.DTYPES[row] else "torch"
    assert path("auto", CUDA, dtypes=[(row, out)]) == wanted


def test_dtypes_of_rows(monkeypatch):
    """Complex numbers count as their real parts, and a missing gradient has no dtype."""
    monkeypatch.setattr(dispatch, "path", lambda *_, dtypes, sparse: dtypes)
    rows = [[torch.zeros(2), None], [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.complex64)]]
    like = [torch.zeros(2), torch.zeros(2, dtype=torch.complex64)]
    assert path_of("triton", rows, like) == {FLOAT, (torch.bfloat16, torch.float32)}


@pytest.mark.parametrize(
    ("m", "wanted"),
    [
        (1, ("pairs", 2)),
        (2, ("pairs", 2)),
        (3, ("pairs", 4)),
        (4, ("pairs", 4)),
        (5, ("pairs", 8)),
        (8, ("pairs", 8)),
        (9, ("dots", 16)),
        (16, ("dots", 16)),
        (17, ("dots", 32)),
        (32, ("dots", 32)),
    ],
)
def test_gramian_kernel(m, wanted):
    assert gramian_kernel(m) == wanted


@pytest.mark.parametrize(("m", "tiles"), [(1, 1), (32, 1), (33, 3), (48, 3), (49, 4), (200, 13)])
def test_tiles_of_tasks(m, tiles):
    ranges = task_tiles(m)
    assert len(ranges) == tiles
    assert [i for first, end in ranges for i in range(first, end)] == list(range(m))
    assert all(end - first <= (32 if tiles == 1 else 16) for first, end in ranges)


@pytest.mark.parametrize(
    ("dtypes", "aligned", "wanted"),
    [
        ([torch.float32], True, 4),
        ([torch.bfloat16], True, 8),
        ([torch.float64], True, 2),
        ([torch.float32, torch.bfloat16], True, 8),
        ([torch.float32], False, 1),
        ([torch.bfloat16], False, 1),
    ],
)
def test_elements_loaded_at_once(dtypes, aligned, wanted):
    assert vector(dtypes, aligned) == wanted


def test_interpreter_is_read_from_the_environment(monkeypatch):
    for value, wanted in [("1", True), ("0", False)]:
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert dispatch.is_interpreted() is wanted
    monkeypatch.delenv("TRITON_INTERPRET")
    assert dispatch.is_interpreted() is False


# -- path_of: the same from real rows ------------------------------------------------------------------------------


@pytest.fixture
def interpreted(monkeypatch):
    """A CPU that the kernels could run on; what is tested here is which path is named, and no kernel is reached."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "triton_is_available", lambda: True)


def parameters(*dtypes, device="cpu"):
    return [torch.zeros(3, dtype=dtype, device=device) for dtype in dtypes or (torch.float32,)]


def unread():
    raise AssertionError("the path was known, and the gradients were gone through all the same")
    yield


def test_torch_is_taken_without_a_look_at_the_gradients(interpreted):
    assert path_of("torch", unread(), parameters()) == "torch"


def test_auto_on_a_cpu_is_taken_without_a_look_at_the_gradients(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert path_of("auto", unread(), parameters()) == "torch"


def test_parameters_on_several_devices(interpreted):
    like = [*parameters(), *parameters(device="meta")]
    with pytest.raises(ValueError, match=r"shared parameters are on \['cpu', 'meta'\].*backend='auto'"):
        path_of("triton", unread(), like)
    assert path_of("auto", unread(), like) == "torch"


SPARSE = torch.sparse_coo_tensor([[1]], [1.0], (3,))
NARROW, WIDE = parameters(torch.bfloat16)[0], parameters(torch.float64)[0]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (None, ""),
        (NARROW, ""),
        (SPARSE, "there are sparse gradients"),
        (WIDE, "rows of torch.float64 for parameters of torch.float32 have no kernel"),
    ],
)
def test_one_gradient_decides(interpreted, second, message):
    """Rows may be generators: each is gone through once."""
    like = parameters(torch.float32, torch.float32)

    def rows():
        yield iter([torch.ones(3), None])
        yield iter([None, second])

    assert path_of("auto", rows(), like) == ("torch" if message else "triton")
    if message:
        with pytest.raises(ValueError, match=message):
            path_of("triton", rows(), like)
    else:
        assert path_of("triton", rows(), like) == "triton"


def test_no_row_and_no_gradient_is_no_obstacle(interpreted):
    assert path_of("auto", [], parameters()) == "triton"
    assert path_of("auto", [[None], [None]], parameters()) == "triton"


def test_rows_where_triton_cannot_run(monkeypatch):
    rows = [[torch.ones(3)], [torch.ones(3)]]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "triton_is_available", lambda: True)
    with pytest.raises(ValueError, match="the gradients are on cpu"):
        path_of("triton", rows, parameters())
    monkeypatch.setattr(dispatch, "triton_is_available", lambda: False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        path_of("triton", rows, parameters())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert path_of("auto", rows, parameters()) == "torch"


# -- what a step does with it --------------------------------------------------------------------------------------


class GradientTable(nn.Module):
    """Two losses of one embedding with sparse gradients."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 3, sparse=True)

    def losses(self, batch):
        z = self.table(torch.arange(4))
        return {"left": z.square().mean(), "right": (z - 1).square().mean()}


def reports(model, **options):
    """Return the report of a step and the warnings it gave; warnings are errors in this project."""
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=0.1), **options)
    optimizer.total(model.losses(0)).backward()
    optimizer.step()
    return optimizer.report


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_report_names_the_path_on_a_cpu(monkeypatch, backend):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    report = reports(AllShared(), backend=backend)
    assert (report.path, report.tasks) == ("torch", TASKS)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (AllShared, {"backend": "torch"}),
        (AllShared, {"surgery": "graddrop"}),
        (AllShared, {"margin": 0.1}),
        (AllShared, {"row_dtype": torch.float64}),
        (GradientTable, {}),
    ],
)
def test_auto_falls_back_silently_where_there_is_no_kernel(interpreted, model, options):
    assert reports(model(), **options).path == "torch"


def test_auto_falls_back_silently_without_triton(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "triton_is_available", lambda: False)
    assert reports(AllShared()).path == "torch"


def test_several_ranks(interpreted):
    """The rows of several ranks stay with torch: silently for "auto", an error for those who asked for Triton."""
    p = torch.nn.Parameter(torch.zeros(2))
    rows = TaskRows()
    rows.add("left", Row([(p, torch.tensor([1.0, 0.0]))]))
    rows.add("right", Row([(p, torch.tensor([-2.0, 1.0]))]))

    def outcome(backend):
        settings = options_from({"backend": backend}, [torch.optim.SGD([p], lr=0.1)])
        return compute_direction(StepInputs(rows, [p], [[p]], {}, settings, 0, {}, layout=Layout()))

    with pytest.raises(ValueError, match=r"several ranks.*backend='auto'"):
        outcome("triton")
    assert settled(outcome("auto").report).path == "torch"
