"""Three tasks under FSDP2: parameters, gradients, rows and optimizer state are sharded, and nothing is gathered.

Run: torchrun --nproc-per-node 2 docs/examples/fsdp2.py
"""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import gradsurg

WEIGHTS = torch.linspace(-1, 1, 16 * 3).reshape(16, 3)  # what the three targets are made from


class Net(nn.Module):
    """A trunk and one head a task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 32), nn.Tanh())
        self.heads = nn.ModuleDict({name: nn.Linear(32, 1) for name in ("a", "b", "c")})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return every task's loss."""
        z, targets = self.trunk(x), torch.sin(x @ WEIGHTS.to(x)).unbind(1)
        return {
            name: (head(z)[:, 0] - target).square().mean()
            for (name, head), target in zip(self.heads.items(), targets, strict=True)
        }


def main() -> None:
    """Train; every rank has its own part of each batch."""
    on_gpu = torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    rank = torch.distributed.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    model = Net().to(device)
    fully_shard(model.trunk)
    fully_shard(model)  # before the optimizer: it replaces the parameters
    optimizer = gradsurg.wrap(torch.optim.AdamW(model.parameters(), lr=1e-2))

    data = torch.Generator().manual_seed(rank)
    first = None
    for _ in range(60):
        losses = model(torch.randn(32, 16, generator=data).to(device))
        optimizer.zero_grad()
        optimizer.total(losses).backward()
        optimizer.step()
        first = first or {name: float(loss) for name, loss in optimizer.report.losses.items()}

    gradsurg.check_sync(model)  # raises if the ranks differ, and names the first parameter
    last = {name: float(loss) for name, loss in optimizer.report.losses.items()}  # means over the ranks
    if rank == 0:
        for name in last:
            print(f"{name}: {first[name]:.3f} -> {last[name]:.3f}")
    assert all(last[name] < first[name] for name in last)
    torch.distributed.barrier()  # no rank ends before the last messages have arrived
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
