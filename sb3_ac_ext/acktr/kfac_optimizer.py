"""Natural gradient steps with Kronecker-factored curvature, as a PyTorch optimizer (Wu et al. 2017, arXiv:1708.05144)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch as th
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from sb3_ac_ext.acktr.blocks import Block, LayerBlock, LogStdBlock, State, blocks_of
from sb3_ac_ext.functional import kfac
from sb3_ac_ext.validation import check_choice, check_number

INVERSIONS = ("eigen", "cholesky")


class KFAC(th.optim.Optimizer):
    """
    Descends along the natural gradient, with a Kronecker-factored block of the Fisher matrix for each layer.

        with optimizer.recording():                      # the only time that hooks are on
            outputs = networks(inputs)
        optimizer.update_factors(log_likelihood)         # of outputs drawn from the model, one for each sample
        loss.backward()
        optimizer.step()

    A step is ``theta <- theta - (1 - momentum) m`` with ``m <- momentum m + eta D``, ``D = (F + damping)^-1 g`` and
    ``eta = min(lr, sqrt(2 max_kl / D^T (F + damping) D))``. So eta D changes the model by a predicted KL divergence of at
    most ``max_kl``, and the average over steps that momentum takes by no more. In the first ``cold_iterations`` steps D is
    the gradient itself and there is no momentum, while the factors collect data.

    Factors, inverses and momentum are in the state of the layers' parameters and the number of steps in the parameter group,
    so that a loaded optimizer goes on exactly. The options are attributes; a loaded state does not bring its own.

    :param modules: networks by name, whose trained parameters have to be in linear layers or 2D convolutions
    :param lr: eta_max, >= 0
    :param log_std: ``(A,)`` log standard deviation of a Gaussian policy, the same in every state
    :param max_kl: in nats, > 0
    :param damping: what is added to the diagonal of F, > 0
    :param stats_decay: of the factors' moving averages, in [0, 1)
    :param inverse_update_interval: steps between inversions, >= 1
    :param inversion: "eigen" damps each block exactly; "cholesky" shares the damping out between its factors, which is
        faster for large layers
    :param momentum: in [0, 1)
    :param cold_iterations: >= 0
    :raises UnsupportedError: if a layer has no factors
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if one is out of range
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        lr: float = 0.25,
        *,
        log_std: nn.Parameter | None = None,
        max_kl: float = 1e-3,
        damping: float = 1e-2,
        stats_decay: float = 0.99,
        inverse_update_interval: int = 10,
        inversion: str = "eigen",
        momentum: float = 0.9,
        cold_iterations: int = 10,
    ) -> None:
        check_number("lr", lr, low=0)
        self.max_kl = max_kl
        self.damping = damping
        self.stats_decay = stats_decay
        self.inverse_update_interval = inverse_update_interval
        self.inversion = inversion
        self.momentum = momentum
        self.cold_iterations = cold_iterations
        check_options(vars(self))
        layers = blocks_of(modules)
        self.blocks: list[Block] = [*layers, *([] if log_std is None else [LogStdBlock(log_std)])]
        self.measures: dict[str, th.Tensor] = {}
        """Of the last step, ``()`` each: ``step_size`` eta; ``predicted_kl`` in nats, of what it changed; ``damping``, the
        largest of a block; ``trace_ratio``, the mean of the layers' pi."""
        self._recorded: dict[LayerBlock, tuple[th.Tensor, GradientEdge]] = {}
        super().__init__([p for block in self.blocks for p in block.parameters], {"lr": lr, "iterations": 0})

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: PyTorch's own leaves out what a subclass adds. Nothing of a forward pass goes along."""
        options = {name: getattr(self, name) for name in (*OPTIONS, "blocks")}
        return {**super().__getstate__(), **options, "measures": {}, "_recorded": {}}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A forward pass within this context leaves the layers' inputs and outputs for `update_factors`."""
        self._recorded = {}
        blocks = [block for block in self.blocks if isinstance(block, LayerBlock)]
        handles = [block.layer.register_forward_hook(self._recorder(block)) for block in blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _recorder(self, block: LayerBlock) -> Callable[[nn.Module, tuple[th.Tensor, ...], th.Tensor], None]:
        def record(layer: nn.Module, inputs: tuple[th.Tensor, ...], output: th.Tensor) -> None:
            if not output.requires_grad:
                return
            if block in self._recorded:
                raise RuntimeError(f"K-FAC has no factors for a layer that runs twice in a forward pass: {layer}")
            self._recorded[block] = inputs[0].detach(), get_gradient_edge(output)  # holds if what follows works in place

        return record

    def update_factors(self, log_likelihood: th.Tensor) -> None:
        """
        Put the recorded forward pass into the factors' averages; it leaves no gradients.

        The derivatives are those of each sample's own log-likelihood, so their size does not depend on the batch's.

        :param log_likelihood: ``(N,)`` log-density of an output drawn from the model, for each sample
        :raises RuntimeError: if no layer was recorded
        """
        recorded, self._recorded = self._recorded, {}
        if not recorded:
            raise RuntimeError("K-FAC has recorded no layer: run the forward pass within recording(), with gradients enabled")
        edges = [edge for _, edge in recorded.values()]
        gradients = th.autograd.grad(log_likelihood.sum(), edges, retain_graph=True, allow_unused=True)
        with th.no_grad():
            for (block, (inputs, _)), gradient in zip(recorded.items(), gradients, strict=True):
                if gradient is not None:
                    a, g = block.by_position(inputs, gradient)
                    state = self._state(block)
                    for name, value in (("input_factor", kfac.input_factor(a)), ("output_factor", kfac.output_factor(g))):
                        state[name] = kfac.moving_average(state.get(name), value, self.stats_decay)

    def _state(self, block: Block) -> State:
        return self.state[block.parameters[0]]

    @th.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """
        Apply the gradients.

        :param closure: only None, since the factors belong to one forward pass
        :raises ValueError: if a closure is given
        :raises RuntimeError: if a layer has a gradient and no factors
        """
        if closure is not None:
            raise ValueError(f"closure must be None, got {closure!r}")
        group = self.param_groups[0]
        gradients = {block: gradient for block in self.blocks if (gradient := block.gradient()) is not None}
        self._check_factors(gradients)
        cold = group["iterations"] < self.cold_iterations
        directions = gradients if cold else self._directions(gradients, group["iterations"] - self.cold_iterations)
        group["iterations"] += 1

        square = th.stack([direction.square().sum() for direction in directions.values()]).sum()
        eta = kfac.step_size(self._quadratic(directions) + self.damping * square, group["lr"], self.max_kl)
        steps = {block: -eta * direction for block, direction in directions.items()}
        if not cold:
            steps = {block: self._averaged(block, step) for block, step in steps.items()}
        for block, step in steps.items():
            block.move(step)
        self._measure(eta, steps)

    def _check_factors(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            if isinstance(block, LayerBlock) and "output_factor" not in self._state(block):
                raise RuntimeError(
                    f"K-FAC has no factors for {block.layer}, which has a gradient: call update_factors() first"
                )

    def _directions(self, gradients: dict[Block, th.Tensor], iteration: int) -> dict[Block, th.Tensor]:
        """The natural gradient, with inverses that are made anew when it is time to."""
        directions = {}
        for block, gradient in gradients.items():
            state = self._state(block)
            if iteration % self.inverse_update_interval == 0 or "damping" not in state:
                block.invert(state, self.inversion, self.damping)
            directions[block] = block.direction(state, gradient, self.inversion)
        return directions

    def _averaged(self, block: Block, step: th.Tensor) -> th.Tensor:
        """Momentum."""
        state = self._state(block)
        if "momentum" not in state:
            state["momentum"] = th.zeros_like(step)
        average: th.Tensor = state["momentum"].mul_(self.momentum).add_(step)
        return average * (1 - self.momentum)

    def _quadratic(self, steps: Mapping[Block, th.Tensor]) -> th.Tensor:
        """``()`` D^T F D."""
        return th.stack([block.quadratic(self._state(block), step) for block, step in steps.items()]).sum()

    def _measure(self, eta: th.Tensor, steps: Mapping[Block, th.Tensor]) -> None:
        self.measures = {"step_size": eta, "predicted_kl": 0.5 * self._quadratic(steps)}
        states = [self._state(block) for block in steps]
        for name, reduce in (("damping", th.max), ("trace_ratio", th.mean)):
            values = [state[name] for state in states if name in state]
            if values:
                self.measures[name] = reduce(th.stack(values))


OPTIONS = ("max_kl", "damping", "stats_decay", "inverse_update_interval", "inversion", "momentum", "cold_iterations")
"""The arguments of `KFAC` that are attributes."""


def check_options(options: Mapping[str, Any]) -> None:
    """
    :param options: arguments of `KFAC` by name
    :raises TypeError: if one has the wrong type
    :raises ValueError: if one is out of range
    """
    for name in ("max_kl", "damping"):
        check_number(name, options[name], low=1e-12)
    for name in ("stats_decay", "momentum"):
        check_number(name, options[name], low=0, high=0.999999)
    check_number("inverse_update_interval", options["inverse_update_interval"], low=1, integer=True)
    check_number("cold_iterations", options["cold_iterations"], low=0, integer=True)
    check_choice("inversion", options["inversion"], INVERSIONS)
