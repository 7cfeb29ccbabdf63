"""Gradient steps on one flat tensor for each network, where its layers and optimizer allow it."""

import math
import operator
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache

import torch as th
from stable_baselines3.common.utils import update_learning_rate
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sb3_ac_ext.legacy.flat_tensor import FlatTensor, bind
from sb3_ac_ext.legacy.fused_mlp import Fused, Places

STATE = ("step", "exp_avg", "exp_avg_sq")
"""The names in Adam's state of a parameter."""
MOMENTS = STATE[1:]
VANISHED = (1e-30, 1e-36)
"""Moments below these are 0 to Adam in fp32, with any eps that is not below `LEAST_EPS`."""
LEAST_EPS = 1e-12
FEW = 1000
"""So many gradients may always be copied to the flat tensor."""


def parameters_of(optimizer: th.optim.Optimizer) -> list[nn.Parameter]:
    """
    :param optimizer: an optimizer
    :return: everything that it changes
    """
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def hooked(parameters: Iterable[nn.Parameter]) -> bool:
    """
    :param parameters: of a network
    :return: whether somebody sees one of their gradients on its way, and may change it
    """
    return any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in parameters)


@contextmanager
def constant(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """
    Within this context graphs take ``parameters`` as constants, so that nobody computes their gradients.

    :param parameters: of the networks that a loss depends on but does not train
    """
    frozen = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


class Descent:
    """
    Gradient steps of one network with its optimizer, as PyTorch does them.

    :param optimizer: the network's optimizer
    """

    def __init__(self, optimizer: th.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = parameters_of(optimizer)

    def set_rate(self, rate: float) -> None:
        """
        :param rate: learning rate of the next steps
        """
        update_learning_rate(self.optimizer, rate)

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """A backward pass within this context leaves the gradients of the network's parameters, and no older ones."""
        self.optimizer.zero_grad()
        yield

    def gradient_norm(self) -> th.Tensor:
        """``()`` 2-norm of the gradients."""
        return get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def clip(self, bound: float, norm: th.Tensor) -> None:
        """
        :param bound: largest 2-norm
        :param norm: ``()`` what `gradient_norm` returned
        """
        clip_grads_with_norm_(self.parameters, bound, norm)

    def step(self) -> None:
        """Apply the gradients."""
        self.optimizer.step()

    def settle(self) -> None:
        """What is done after a step, recorded or not, and does not belong to the update."""

    def norm(self) -> th.Tensor:
        """``()`` 2-norm of the parameters."""
        return get_total_norm(self.parameters)


def backward(loss: th.Tensor, descents: Iterable[Descent]) -> None:
    """
    Gradients of the parameters of one or more networks.

    :param loss: ``()`` with the parameters of all other networks as constants
    :param descents: of the networks
    """
    with ExitStack() as stack:
        for descent in descents:
            stack.enter_context(descent.receiving())
        loss.backward()


class FlatAdam(Descent):
    """
    Adam on one flat tensor: parameters, gradients and moments of a network that consists mostly of fused layers.

    The optimizer keeps its state, whose tensors become views of the flat ones, so saving, loading and changing the rate
    work on it as ever.

    :param optimizer: for which there is no `obstacle`, and whose parameters have been updated together (`in_step`)
    :param fused: the modules that hold most of its parameters
    """

    def __init__(self, optimizer: th.optim.Optimizer, fused: Sequence[Fused]) -> None:
        super().__init__(optimizer)
        self.fused = fused
        self._bind()

    @staticmethod
    def obstacle(optimizer: th.optim.Optimizer, fused: Sequence[Fused]) -> str | None:
        """
        :param optimizer: the network's optimizer
        :param fused: its fused modules
        :return: why Adam cannot run flat; None if it can
        """
        reason = FlatAdam._obstacle_of_now(optimizer, fused)
        if reason is not None:
            return reason
        inside = sum(parameter.numel() for module in fused for parameter in module.parameters())
        outside = sum(parameter.numel() for parameter in parameters_of(optimizer)) - inside
        return "most parameters are outside of fused layers" if outside > max(inside, FEW) else None

    @staticmethod
    def _obstacle_of_now(optimizer: th.optim.Optimizer, fused: Sequence[Fused]) -> str | None:
        """The part of `obstacle` that may change while memory and parameters stay."""
        for module in fused:
            if module.layers() is None:
                return module.obstacle
        if type(optimizer) is not th.optim.Adam or len(optimizer.param_groups) != 1:
            return f"the optimizer is {type(optimizer).__name__} with {len(optimizer.param_groups)} parameter groups"
        group = optimizer.param_groups[0]
        options = [name for name in ("amsgrad", "maximize", "capturable", "differentiable") if group[name]]
        if options or isinstance(group["lr"], th.Tensor):
            return f"Adam's options {', '.join(options) or 'lr as a tensor'}"
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return "a hook on the optimizer"
        if hooked(group["params"]):
            return "a hook on a parameter"
        if not all(parameter.requires_grad for parameter in group["params"]):
            return "frozen parameters"
        return None

    @staticmethod
    def in_step(optimizer: th.optim.Optimizer) -> bool:
        """
        :param optimizer: an Adam optimizer
        :return: whether all of its parameters have been updated the same number of times
        """
        states = [optimizer.state[parameter] for parameter in parameters_of(optimizer) if parameter in optimizer.state]
        together = len(states) in (0, len(parameters_of(optimizer)))
        return together and len({float(state["step"]) for state in states}) <= 1

    def _bind(self) -> None:
        state, parameters = self.optimizer.state, self.parameters
        self.flat = bind(parameters)
        self.gradient = FlatTensor([th.zeros_like(parameter) for parameter in parameters])
        views = dict(zip(map(id, parameters), self.gradient.views, strict=True))
        self.places: list[tuple[Places, list[nn.Parameter]]] = []
        for module in self.fused:
            own = list(module.parameters())
            module.places = Places([views.pop(id(parameter)) for parameter in own])
            self.places.append((module.places, own))
        self.others = [(parameter, views[id(parameter)]) for parameter in parameters if id(parameter) in views]
        started = len(state) > 0
        old = [[state[p][name].to(p) if started else th.zeros_like(p) for p in parameters] for name in MOMENTS]
        self.moments = [FlatTensor(tensors) for tensors in old]
        # a counter of its own for each parameter: a saved state may be loaded into an optimizer that steps them one by one
        count = float(state[parameters[0]]["step"]) if started else 0.0
        self.counts = FlatTensor([th.full((), count, device=parameter.device) for parameter in parameters])
        self.published, self.whole, self.steps = False, True, 0
        # a recorded update reads the rate on its device, whatever it was when it was recorded
        exact = th.float64 if self.counts.values.device.type == "cpu" else th.float32
        self.rate = self.counts.values.new_full((), self.optimizer.param_groups[0]["lr"], dtype=exact)
        if started:
            self._publish()

    def set_rate(self, rate: float) -> None:
        """See `Descent.set_rate`."""
        super().set_rate(rate)
        self.rate.fill_(rate)

    def fixed(self) -> Hashable:
        """What a recorded step has read from Python, and what it writes to."""
        group = self.optimizer.param_groups[0]
        return self.flat, self.whole, *(group[name] for name in ("betas", "eps", "weight_decay"))

    def _publish(self) -> None:
        """Put the flat tensors' views into the optimizer's state, which is empty before the first step as in PyTorch."""
        flats = (self.counts, *self.moments)
        for parameter, *views in zip(self.parameters, *(flat.views for flat in flats), strict=True):
            self.optimizer.state[parameter] = dict(zip(STATE, views, strict=True))
        self.published = True

    def is_current(self) -> bool:
        """Whether there is no obstacle yet, and parameters and moments are in the flat tensors (not so after a load, say)."""
        if self._obstacle_of_now(self.optimizer, self.fused) is not None:
            return False
        now = self.optimizer.param_groups[0]["params"]
        same = len(now) == len(self.parameters) and all(map(operator.is_, now, self.parameters))
        if not (same and self.flat.holds(self.parameters)):
            return False
        state = self.optimizer.state
        if not self.published:
            return len(state) == 0
        states = [state.get(parameter, {}) for parameter in self.parameters]
        flats = (self.counts, *self.moments)
        return all(states) and all(flat.holds([s[name] for s in states]) for flat, name in zip(flats, STATE, strict=True))

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """See `Descent.receiving`; the gradients end up in the flat tensor."""
        for parameter in self.parameters:
            parameter.grad = None
        for places, _ in self.places:
            places.open, places.filled = True, False
        try:
            yield
        finally:
            for places, _ in self.places:
                places.open = False
        for places, parameters in self.places:
            if places.filled:
                for parameter, view in zip(parameters, places.gradients, strict=True):
                    parameter.grad = view
        for parameter, view in self.others:
            if parameter.grad is not None:
                parameter.grad = view.copy_(parameter.grad)
        # Adam leaves parameters alone that the loss does not depend on: from then on they have counters of their own
        self.whole = self.whole and all(parameter.grad is not None for parameter in self.parameters)

    def gradient_norm(self) -> th.Tensor:
        """See `Descent.gradient_norm`."""
        return _norm(self.gradient.values) if self.whole else super().gradient_norm()

    def clip(self, bound: float, norm: th.Tensor) -> None:
        """See `Descent.clip`."""
        self.gradient.values.mul_((bound / (norm + 1e-6)).clamp(max=1.0))

    def step(self) -> None:
        """See `Descent.step`."""
        if not self.published:
            self._publish()
        if not self.whole:
            self.optimizer.step()
            return
        group = self.optimizer.param_groups[0]
        self.counts.values.add_(1)
        th._fused_adam_(  # what torch.optim.adam.adam comes to, which would count with an operation of its own
            [self.flat.values],
            [self.gradient.values],
            [self.moments[0].values],
            [self.moments[1].values],
            [],
            [self.counts.views[0]],
            lr=self.rate,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def settle(self) -> None:
        """
        Set moments that have vanished to 0 now and then, on a CPU in fp32.

        Those of a weight whose gradient stays 0 (behind a unit that is never active, say) would decay into the subnormal
        numbers and stay there; arithmetic on these is a hundred times slower, which made updates a fifth slower.
        """
        self.steps += 1
        group = self.optimizer.param_groups[0]
        due = self.steps % _flush_every(*group["betas"]) == 0 and group["eps"] >= LEAST_EPS
        if due and self.flat.values.dtype == th.float32 and not self.flat.values.is_cuda:
            for moment, least in zip(self.moments, VANISHED, strict=True):
                moment.values.copy_(nn.functional.hardshrink(moment.values, least))

    def norm(self) -> th.Tensor:
        """See `Descent.norm`."""
        return _norm(self.flat.values)


def _norm(values: th.Tensor) -> th.Tensor:
    return th.dot(values, values).sqrt()


@cache
def _flush_every(*betas: float) -> int:
    """Steps in which a moment that is not `VANISHED` cannot decay into the subnormal numbers."""
    smallest = th.finfo(th.float32).smallest_normal
    steps = [math.log(smallest / least) / math.log(beta) for least, beta in zip(VANISHED, betas, strict=True) if beta > 0]
    return max(int(min(steps, default=1e6)), 1)
