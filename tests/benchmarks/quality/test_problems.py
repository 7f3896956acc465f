"""No example in two splits, targets that fit the heads, scores that are what they are called."""

import itertools
import math

import pytest
import torch

from benchmarks.quality.problems import PROBLEMS, Split, batches, problem
from benchmarks.quality.problems.base import ABSENT, accuracy
from benchmarks.quality.problems.chinese import BEGIN, END, MIDDLE, SINGLE, word_f1

B, M, E, S = BEGIN, MIDDLE, END, SINGLE


@pytest.mark.parametrize("name", PROBLEMS)
def test_splits_do_not_share_examples(name):
    for stream in problem(name).streams.values():
        parts = [{tuple(row.tolist()) for row in part.inputs} for part in (stream.train, stream.valid, stream.test)]
        for a, b in itertools.combinations(parts, 2):
            assert not a & b


@pytest.mark.parametrize("name", PROBLEMS)
def test_losses_and_scores_of_an_untrained_model(name):
    p = problem(name)
    torch.manual_seed(0)
    net = p.net(list(p.tasks), 1.0)
    parts = next(batches(p, list(p.tasks), 0))
    losses = p.losses(net, parts, list(p.tasks))
    assert list(losses) == list(p.tasks)
    priors = p.priors()
    for task, loss in losses.items():
        assert loss.ndim == 0
        assert 0.5 < loss.item() / priors[task] < 10  # hardly better than the best constant, on a batch
    for split in ("valid", "test"):
        for task, values in p.scores(net, split, list(p.tasks)).items():
            assert len(values) == len(p.tasks[task].metrics)
            assert all(map(math.isfinite, values))


def test_wide_models_are_wider_and_single_task_models_have_one_head():
    p = problem("digits")
    count = [sum(q.numel() for q in p.net(list(p.tasks), width).trunk.parameters()) for width in (1.0, p.wide)]
    assert count[1] > count[0] * p.wide
    assert list(p.net(["left"], 1.0).heads) == ["left"]


def test_batches_go_through_all_examples_before_any_comes_again():
    p = problem("tables")
    rows = len(p.streams["wine"].train.inputs)
    source = batches(p, ["cultivar"], 3)
    seen = torch.cat([next(source)["wine"].inputs for _ in range(rows // p.batch)])
    assert len({tuple(row.tolist()) for row in seen}) == len(seen)
    assert set(next(source)) == {"wine"}


def test_the_split_of_small_sets_is_drawn_by_the_seed():
    one, other, again = (PROBLEMS["tables"](seed).streams["wine"].test.inputs for seed in (1, 2, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def logits(labels):
    return torch.nn.functional.one_hot(torch.tensor(labels), 4).float()


@pytest.mark.parametrize(
    ("found", "true", "f1"),
    [
        ([B, E, S, B, M, E], [B, E, S, B, M, E], 100.0),
        ([S, S, S, B, M, E], [B, E, S, B, M, E], 200 * 2 / (4 + 3)),  # two words of three found, four named
        ([B, M, M, M, M, E], [B, E, S, B, M, E], 0.0),
        ([B, E, S, S, ABSENT, ABSENT], [B, E, B, E, ABSENT, ABSENT], 200 * 1 / (3 + 2)),
    ],
)
def test_f1_of_words_by_hand(found, true, f1):
    output = logits([max(label, 0) for label in found])[None]
    assert word_f1(output, torch.tensor([true])) == pytest.approx(f1)


def test_accuracy_leaves_out_what_has_no_label():
    assert accuracy(logits([[B, E, S]]), torch.tensor([[B, S, ABSENT]])) == 50


def test_rows_of_a_split_keep_inputs_and_targets_together():
    split = Split(torch.arange(4.0)[:, None], {"t": torch.arange(4)})
    part = split.rows(torch.tensor([2, 0]))
    assert part.inputs.flatten().tolist() == part.targets["t"].tolist() == [2, 0]
