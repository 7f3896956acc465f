"""Switching off DDP's own reduction: it expects one backward pass per forward pass, and surgery makes several.

Otherwise DDP raises "mark a variable ready only once" or, if every task reaches every parameter, averages the first
task and silently leaves the others local.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from gradsurg.errors import MultiTaskError
from gradsurg.gradients.compile import outside_compilation

__all__ = ["Replica"]


RESET = "_reset_state"  # of the reducer; private
ENQUEUED = "_static_graph_delay_allreduce_enqueued"  # an attribute of DDP modules with a static graph only


class Replica:
    """One DDP module.

    forward() prepares the reducer for one backward pass. If torch has the private `reducer._reset_state`, this is
    cancelled when a run begins, and DDP still averages plain backward passes between runs. If torch lacks it, hooks
    keep forward() from preparing anything; plain backward passes of that model are then not averaged.
    """

    def __init__(self, module: DistributedDataParallel) -> None:
        self._module = weakref.ref(module)
        self._cancels = hasattr(module.reducer, RESET)
        self._seen_forward = self._cancels
        self._armed: bool | None = None
        if not self._cancels:
            module.register_forward_pre_hook(self._before_forward)
            module.register_forward_hook(self._after_forward, always_call=True)

    @property
    def alive(self) -> bool:
        """Whether the module is still there."""
        return self._module() is not None

    @property
    def module(self) -> DistributedDataParallel:
        """The module itself."""
        # Callers ask `alive` first: the model may be gone while its optimizer is still there.
        module = self._module()
        assert module is not None
        return module

    def parameters(self) -> list[Tensor]:
        """Return what DDP keeps equal: its parameters that require grad and are not ignored."""
        ignored = self.module.parameters_to_ignore
        return [p for name, p in self.module.module.named_parameters() if p.requires_grad and name not in ignored]

    def ignored(self) -> dict[str, Tensor]:
        """Return the parameters that DDP was told to leave alone."""
        ignored = self.module.parameters_to_ignore
        return {name: p for name, p in self.module.module.named_parameters() if name in ignored}

    def cancel(self) -> None:
        """Cancel what forward() prepared; the reducer's hooks then do nothing during backward passes."""
        if self._cancels:
            module = self.module
            getattr(module.reducer, RESET)()
            if getattr(module, ENQUEUED, None) is False:
                _FirstPass.of(module).cancel()
        elif not self._seen_forward:
            raise MultiTaskError(
                "this version of torch cannot cancel the reduction that DDP prepared in forward(): pass the DDP module "
                "to wrap(..., model=ddp), or wrap after building it, so that it is known before the first forward pass"
            )

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Make forward passes prepare nothing and backward passes reduce nothing; buffers are still broadcast."""
        module = self.module
        sync, enqueued = module.require_backward_grad_sync, getattr(module, ENQUEUED, None)
        # DDP reads this in forward() and leaves its reducer alone then.
        module.require_backward_grad_sync = False
        # With a static graph, the first backward pass that finds this unset reduces everything at its end. It must
        # not be the first task's.
        if enqueued is not None:
            setattr(module, ENQUEUED, True)
        try:
            yield
        finally:
            module.require_backward_grad_sync = sync
            module.require_forward_param_sync = sync
            if enqueued is not None:
                setattr(module, ENQUEUED, enqueued)
            if self._cancels:
                # Our passes are not to be part of what a plain pass finds used.
                getattr(module.reducer, RESET)()

    def _before_forward(self, module: DistributedDataParallel, _: Any) -> None:
        # The user's no_sync() sets the same flag, so it is kept and put back as it was.
        self._armed = module.require_backward_grad_sync
        module.require_backward_grad_sync = False

    def _after_forward(self, module: DistributedDataParallel, *_: Any) -> None:
        if self._armed is not None:
            module.require_backward_grad_sync = self._armed
            module.require_forward_param_sync = self._armed
            self._armed, self._seen_forward = None, True


class _FirstPass:
    """A forward hook of a DDP module with a static graph, until a plain backward pass was counted.

    The reducer counts in the first backward pass how often each parameter is reached, and later reduces a parameter
    when that number is reached. If the first passes were a surgery's, the count is theirs, and plain passes would
    reduce nothing, silently. So the first plain pass gets a reducer that has counted nothing.
    """

    def __init__(self) -> None:
        self._miscounted, self._prepared = False, False

    @classmethod
    def of(cls, module: DistributedDataParallel) -> _FirstPass:
        """Return the module's own, which is registered if it has none."""
        for hook in module._forward_hooks.values():
            if isinstance(hook, cls):
                return hook
        # A copy of the module, as of deepcopy, brings its hook along: it is found among the hooks, not by id.
        hook = cls()
        module.register_forward_hook(hook)
        return hook

    def cancel(self) -> None:
        """Note that the backward passes until the next forward pass are not plain, and are counted all the same."""
        self._miscounted, self._prepared = True, False

    def __call__(self, module: DistributedDataParallel, _: Any, output: Any) -> None:
        outside_compilation(_FirstPass._watch)(self, module, output)

    def _watch(self, module: DistributedDataParallel, output: Any) -> None:
        self._prepared = torch.is_grad_enabled() and module.require_backward_grad_sync
        if self._prepared and self._miscounted and not getattr(module, ENQUEUED):
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(functools.partial(self._renew, module))

    def _renew(self, module: DistributedDataParallel, _: Tensor) -> None:
        # A plain backward pass has begun, and has reached none of the parameters yet.
        if not (self._prepared and self._miscounted):
            return
        self._miscounted = False
        # From here on, what DistributedDataParallel itself does when it is built, but for broadcasting the parameters.
        module.reducer._remove_autograd_hooks()
        parameters, sparse = module._build_params_for_reducer()
        names = module._build_debug_param_to_name_mapping(parameters)
        module._ddp_init_helper(parameters, sparse, names, True)
        module.reducer._set_static_graph()
        assert module.logger is not None
        module.logger._set_static_graph()
        # A new reducer has none of the hooks that the user registered, as for compression.
        for hook, state in module._comm_hooks:
            torch._C._distributed_c10d._register_comm_hook(module.reducer, state, hook)
        module.reducer.prepare_for_forward()
        module.reducer.prepare_for_backward([])
