"""Scikit-learn's small tables as one suite: four sets with inputs of their own, six tasks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.quality.problems.base import Net, Problem, Split, Stream, classes, numbers

__all__ = ["tables"]

HIDDEN = 32


def tables(seed: int = 0) -> Problem:
    """Build it; the sets are small, so every seed draws its own split, 50 : 20 : 30.

    Breast cancer: from the ten mean features, the diagnosis and the worst area and worst concavity. Wine: the cultivar.
    Diabetes: from age, sex, body mass index and blood pressure, the progression and six blood values. Linnerud:
    weight, waist and pulse of twenty men from three exercises; trained, but not judged: on six men of the test split,
    the error of one and the same method goes from 75 % to 370 % of the standard deviation between learning rates.
    """
    from sklearn.datasets import load_breast_cancer, load_diabetes, load_linnerud, load_wine

    generator = torch.Generator().manual_seed(seed)
    cancer, wine, diabetes, linnerud = load_breast_cancer(), load_wine(), load_diabetes(), load_linnerud()
    worst = [list(cancer.feature_names).index(name) for name in ("worst area", "worst concavity")]
    streams = {
        "cancer": _stream(
            cancer.data[:, :10],
            {"diagnosis": torch.from_numpy(cancer.target)},
            {"worst": torch.from_numpy(cancer.data[:, worst]).float()},
            generator,
        ),
        "wine": _stream(wine.data, {"cultivar": torch.from_numpy(wine.target)}, {}, generator),
        "diabetes": _stream(
            diabetes.data[:, :4],
            {},
            {
                "progression": torch.from_numpy(diabetes.target[:, None]).float(),
                "serum": torch.from_numpy(diabetes.data[:, 4:]).float(),
            },
            generator,
        ),
        "linnerud": _stream(linnerud.data, {}, {"body": torch.from_numpy(linnerud.target).float()}, generator),
    }
    features = {name: stream.train.inputs.shape[1] for name, stream in streams.items()}

    def net(tasks: Sequence[str], width: float) -> Net:
        hidden = int(HIDDEN * width)
        inlets = {name: nn.Sequential(nn.Linear(n, hidden), nn.ReLU()) for name, n in features.items()}
        trunk = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        return Net(inlets, trunk, {task: nn.Linear(hidden, outputs[task]) for task in tasks})

    tasks = {
        "diagnosis": classes("diagnosis", 2, "diagnosis"),
        "worst": numbers("worst", ("worst area", "worst concavity")),
        "cultivar": classes("cultivar", 3, "cultivar"),
        "progression": numbers("progression", ("progression",)),
        "serum": numbers("serum", [f"serum {k}" for k in range(1, 7)]),
        "body": numbers("body", ("weight", "waist", "pulse")),
    }
    outputs = {name: task.outputs for name, task in tasks.items()}
    return Problem(
        name="tables",
        title="scikit-learn's breast cancer, wine, diabetes and linnerud sets with one shared trunk",
        tasks=tasks,
        streams=streams,
        net=net,
        steps=150,
        batch=32,
        wide=9.0,
        unjudged=("body",),
    )


def _stream(inputs: object, labels: dict[str, Tensor], values: dict[str, Tensor], generator: torch.Generator) -> Stream:
    """Split, and standardise inputs and numbers by the training split's mean and deviation."""
    x = torch.as_tensor(inputs).float()
    order = torch.randperm(len(x), generator=generator)
    cuts = [0, round(0.5 * len(x)), round(0.7 * len(x)), len(x)]
    train, valid, test = (order[a:b] for a, b in itertools.pairwise(cuts))

    def standard(numbers: Tensor) -> Tensor:
        return (numbers - numbers[train].mean(0)) / numbers[train].std(0, correction=0)

    x, values = standard(x), {task: standard(target) for task, target in values.items()}
    everything = Split(x, labels | values)
    return Stream(everything.rows(train), everything.rows(valid), everything.rows(test))
