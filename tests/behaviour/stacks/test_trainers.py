"""The trainers people use, through the examples that the documentation shows: docs/examples/*.py on real digits.

Each trains with accumulation, clipping and a schedule, and goes on from a checkpoint to the bits of an uninterrupted
run. Three of them see the same batches in the same order, so they must agree with one loop written by hand.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradsurg
from tests.networks import equal_weights, same

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def by_hand():
    """Two epochs of what the examples do, in plain torch."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Module()
    model.trunk = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16), nn.ReLU())
    model.digit, model.pixels = nn.Linear(16, 10), nn.Linear(16, 64)
    optimizer = gradsurg.wrap(torch.optim.AdamW(model.parameters(), lr=3e-3))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=8 * 24)
    for _ in range(2):
        for index, (images, labels) in enumerate(DataLoader(TensorDataset(x[:1536], y[:1536]), batch_size=32)):
            z = model.trunk(images)
            losses = {
                "digit": nn.functional.cross_entropy(model.digit(z), labels),
                "pixels": nn.functional.mse_loss(model.pixels(z), images),
            }
            (optimizer.total(losses) / 2).backward()
            if index % 2 == 1:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return model


def check_steps(optimizer, steps):
    """Every step was one of several losses, held to the guarantee."""
    report = gradsurg.report(optimizer)
    assert report.step == steps - 1
    assert report.tasks == ("digit", "pixels")
    assert report.movement is not None
    assert (report.update_cosines >= -1e-4).all()


def check_same(model, other):
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), name


# -- Ignite ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning:torch.jit._script")
def test_ignite(tmp_path, by_hand):
    ignite_loop = example("ignite_loop")
    model, optimizer = ignite_loop.train(str(tmp_path), epochs=2)
    check_steps(optimizer, 48)
    check_same(model, by_hand)
    (first,) = tmp_path.glob("checkpoint_48.pt")
    resumed, optimizer = ignite_loop.train(str(tmp_path / "resumed"), epochs=2, resume=first)
    check_steps(optimizer, 48)
    check_same(resumed, model)


# -- Accelerate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def _accelerator_forgotten():
    """Accelerate keeps what the first Accelerator of a process chose."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.usefixtures("_accelerator_forgotten")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(tmp_path, by_hand, precision):
    accelerate_loop = example("accelerate_loop")
    model, optimizer = accelerate_loop.train(str(tmp_path / "whole"), 2, precision)
    assert not isinstance(optimizer, gradsurg.MultiTaskOptimizer), "gradsurg.total had no proxy to see through"
    check_steps(optimizer, 48)
    if precision == "no":
        check_same(model, by_hand)
    else:
        assert not equal_weights(model, by_hand), "autocast did nothing"
    accelerate_loop.train(str(tmp_path / "part"), 1, precision)
    resumed, optimizer = accelerate_loop.train(str(tmp_path / "part"), 2, precision, resume=True)
    check_steps(optimizer, 48)
    check_same(resumed, model)


# -- Lightning -------------------------------------------------------------------------------------------------------

QUIET = {"enable_progress_bar": False, "enable_model_summary": False}


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning:lightning.pytorch")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning:lightning.pytorch")
@pytest.mark.parametrize("manual", [False, True])
def test_lightning(tmp_path, by_hand, manual):
    lightning_trainer = example("lightning_trainer")
    model = lightning_trainer.train(str(tmp_path / "whole"), 2, manual, **QUIET)
    check_steps(model.optimizers(), 48)
    check_same(model, by_hand)
    lightning_trainer.train(str(tmp_path / "part"), 1, manual, **QUIET)
    (checkpoint,) = (tmp_path / "part").rglob("*.ckpt")
    resumed = lightning_trainer.train(str(tmp_path / "part"), 2, manual, str(checkpoint), **QUIET)
    check_steps(resumed.optimizers(), 48)
    check_same(resumed, model)


# -- Hugging Face ----------------------------------------------------------------------------------------------------

SILENT = {"disable_tqdm": True, "logging_strategy": "no"}


@pytest.mark.usefixtures("_accelerator_forgotten")
def test_huggingface_resumes(tmp_path):
    huggingface_trainer = example("huggingface_trainer")
    whole = huggingface_trainer.train(
        str(tmp_path), max_steps=8, save_strategy="steps", save_steps=4, dataloader_num_workers=0, **SILENT
    )
    check_steps(whole.optimizer, 8)
    resumed = huggingface_trainer.train(
        str(tmp_path), max_steps=8, save_strategy="no", resume=str(tmp_path / "checkpoint-4"), **SILENT
    )
    check_steps(resumed.optimizer, 8)
    check_same(resumed.model, whole.model)
    # Evaluation goes through compute_loss as well, without a gradient and without touching one.
    metrics = resumed.evaluate(huggingface_trainer.data()[1500:1564])
    assert metrics["eval_loss"] > 0
    assert all(p.grad is None for p in resumed.model.parameters())


@pytest.mark.usefixtures("_accelerator_forgotten")
@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_huggingface_with_one_task_is_the_plain_trainer_to_the_bit(tmp_path, monkeypatch, settings):
    huggingface_trainer = example("huggingface_trainer")
    results = []
    for ours in (True, False):

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, ours=ours):
            loss = sum(model(**inputs).values())
            return gradsurg.total(self.optimizer, {"all": loss}) if ours else loss

        monkeypatch.setattr(huggingface_trainer.MultiTaskTrainer, "compute_loss", compute_loss)
        if not ours:
            monkeypatch.setattr(gradsurg, "wrap", lambda optimizer: optimizer)
        trainer = huggingface_trainer.train(
            str(tmp_path), max_steps=4, save_strategy="no", **{**SILENT, "logging_strategy": "steps"},
            logging_steps=1, **settings,
        )  # fmt: skip
        log = [(entry["grad_norm"], entry["learning_rate"], entry["loss"]) for entry in trainer.state.log_history[:4]]
        results.append((trainer.model, log))
    (model, log), (plain, plain_log) = results
    check_same(model, plain)
    assert same(log, plain_log)


# -- as a user runs them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ignite_loop"])
def test_examples_run_as_scripts(name):
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--epochs", "1"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "in conflict" in done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*_loop.py")) + sorted(EXAMPLES.glob("*_trainer.py")))
def test_examples_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80
