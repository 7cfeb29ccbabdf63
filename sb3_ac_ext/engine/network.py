"""Networks that are trained: gradient steps and targets, as PyTorch does them and as they are recorded."""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch as th
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sb3_ac_ext.engine.tape import RefusedError, Tape, tensors

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""The names of Adam's moments in its state."""
VANISHED = (1e-30, 1e-36)
"""First and second moments below these are 0 to Adam in fp32, with any eps that is not below `LEAST_EPS`."""
LEAST_EPS = 1e-12
UNSEEN = ("lr", "params", "iterations")
"""Options of an optimizer that a recording does not depend on: the rate is a tensor there, steps are counted outside."""


@dataclass
class Network:
    """
    A trained network.

    :param module: whose parameters a target follows; None for a single parameter
    :param optimizer: what it is trained by, and what says which parameters are trained
    :param target: the network that follows it, if there is one
    :param rate: learning rate
    :param weight_decay: L2 decay that is added to the gradients of its weights (not of biases and norms), >= 0
    :param max_grad_norm: bound of the gradient's 2-norm; None does not clip
    :param clipped: parameters whose gradients are bounded each by themselves; None for all together
    """

    module: nn.Module | None
    optimizer: th.optim.Optimizer
    target: nn.Module | None = None
    rate: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    clipped: Sequence[Sequence[nn.Parameter]] | None = None
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def settings(self) -> tuple[Any, ...]:
        """What a recorded step has read from this record and the optimizer's options."""
        groups = self.optimizer.param_groups
        options = [{key: value for key, value in group.items() if key not in UNSEEN} for group in groups]
        clipped = None if self.clipped is None else [[*map(id, parameters)] for parameters in self.clipped]
        return self.weight_decay, self.max_grad_norm, clipped, id(self.module), id(self.target), options


class Steps:
    """
    What recorded steps of one optimizer need besides its state.

    Gradients are views of one piece of memory, so that their norm is one product; the counters in Adam's state are views of
    one tensor (each parameter has its own, as PyTorch has it), so that they are counted together.

    :param network: whose optimizer it is
    """

    def __init__(self, network: Network) -> None:
        self.parameters = network.parameters
        first = self.parameters[0]
        self.flat: th.Tensor | None = None
        if all(p.dtype == first.dtype and p.device == first.device and _is_dense(p) for p in self.parameters):
            self.flat = th.zeros(sum(p.numel() for p in self.parameters), dtype=first.dtype, device=first.device)
            views = self.flat.split([p.numel() for p in self.parameters])
            pairs = zip(views, self.parameters, strict=True)
            self.gradients = [view.as_strided(p.shape, p.stride(), view.storage_offset()) for view, p in pairs]
        else:
            self.gradients = [th.zeros_like(p) for p in self.parameters]
        self.rate = th.zeros((), dtype=th.float64 if first.device.type == "cpu" else th.float32, device=first.device)
        self.counts: th.Tensor | None = None
        self.count_views: tuple[th.Tensor, ...] = ()

    def bind(self, network: Network) -> None:
        """Give the counters in the state of an Adam optimizer their place in one tensor."""
        states = [network.optimizer.state[p] for p in self.parameters if "step" in network.optimizer.state.get(p, {})]
        counts = [state["step"] for state in states]
        if states and is_adam(network.optimizer) and not identical(counts, self.count_views):
            # the fused step wants them there
            self.counts = th.stack([count.to(self.rate.device, th.float32) for count in counts])
            self.count_views = self.counts.unbind()
            for state, count in zip(states, self.count_views, strict=True):
                state["step"] = count

    def tensors(self) -> list[th.Tensor]:
        """What a recording may read and write."""
        own = [self.rate, *self.gradients]
        return own if self.counts is None else [*own, self.counts]


def _is_dense(tensor: th.Tensor) -> bool:
    """Whether a tensor's numbers fill its piece of memory, in whatever order."""
    return tensor.numel() == 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def identical(now: Sequence[Any], before: Sequence[Any]) -> bool:
    """Whether two sequences have the same objects in them."""
    return len(now) == len(before) and all(map(operator.is_, now, before))


def is_adam(optimizer: th.optim.Optimizer) -> bool:
    """Whether an optimizer's step is PyTorch's fused operation on lists of tensors."""
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW):
        return False
    groups = optimizer.param_groups
    return not any(group["capturable"] or group["differentiable"] or isinstance(group["lr"], th.Tensor) for group in groups)


def differentiate(loss: th.Tensor, networks: Iterable[Network]) -> None:
    """
    The gradients of exactly these networks' parameters, as their ``.grad``; frozen parameters and those that the loss does
    not depend on have none.

    :param loss: ``()``
    :param networks: one, or several that share the loss
    """
    wanted = []
    for network in networks:
        network.optimizer.zero_grad()
        wanted += [parameter for parameter in network.parameters if parameter.requires_grad]
    if wanted and (loss.requires_grad or not th.is_grad_enabled()):  # the latter is an error of whoever switched them off
        loss.backward(inputs=wanted)


def recorded_differentiate(loss: th.Tensor, networks: Sequence[tuple[Network, Steps]]) -> None:
    """
    `differentiate` in memory that lasts, without what a recording need not do.

    :param loss: ``()``
    :param networks: with what their recorded steps need
    """
    pairs = [(p, place) for network, steps in networks for p, place in zip(network.parameters, steps.gradients, strict=True)]
    wanted = [(parameter, place) for parameter, place in pairs if parameter.requires_grad]
    gradients: Sequence[th.Tensor | None] = [None] * len(wanted)
    if wanted and loss.requires_grad:
        gradients = th.autograd.grad(loss, [parameter for parameter, _ in wanted], allow_unused=True)
    found = {id(p): g for (p, _), g in zip(wanted, gradients, strict=True)}
    placed: set[int] = set()
    with th.no_grad():
        for parameter, place in pairs:
            if id(parameter) not in placed:  # one that networks share has one gradient
                placed.add(id(parameter))
                gradient = found.get(id(parameter))
                parameter.grad = None if gradient is None else place
                if gradient is not None:
                    place.copy_(gradient)


def step(network: Network, steps: Steps | None = None, tape: Tape | None = None) -> th.Tensor:
    """
    Clip, decay and apply the gradients.

    :param network: whose parameters have their ``.grad``
    :param steps: what its recorded steps need; None if nothing records
    :param tape: that records
    :return: ``()`` 2-norm of the gradient before it was clipped
    """
    gradients = [p.grad for p in network.parameters if p.grad is not None]
    flat = None if steps is None or not identical([p.grad for p in network.parameters], steps.gradients) else steps.flat
    if flat is not None:
        norm = th.dot(flat, flat).sqrt()
    else:
        norm = get_total_norm(gradients) if gradients else network.parameters[0].new_zeros(())
    if flat is not None and network.max_grad_norm is not None and network.clipped is None:
        flat.mul_((network.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
    elif network.max_grad_norm is not None:
        for parameters in network.clipped or [network.parameters]:
            own = [p.grad for p in parameters if p.grad is not None]
            clip_grads_with_norm_(parameters, network.max_grad_norm, get_total_norm(own) if network.clipped else norm)
    for p in network.parameters if network.weight_decay else ():
        if p.dim() > 1 and p.grad is not None:
            p.grad.add_(p.detach(), alpha=network.weight_decay)
    if steps is None or tape is None:
        network.optimizer.step()
    elif gradients:
        _recorded_step(network, steps, tape)
    return norm


@th.no_grad()
def _recorded_step(network: Network, steps: Steps, tape: Tape) -> None:
    optimizer = network.optimizer
    if is_adam(optimizer) and _has_one_layout(network):
        _fused_adam(network, steps, tape)
    elif "step_at" in vars(type(optimizer)):  # what its step does with tensors, at a rate that is one
        optimizer.step_at(steps.rate)  # type: ignore[attr-defined]  # see above
    elif not type(optimizer).__module__.startswith("torch.optim"):
        raise RefusedError(f"a {type(optimizer).__name__}, which may do anything in a step")
    else:
        tape.call(partial(_plain_step, optimizer, [(p, p.grad) for p in network.parameters]))


def _has_one_layout(network: Network) -> bool:
    """Whether gradients and moments lie in memory as their parameters do, which the fused step takes for granted."""
    for parameter in network.parameters:
        state = network.optimizer.state.get(parameter, {})
        moments = [state[name] for name in MOMENTS if name in state]
        if parameter.grad is not None and any(t.stride() != parameter.stride() for t in (parameter.grad, *moments)):
            return False
    return True


def _plain_step(optimizer: th.optim.Optimizer, gradients: Sequence[tuple[nn.Parameter, th.Tensor | None]]) -> None:
    for parameter, gradient in gradients:
        parameter.grad = gradient
    with th.inference_mode(False):
        optimizer.step()


def _start_adam(network: Network) -> None:
    """Adam's state before its first step, as PyTorch makes it for parameters that have a gradient."""
    state = network.optimizer.state
    for group in network.optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and not state.get(p):
                moments = MOMENTS[: 3 if group["amsgrad"] else 2]
                zeros = {name: th.zeros_like(p, memory_format=th.preserve_format) for name in moments}
                state[p] = {"step": th.zeros((), dtype=th.get_default_dtype(), device=p.device), **zeros}


def _fused_adam(network: Network, steps: Steps, tape: Tape) -> None:
    """What torch.optim.Adam comes to with ``fused=True``; the rate is read from its tensor."""
    state = network.optimizer.state
    trained = [p for p in network.parameters if p.grad is not None]
    if not all(map(state.get, trained)):
        with tape.pause():
            first = not any(map(state.get, network.parameters))
            _start_adam(network)
            if first:
                steps.bind(network)
            for tensor in tensors([steps.tensors(), *(state[p] for p in trained)]):
                tape.watch(tensor)
    counts = [state[p]["step"] for p in trained]
    if steps.counts is not None and identical(counts, steps.count_views):
        steps.counts.add_(1)
    else:
        th._foreach_add_(counts, 1)
    for group in network.optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            continue
        lists = [[state[p][name] for p in parameters] for name in MOMENTS[: 3 if group["amsgrad"] else 2]]
        fused = th._fused_adamw_ if group.get("decoupled_weight_decay") else th._fused_adam_
        fused(
            parameters,
            [p.grad for p in parameters],
            lists[0],
            lists[1],
            lists[2] if group["amsgrad"] else [],
            [state[p]["step"] for p in parameters],
            lr=steps.rate,
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            weight_decay=float(group["weight_decay"]),
            eps=float(group["eps"]),
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )


def flush_subnormals(networks: Mapping[str, Network], before: int, after: int) -> None:
    """
    Set moments of Adam that have vanished to 0 now and then, on a CPU in fp32.

    Those of a weight whose gradient stays 0 (behind a unit that is never active, say) would decay into the subnormal numbers
    and stay there; arithmetic on these is a hundred times slower, which makes updates a fifth slower.

    :param networks: by their names
    :param before: updates at the last call
    :param after: updates until now
    """
    for network in networks.values():
        for group in network.optimizer.param_groups if is_adam(network.optimizer) else ():
            every = _flush_every(*map(float, group["betas"]))
            if group["eps"] < LEAST_EPS or before // every == after // every:
                continue
            for parameter in group["params"]:
                state = network.optimizer.state.get(parameter, {})
                for name, least in zip(MOMENTS, VANISHED, strict=False):
                    moment = state.get(name)
                    if moment is not None and moment.dtype == th.float32 and not moment.is_cuda:
                        moment.copy_(nn.functional.hardshrink(moment, least))


@cache
def _flush_every(*betas: float) -> int:
    """Steps in which a moment that is not `VANISHED` cannot decay into the subnormal numbers."""
    smallest = th.finfo(th.float32).smallest_normal
    steps = [math.log(smallest / least) / math.log(beta) for least, beta in zip(VANISHED, betas, strict=True) if 0 < beta < 1]
    return max(int(min(steps, default=1e6)), 1)
