"""Trainers in processes that torchrun started: what a user would run, who says nothing about ranks.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/distributed/jobs_trainers.py FOLDER
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

import gradsurg
from tests.distributed import nets

ACCUMULATED = 2
NORM = 0.5  # the first gradients are a hundred times longer
TIMEOUT = 220.0  # seconds until a rank that hangs prints where, and ends: 20 s alone, 60 s on a crowded machine


class Rows(Dataset[dict[str, Any]]):
    """The batches of all steps, row by row; a trainer chooses which rank sees which, and every row knows its number."""

    def __init__(self) -> None:
        batches = [nets.batch(step) for step in range(nets.STEPS * ACCUMULATED)]
        self.x, self.y = (torch.cat(each) for each in zip(*batches, strict=True))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"x": self.x[row], "y": self.y[row], "row": row}


class Watched(nets.Net):
    """Remembers which rows it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def of_rows(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        self.seen.append(rows["row"].tolist())
        return super().forward(rows["x"], rows["y"])


def alone(seen: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return what a plain loop in one process makes of these rows, batch by batch."""
    model, rows = nets.build(), Rows()
    optimizer = nets.optimizer_of(model)
    for i, batch in enumerate(seen):
        (optimizer.total(model(rows.x[batch], rows.y[batch])) / ACCUMULATED).backward()
        if i % ACCUMULATED == ACCUMULATED - 1:
            nn.utils.clip_grad_norm_(model.parameters(), NORM)
            optimizer.step()
            optimizer.zero_grad()
    return nets.state_of(model)


def huggingface(folder: str, size: int) -> tuple[Watched, Any]:
    """Train in Hugging Face's Trainer, `size` rows a rank and micro-batch."""
    from transformers import Trainer, TrainingArguments

    class Task(Watched):
        def forward(self, **rows: Tensor) -> dict[str, Tensor]:
            return self.of_rows(rows)

    class MultiTask(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Any:
            return gradsurg.total(self.optimizer, model(**inputs))

    model = nets.build(Task)
    optimizer = nets.optimizer_of(model)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=ACCUMULATED,
        max_grad_norm=NORM,
        num_train_epochs=1,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = MultiTask(model=model, args=arguments, train_dataset=Rows(), optimizers=(optimizer, constant))
    trainer.train()
    return model, trainer.optimizer


def accelerate(folder: str, size: int) -> tuple[Watched, Any]:
    """Train in a loop of one's own with an Accelerator."""
    from accelerate import Accelerator

    class Task(Watched):
        def forward(self, **rows: Tensor) -> dict[str, Tensor]:
            return self.of_rows(rows)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    net = nets.build(Task)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=size, shuffle=True)
    model, optimizer, loader = accelerator.prepare(net, nets.optimizer_of(net), loader)
    for rows in loader:
        with accelerator.accumulate(model):
            accelerator.backward(gradsurg.total(optimizer, model(**rows)))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), NORM)
            optimizer.step()
            optimizer.zero_grad()
    return net, optimizer


def lightning(folder: str, size: int, *, manual: bool = False) -> tuple[Watched, Any]:
    """Train in Lightning's Trainer, `size` rows a rank and micro-batch; total() is called inside DDP's forward.

    With `manual`, training_step() calls backward and step itself, which happens inside of DDP's forward too.
    """
    from lightning import LightningModule, Trainer

    class Task(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nets.build(Watched)

        def training_step(self, rows: dict[str, Tensor], _: int) -> Tensor:
            return gradsurg.total(self.optimizers(), self.net.of_rows(rows))

        def configure_optimizers(self) -> Any:
            return nets.optimizer_of(self.net)

    class Manual(Task):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, rows: dict[str, Tensor], number: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(gradsurg.total(optimizer, self.net.of_rows(rows)) / ACCUMULATED)
            if number % ACCUMULATED == ACCUMULATED - 1:
                self.clip_gradients(optimizer, NORM, "norm")
                optimizer.step()
                optimizer.zero_grad()

    task = Manual() if manual else Task()
    automatic = {} if manual else {"accumulate_grad_batches": ACCUMULATED, "gradient_clip_val": NORM}
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy="ddp",
        **automatic,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(task, torch.utils.data.DataLoader(Rows(), batch_size=size))
    return task.net, trainer.optimizers[0]


def lightning_manual(folder: str, size: int) -> tuple[Watched, Any]:
    """Train in Lightning's Trainer with manual optimization."""
    return lightning(folder, size, manual=True)


TRAINERS = {
    "huggingface": huggingface,
    "accelerate": accelerate,
    "lightning": lightning,
    "lightning_manual": lightning_manual,
}


def main(folder: Path) -> None:
    """Run every trainer and leave, of every rank, the state, the rows that it saw, and what the report says."""
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    for name, train in TRAINERS.items():
        model, optimizer = train(str(folder / name), nets.BATCH // int(os.environ["WORLD_SIZE"]))
        report = gradsurg.report(optimizer)
        said = {"step": report.step, "tasks": list(report.tasks), "cosines": report.update_cosines}
        result = {"state": nets.state_of(model), "seen": model.seen, "report": said}
        torch.save(result, folder / f"{name}-{dist.get_rank()}.pt")
    dist.barrier()  # nobody leaves while another is still at work
    # Not through the interpreter's teardown. A DDP module's reducer keeps gloo's worker threads alive behind
    # destroy_process_group(), and a worker that is still letting go of the last message's tensors waits for the GIL,
    # which CPython before 3.14 answers in its teardown by unwinding the thread: "terminate called without an active
    # exception", exit status -6. Seen once here, and in 9 of 16 processes whose last message had 20 000 tensors.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    faulthandler.enable()
    main(Path(sys.argv[1]))
