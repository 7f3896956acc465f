"""A whole step of a wrapped optimizer, on any device: for tests on a card and in the interpreter."""

from contextlib import nullcontext

import torch

import gradsurg

__all__ = [
    "CAPTURABLE",
    "COEFFICIENTS",
    "WITHOUT_WAITING",
    "Model",
    "masked_steps",
    "replayed_and_eager",
    "step",
    "trained",
    "wrapped",
]

ADAM, SGD = torch.optim.Adam, torch.optim.SGD

# Options of wrap and an optimizer: what is promised not to wait for a device.
WITHOUT_WAITING = [
    ({"surgery": "cone"}, (ADAM, {})),
    ({"surgery": "upgrad", "normalize": "none", "granularity": "group"}, (SGD, {"momentum": 0.9})),
    ({"surgery": "mgda", "guarantee": "gradient", "preferences": {"b": 2.0}}, (torch.optim.RMSprop, {})),
    ({"surgery": "sum", "granularity": "tensor"}, (torch.optim.AdamW, {"weight_decay": 0.1, "maximize": True})),
    ({"surgery": "mean", "primary": "b", "auxiliary": "help", "row_dtype": torch.bfloat16}, (SGD, {})),
    ({"surgery": "cone", "primary": [["a"], ["b"]], "guarantee": "none"}, (SGD, {"nesterov": True, "momentum": 0.5})),
]
# The same, of optimizers that a CUDA graph can hold.
CAPTURABLE = [
    ({"surgery": "cone"}, (SGD, {"momentum": 0.9})),
    ({"surgery": "upgrad", "granularity": "group"}, (ADAM, {"capturable": True})),
    ({"surgery": "mgda", "guarantee": "gradient"}, (torch.optim.AdamW, {"capturable": True})),
]
# Factors of the three losses that decide what surgery and guarantee have to do: the tasks as they are; the third
# against the second, so that only what the first leaves them can stay; and one that is not finite.
COEFFICIENTS = [(1.0, 1.0, 1.0), (0.1, 1.0, -1.0), (1.0, float("inf"), 1.0)]


class Model(torch.nn.Module):
    """A trunk with parameters of two dtypes, in two orders of elements, and a scalar; three heads."""

    def __init__(self, device="cpu", narrow=torch.bfloat16):
        super().__init__()
        draw = torch.Generator().manual_seed(0)

        def parameter(*shape, dtype=torch.float32):
            return torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype))

        self.first = torch.nn.Parameter(torch.randn(6, 5, generator=draw).T)
        self.second = parameter(6, 4, dtype=narrow)
        self.shift = parameter()
        self.heads = torch.nn.ParameterList([parameter(4) for _ in range(3)])
        x, y = torch.randn(8, 5, generator=draw), torch.randn(3, 8, generator=draw)
        for name, tensor in {"x": x, "y": y, "coefficients": torch.ones(3)}.items():
            self.register_buffer(name, tensor)
        self.to(device)

    def losses(self):
        h = torch.tanh(self.x @ self.first + self.shift)
        h = (h.to(self.second.dtype) @ self.second).float()
        return {
            name: self.coefficients[i] * (h @ self.heads[i] - self.y[i]).square().mean() for i, name in enumerate("abc")
        }


def wrapped(model, optimizer, backend="triton", **options):
    """Return a wrapped optimizer of the model: (class, its settings), in two groups."""
    kind, settings = optimizer
    groups = [{"params": [model.first, model.shift]}, {"params": [model.second, *model.heads], "lr": 0.02}]
    return gradsurg.wrap(kind(groups, lr=0.05, **settings), backend=backend, **options)


def step(model, optimizer, watch=nullcontext):
    """Do a step, under `watch()` from the first backward to its end; return what p.grad was before the optimizer's."""
    optimizer.zero_grad()
    losses = model.losses()
    with watch():
        optimizer.total(losses).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    return gradients


def trained(backend, optimizer, steps, watch=None, device="cpu", **options):
    """Return what p.grad was after the first surgery, the parameters and the report after its step, and the optimizer.

    The last step is under `watch`. Steps after the first only show that they run: where a parameter of 16 bits was
    rounded the other way, they part.
    """
    model = Model(device)
    mine = wrapped(model, optimizer, backend, **options)
    first: list = []
    for k in range(steps):
        gradients = step(model, mine, watch if watch and k == steps - 1 else nullcontext)
        first = first or [gradients, [p.detach().clone() for p in model.parameters()], mine.report]
    return *first, mine


def replayed_and_eager(model, optimizer, capture, alone):
    """Yield parameters and state after one step from the same start, replayed and eager, for all COEFFICIENTS.

    Args:
        model: A Model.
        optimizer: Its wrapped optimizer, which has done steps before.
        capture: Takes a function, and returns what replays it.
        alone: A context manager in which eager steps run, and at whose end they are done.
    """

    def numbers():
        state = [t for entry in optimizer.state.values() for t in entry.values() if torch.is_tensor(t)]
        return [*(p.detach() for p in model.parameters()), *state]

    def back_to_the_start(coefficients):
        with alone():
            for t, old in zip(numbers(), start, strict=True):
                t.copy_(old)
            model.coefficients.copy_(torch.tensor(coefficients))

    with alone():
        start = [t.clone() for t in numbers()]
    replay = capture(lambda: step(model, optimizer))
    for coefficients in COEFFICIENTS:
        back_to_the_start(coefficients)
        with alone():
            replay()
            replayed = [t.clone() for t in numbers()]
        back_to_the_start(coefficients)
        with alone():
            step(model, optimizer)
            eager = [t.clone() for t in numbers()]
        assert not all(map(torch.equal, eager, start))
        yield replayed, eager


def masked_steps(make, backend, watch, device="cpu"):
    """Yield the movement and the task gradients, by autograd, of four steps in which not every number may move.

    Three groups, of which one has rate 0; five numbers of the first have their gradient set to zero.
    """
    draw = torch.Generator().manual_seed(5)
    parameters = [torch.nn.Parameter(torch.randn(n, generator=draw).to(device)) for n in (12, 30, 9)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, (0.1, 0.002, 0.0), strict=True)]
    optimizer = gradsurg.wrap(make(groups, lr=0.1), surgery="mean", normalize="none", backend=backend)
    for k in range(4):
        rows = torch.randn(3, 51, generator=draw)
        rows[1] -= 1.5 * rows[0]
        losses = {str(i): torch.cat(parameters) @ row for i, row in enumerate(rows.to(device))}
        gradients = [torch.autograd.grad(x, parameters, retain_graph=True) for x in losses.values()]
        before = [p.detach().clone() for p in parameters]
        optimizer.zero_grad()
        # The first steps compile, make the optimizer's state, and look at tensors on the CPU for what tasks reach.
        with watch() if k > 1 else nullcontext():
            optimizer.total(losses).backward()
            parameters[0].grad[:5] = 0
            optimizer.step()
        assert optimizer.report.path == backend
        moves = [old - p.detach() for old, p in zip(before, parameters, strict=True)]
        yield moves, gradients, bool(optimizer.report.movement.corrected)
