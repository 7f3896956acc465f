"""MultiTaskOptimizer: the ways in which task losses, or their gradients, reach a wrapped optimizer."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurg.distributed.detect import several_ranks
from gradsurg.gradients.compile import outside_compilation
from gradsurg.gradients.losses import Computations, Losses, check_scalar, of_one_stack, parse_losses, value_of
from gradsurg.gradients.total import Total
from gradsurg.optimizer.backward import run_backward, set_rows, task_block
from gradsurg.optimizer.cheap.features import check_features
from gradsurg.optimizer.cheap.rotation import ROWS
from gradsurg.optimizer.checkpoint import sealed
from gradsurg.optimizer.engine import Engine
from gradsurg.optimizer.loading import checked
from gradsurg.optimizer.report import Report
from gradsurg.optimizer.run import Run, several_processes
from gradsurg.surgery.pipeline import check_mapping

__all__ = ["MultiTaskOptimizer"]


class MultiTaskOptimizer(Optimizer):
    """What `wrap` makes of an optimizer: itself, with four more ways for gradients to come in.

    Never built directly. The wrapped object stays an instance of its own class, with its state, parameter groups and
    hooks; what is added is listed here.
    """

    _gradsurg: Engine

    def total(
        self,
        losses: Losses,
        *,
        plain: Tensor | None = None,
        features: Tensor | Sequence[Tensor] | None = None,
        preferences: Mapping[str, float] | None = None,
    ) -> Tensor:
        """Return the preference-weighted sum Σ r_i L_i, a scalar whose backward() does the surgery.

        Each task's backward pass runs when backward() reaches this node; the surgery runs when all of that backward
        pass is done, so `(total + penalty).backward()` adds the penalty's gradient untouched.

        Args:
            losses: Task name -> scalar loss, or losses in order: a list, a generator, `losses.values()`, or one tensor
                of shape (m,), as torch.stack makes it. None, or a loss that does not require grad, is
                a task absent from this step.
            plain: A loss that takes no part in surgery, such as a penalty: its gradient is added as it is.
            features: The tensor, or tensors, that the shared part of the model returned and the heads read. Surgery
                is then done on ∂L_i/∂features, and one backward pass runs through what lies before them: the cost of
                a plain step. What is promised holds for the features, not for the parameters; see docs/cheap-modes.md.
            preferences: Task name -> r_i ≥ 0 for this step alone, in place of those of wrap(). A task with r_i = 0 has
                no part in the direction of shared parameters and is protected all the same; its head gets its plain
                gradient.

        Returns:
            A scalar on the first loss's device, float32 at least. Under no_grad, a plain number.

        Raises:
            ValueError: No task at all (under DDP: on no rank); a loss that is not a real scalar; a name that is not
                declared; features that the losses do not depend on, or that are no result of the model.

        Example:
            >>> import torch, gradsurg
            >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
            >>> optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
            >>> optimizer.total({"a": w[0] ** 2, "b": (w[1] - 3) ** 2}).backward()
            >>> optimizer.step()
        """
        engine = self._gradsurg
        if isinstance(losses, Tensor) and losses.dim() == 1:
            losses = _apart(engine, losses.unbind(), features)
        # With other ranks, this one may have no task in a step, and takes part in what the others have.
        others = several_processes() and several_ranks()
        # Without functions=True, each is a tensor or None.
        parsed = cast("dict[str, Tensor | None]", parse_losses(losses, engine.options.tasks, empty=others))
        if of_one_stack(parsed.values()):
            _apart(engine, losses, features)
        plain = None if plain is None else check_scalar("plain", plain)
        own = {} if preferences is None else check_mapping("preferences", preferences, zero=True)
        given = {**engine.options.preferences, **engine.step.preferences, **own}
        value = value_of(parsed, given, plain, lambda: engine.parameters()[0].device)
        trainable = [t for t in (*parsed.values(), plain) if t is not None and t.requires_grad]
        if not torch.is_grad_enabled() or not (trainable or others):
            return value.clone()
        through = None if features is None else check_features(features, engine.options)
        if not others:  # which may have the tasks that this rank lacks: step() warns of names that none has
            engine.check_names(parsed, own)
        # Now, and not only when the run begins: DDP's own reduction must be switched off before any loss beside this
        # total runs backward.
        engine.lay_out()
        engine.step.unrun += 1
        engine.told.add("no losses")
        run = Run(parsed, plain, through, own, nested=True, owner=self, on_live_rows=True)
        if engine.step.losses or engine.step.constraint is not None:
            run.on_live_rows = engine.capture.is_untouched()
        # On the loss's device: only then autograd makes later work wait for the streams of these backward passes.
        anchor = torch.zeros((), device=trainable[0].device if trainable else value.device, requires_grad=True)
        # Looked up here, which torch.compile does not trace.
        start = functools.partial(outside_compilation(run_backward), engine, run)
        return cast(Tensor, Total.apply(anchor, start, value))  # type: ignore[no-untyped-call]

    def backward(
        self,
        losses: Losses | Computations,
        *,
        plain: Tensor | None = None,
        features: Tensor | Sequence[Tensor] | None = None,
        preferences: Mapping[str, float] | None = None,
        retain_graph: bool = False,
    ) -> None:
        """Do what total(losses).backward() does, without nesting one backward pass in another.

        The reference form, and the safe choice with several devices or side streams. It also takes functions instead
        of losses: each is called just before its backward pass, so that only one task's graph exists at a time. A
        function that returns None is a task absent from this step.

        Args:
            losses: As for `total`; any of them may be a function of no arguments that computes the loss.
            plain: As for `total`.
            features: As for `total`.
            preferences: As for `total`.
            retain_graph: Keep the graph of the losses for another backward pass.

        Raises:
            ValueError: As for `total`; also if no loss requires grad.

        Example:
            >>> import torch, gradsurg
            >>> trunk = torch.nn.Linear(3, 4)
            >>> heads = torch.nn.ModuleList([torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)])
            >>> parameters = [*trunk.parameters(), *heads.parameters()]
            >>> optimizer = gradsurg.wrap(torch.optim.SGD(parameters, lr=0.1))
            >>> x = torch.ones(5, 3)
            >>> def loss(task):
            ...     return (heads[task](torch.tanh(trunk(x))) - task).square().mean()
            >>> optimizer.backward({"zero": lambda: loss(0), "one": lambda: loss(1)})
            >>> optimizer.step()
        """
        engine = self._gradsurg
        if isinstance(losses, Tensor) and losses.dim() == 1:
            losses = _apart(engine, losses.unbind(), features)
        functions = features is None and engine.options.refresh_every == 1
        others = several_processes() and several_ranks()
        parsed = parse_losses(losses, engine.options.tasks, functions=functions, empty=others)
        if of_one_stack(parsed.values()):
            _apart(engine, losses, features)
        plain = None if plain is None else check_scalar("plain", plain)
        given = None if features is None else check_features(features, engine.options)
        own = {} if preferences is None else check_mapping("preferences", preferences, zero=True)
        trainable = (callable(t) or (t is not None and t.requires_grad) for t in (*parsed.values(), plain))
        if not others and not any(trainable):
            raise ValueError(f"no loss of {list(parsed)} requires grad: there is nothing to run backward through")
        if not others:  # which may have the tasks that this rank lacks: step() warns of names that none has
            engine.check_names(parsed, own)
        run_backward(engine, Run(parsed, plain, given, own, retain_graph=retain_graph))

    @contextmanager
    def task(self, name: str, *, preferences: Mapping[str, float] | None = None) -> Iterator[None]:
        """Send ordinary backward calls, any number, to one task's row.

        For separate loaders, alternating tasks, or code that calls backward itself. Surgery is redone at each exit,
        so that p.grad is final before unscaling and clipping; with `tasks=[...]` declared in wrap it is done once,
        at the exit of the last of them. If the block raises, nothing of it is kept.

        Args:
            name: The task.
            preferences: As for `total`; those of all blocks of a step add up.

        Raises:
            ValueError: The name is not among the declared tasks.

        Example:
            >>> import torch, gradsurg
            >>> w = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
            >>> for name, loss in {"a": w.sum(), "b": (2 * w[0] - w[1])}.items():
            ...     with optimizer.task(name):
            ...         loss.backward()
            >>> optimizer.step()
        """
        with task_block(self._gradsurg, name, preferences):
            yield

    def set_gradients(
        self, gradients: Mapping[str, Sequence[Tensor | None]], *, preferences: Mapping[str, float] | None = None
    ) -> None:
        """Use gradients that were computed elsewhere as one step's rows.

        Args:
            gradients: Task name -> one tensor or None per shared parameter: those given as `shared=` to wrap, in that
                order, else all parameters of the optimizer that require grad, in the order of its groups. The tensors
                are copied.
            preferences: As for `total`.

        Raises:
            ValueError: A wrong number of tensors, or a wrong shape or dtype; the message names task and position.

        Example:
            >>> import torch, gradsurg
            >>> w = torch.nn.Parameter(torch.zeros(2))
            >>> optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=1.0), normalize="none")
            >>> a, b = torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 1.0])
            >>> optimizer.set_gradients({"a": [a], "b": [b]})
            >>> w.grad.tolist()
            [0.0, 1.0]
        """
        set_rows(self._gradsurg, gradients, preferences)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Only gather rows inside this block; surgery waits for a backward outside of it, or for step().

        Without it every micro-batch redoes the surgery on the rows accumulated so far, which is never wrong but costs
        its time again.

        Raises:
            MultiTaskError: At the end of the next backward pass, or at step(), if p.grad was changed meanwhile.

        Example:
            >>> import torch, gradsurg
            >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
            >>> optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1), normalize="none")
            >>> def losses():
            ...     return {"a": w[0] ** 2, "b": (w[1] - 3) ** 2}
            >>> with optimizer.accumulate():
            ...     (optimizer.total(losses()) / 2).backward()
            >>> (optimizer.total(losses()) / 2).backward()
            >>> w.grad.tolist()
            [2.0, -4.0]
        """
        engine = self._gradsurg
        before = engine.deferring
        try:
            try:
                engine.deferring = before + 1
                yield
            finally:
                engine.deferring = before
        except BaseException:
            # Ctrl-C may have come between the lines above.
            engine.deferring = before
            raise

    @property
    def report(self) -> Report | None:
        """What the last surgery and step did, a Report; None before the first.

        Reading it waits for the device if a step on CUDA left it there.
        """
        return self._gradsurg.report

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and rows alike; see torch.optim.Optimizer.zero_grad."""
        # If one of several optimizers has stepped, the others have yet to step, on the same rows.
        if not self._gradsurg.step.stepped:
            self._gradsurg.forget()
        super().zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state dict, with the averages of rotate= in it; see torch.optim.Optimizer."""
        methods = self._gradsurg.options.pipeline.methods
        return sealed(super().state_dict(), methods, **self._gradsurg.rotation.saved(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, of this or of a bare optimizer; see torch.optim.Optimizer.

        Raises:
            ValueError: What it says of the surgery is damaged, or of another version. Nothing is changed.
        """
        engine = self._gradsurg
        state_dict, averages = checked(self, state_dict, ROWS, engine.options.pipeline)
        super().load_state_dict(state_dict)
        engine.rotation.replace_averages(self, averages)


def _apart(engine: Engine, losses: Any, features: object) -> Any:
    """Return the losses, which are parts of one tensor: its graph gives each task zeros for the heads of all others."""
    options = engine.options
    for option, used in (
        ("features=", features is not None),
        ("refresh_every=", options.refresh_every > 1),
        ("batched=", options.batched),
    ):
        if used:
            raise ValueError(
                f"losses are parts of one tensor, in whose graph all losses depend on all heads, so {option} cannot "
                "tell whose head is whose: pass the losses that it was made of, as a list or dict, or leave that out"
            )
    engine.capture.stacked = True
    return losses
