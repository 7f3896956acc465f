"""Random programs of tests/behaviour under DDP: the ranks run the same one on batches of their own."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.behaviour.judge import Judge, run
from tests.behaviour.programs import Program, Spec
from tests.behaviour.users import User, wide


class RankJudge(Judge):
    """Judges one rank's steps by the mean of all ranks' gradients, and that the ranks stay together."""

    alone = False

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.through = DistributedDataParallel(self.net)

    def forward(self, batch: int, names: tuple[str, ...] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the model on this rank's batch."""
        return self.through(batch + 5000 * dist.get_rank(), names)

    def brought(self, step: Spec, batch: int, last: bool, names: list[str]) -> None:
        """Add the mean of the ranks' gradients to the rows, past DDP, which would take part."""
        module, self.through = self.through, self.net
        super().brought(step, batch, last, names)
        self.through = module

    def mean(self, row: list[Tensor | None]) -> list[Tensor | None]:
        """Return the mean of a row over all ranks."""
        result: list[Tensor | None] = []
        for g in row:
            numbers = None if g is None else wide(g)
            if g is not None and numbers is not None:
                dist.all_reduce(numbers)
                numbers = numbers / dist.get_world_size()
                dense = g.to_dense()
                real = torch.view_as_real(dense) if g.is_complex() else dense
                mean = numbers.reshape(real.shape)
                result.append((torch.view_as_complex(mean) if g.is_complex() else mean).to(g.dtype))
            else:
                result.append(None)
        return result

    def judged(self, step: Spec, before: User) -> None:
        """Do a step, judge it, and compare the ranks."""
        super().judged(step, before)
        for i, p in enumerate(self.parameters):
            least, most = wide(p), wide(p)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            assert torch.equal(least, most) or p.isnan().any(), f"parameter {i} differs between the ranks"

    def reload(self, spec: Spec) -> None:
        """Go on with a fresh model and optimizer that load the state."""
        super().reload({"how": "bare" if spec.get("how") == "bare" else "state_dict"})
        self.through, self.twin = DistributedDataParallel(self.net), None

    def take_as_twin(self, before: User) -> None:
        """Do without a twin, which would have to be one on all ranks."""


def programs(first: int, count: int) -> None:
    """Run the programs of some seeds, without what DDP does not allow or what other ranks make right."""
    for seed in range(first, first + count):
        program = Program.draw(seed)
        actions = [(name, spec) for name, spec in program.actions if name != "freeze"]
        program = replace(program, actions=tuple(each for each in actions if each[1].get("where") != "argument"))
        try:
            run(program, RankJudge)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {program}") from error
