"""Natural gradient steps with Kronecker-factored curvature, as a PyTorch optimizer (Wu et al. 2017, arXiv:1708.05144)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch as th
from annotated_types import Interval
from torch import nn

from sb3_ac_ext.acktr.blocks import INVERSES, Block, LayerBlock, LayerCalls, State, blocks_of
from sb3_ac_ext.functional import kfac
from sb3_ac_ext.functional.natural_gradient import flatten, unflatten
from sb3_ac_ext.signatures import check_given
from sb3_ac_ext.validation import NonNegative, NonNegativeInt, Positive, PositiveInt

OPTIONS = ("max_kl", "damping", "stats_decay", "inverse_update_interval", "inversion", "momentum", "cold_iterations")
"""The arguments of `KFAC` that are in its parameter group."""
Inversion = Literal["eigen", "cholesky"]
ShareOfBefore = Annotated[float, Interval(ge=0, le=0.999999)]
"""What an average keeps of its value before."""


class KFAC(th.optim.Optimizer):
    """
    Descends along the natural gradient, with a Kronecker-factored block of the Fisher matrix for each layer.

        with LayerCalls() as calls:
            outputs = networks(inputs)
        optimizer.update_factors(log_likelihood, calls)  # of outputs drawn from the model, one for each sample
        loss.backward()
        optimizer.step()

    A step is ``theta <- theta - (1 - momentum) m`` with ``m <- momentum m + eta D``, ``D = (F + damping)^-1 g`` and
    ``eta = min(lr, sqrt(2 max_kl / D^T (F + damping) D))``. So eta D changes the model by a predicted KL divergence of at
    most ``max_kl``, and the average over steps that momentum takes by no more. In the first ``cold_iterations`` steps D is
    the gradient itself and there is no momentum, while the factors collect data.

    Factors, inverses and momentum are in the state of the layers' parameters and the number of steps in the parameter group,
    so that a loaded optimizer goes on exactly. The options are in the parameter group too, and act when they are changed
    there; ``damping`` and ``inversion`` in the inverses that are made next.

    :param modules: networks by name, whose trained parameters have to be in linear layers or 2D convolutions
    :param lr: eta_max
    :param log_std: ``(A,)`` log standard deviation of a Gaussian policy, the same in every state
    :param max_kl: in nats
    :param damping: what is added to the diagonal of F
    :param stats_decay: of the factors' moving averages
    :param inverse_update_interval: steps between inversions
    :param inversion: "eigen" damps each block exactly; "cholesky" shares the damping out between its factors, which is
        faster for large layers
    :param momentum: share of the steps before in a step
    :param cold_iterations: plain gradient steps at the start
    :raises UnsupportedError: if a layer has no factors
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if one is out of range
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        lr: NonNegative = 0.25,
        *,
        log_std: nn.Parameter | None = None,
        max_kl: Positive = 1e-3,
        damping: Positive = 1e-2,
        stats_decay: ShareOfBefore = 0.99,
        inverse_update_interval: PositiveInt = 10,
        inversion: Inversion = "eigen",
        momentum: ShareOfBefore = 0.9,
        cold_iterations: NonNegativeInt = 10,
    ) -> None:
        values = (max_kl, damping, stats_decay, inverse_update_interval, inversion, momentum, cold_iterations)
        options = dict(zip(OPTIONS, values, strict=True))
        check_given(KFAC, {"lr": lr, **options})
        self.blocks = blocks_of(modules, log_std)
        self.measures: dict[str, th.Tensor] = {}
        """Of the last step, ``()`` each: ``step_size`` eta; ``predicted_kl`` in nats, of what it changed; ``damping``, the
        largest of a block; ``trace_ratio``, the mean of the layers' pi. Nothing if there were no gradients."""
        self._cold: bool | None = None
        """Of the step that was begun; None if none was."""
        super().__init__([p for block in self.blocks for p in block.parameters], {"lr": lr, "iterations": 0, **options})

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles; PyTorch's own leaves out what a subclass adds."""
        return {**super().__getstate__(), "blocks": self.blocks, "measures": {}, "_cold": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of an earlier version, without options
            for name in OPTIONS:
                group.setdefault(name, self.defaults[name])

    def look_for_layers(self, modules: Mapping[str, nn.Module], log_std: nn.Parameter | None = None) -> None:
        """
        Make the blocks anew if the parameters in the groups are others than theirs, as where somebody has replaced a layer.

        :param modules: with the layers, and others too
        :param log_std: see `KFAC`
        :raises UnsupportedError: if a layer has no factors
        """
        trained = [parameter for group in self.param_groups for parameter in group["params"]]
        known = [parameter for block in self.blocks for parameter in block.parameters]
        if [*map(id, trained)] != [*map(id, known)]:
            own = {*map(id, trained)}
            self.blocks = [block for block in blocks_of(modules, log_std) if id(block.parameters[0]) in own]

    def update_factors(self, log_likelihood: th.Tensor, calls: LayerCalls) -> None:
        """
        Put a forward pass into the factors' averages; it leaves no gradients.

        :param log_likelihood: see `factors`
        :param calls: see `factors`
        :raises RuntimeError: as `factors`
        """
        self.average(self.factors(log_likelihood, calls))

    def factors(self, log_likelihood: th.Tensor, calls: LayerCalls) -> State:
        """
        The factors of one batch.

        The derivatives are those of each sample's own log-likelihood, so their size does not depend on the batch's.

        :param log_likelihood: ``(N,)`` log-density of an output drawn from the model, for each sample
        :param calls: of the forward pass
        :return: by name and the block's number in `blocks`: "input_factor 0"
        :raises RuntimeError: if a layer was called for two inputs, or none with gradients enabled
        """
        layers = {i: block for i, block in enumerate(self.blocks) if isinstance(block, LayerBlock)}
        called = {i: calls.of[layer.parameters[0]] for i, layer in layers.items() if layer.parameters[0] in calls.of}
        if not calls.of and any(parameter.requires_grad for layer in layers.values() for parameter in layer.parameters):
            raise RuntimeError("K-FAC has seen no layer: run the forward pass within LayerCalls(), with gradients enabled")
        for i, of_layer in called.items():
            if any(inputs is not of_layer[0][0] for inputs, _ in of_layer):
                raise RuntimeError(f"K-FAC has no factors for a layer that runs twice, for two inputs: {layers[i].layer}")
        edges = [(i, edge) for i, of_layer in called.items() for _, edge in of_layer]
        if not edges:
            return {}
        gradients = th.autograd.grad(log_likelihood.sum(), [edge for _, edge in edges], retain_graph=True, allow_unused=True)
        with th.no_grad():
            sums: dict[int, th.Tensor] = {}
            for (i, _), gradient in zip(edges, gradients, strict=True):
                if gradient is not None:
                    sums[i] = sums[i] + gradient if i in sums else gradient
            pairs = {i: layers[i].factors(called[i][0][0].detach(), gradient) for i, gradient in sums.items()}
        return {f"{name} {i}": value for i, pair in pairs.items() for name, value in pair.items()}

    @th.no_grad()
    def average(self, factors: Mapping[str, th.Tensor]) -> None:
        """
        :param factors: of a batch, see `factors`, which are put into the averages
        """
        decay = self.param_groups[0]["stats_decay"]
        for key, value in factors.items():
            name, number = key.split()
            state = self.state[self.blocks[int(number)].parameters[0]]
            state[name] = kfac.moving_average(state.get(name), value, decay)

    def _state(self, block: Block) -> State:
        return self.state.get(block.parameters[0], {})

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
        if self._cold is None:
            self.begin_step()
        self.step_at(self.param_groups[0]["lr"])
        self._cold = None

    @th.no_grad()
    def begin_step(self) -> bool:
        """
        What a step does besides operations on tensors: it is counted, and inverses are made where it is time to. `step` does
        so by itself otherwise.

        :return: whether it is one of the cold ones
        """
        group = self.param_groups[0]
        iteration = group["iterations"] - group["cold_iterations"]
        group["iterations"] += 1
        self._cold = iteration < 0
        if self._cold:
            return True
        inversion = group["inversion"]
        others = {name for kind, names in INVERSES.items() if kind != inversion for name in names}
        for block in self.blocks:
            if self._lacks_factors(block):
                continue
            state = self.state[block.parameters[0]]
            old = others.intersection(state)
            if iteration % group["inverse_update_interval"] == 0 or "damping" not in state or old:
                for name in old:
                    del state[name]
                block.invert(state, inversion, group["damping"])
            if "momentum" not in state:
                state["momentum"] = block.zeros()
        return False

    @th.no_grad()
    def step_at(self, lr: th.Tensor | float) -> None:
        """
        The step that was begun: operations on tensors alone, which the engine can record.

        :param lr: ``()`` eta_max
        :raises RuntimeError: if a layer has a gradient and no factors
        """
        group = self.param_groups[0]
        blocks = [block for block in self.blocks if any(parameter.grad is not None for parameter in block.parameters)]
        self.measures = {}
        if not blocks:
            return
        self._check_factors(blocks)
        gradients = [block.gradient() for block in blocks]
        states = [self._state(block) for block in blocks]
        directions = gradients
        if not self._cold:
            triples = zip(blocks, states, gradients, strict=True)
            directions = [block.direction(state, gradient, group["inversion"]) for block, state, gradient in triples]
        direction = flatten(directions)
        damped = self._quadratic(blocks, directions) + group["damping"] * direction.dot(direction)
        eta = kfac.step_size(damped, lr, group["max_kl"])
        step = -eta * direction
        if not self._cold:
            averages = [state["momentum"] for state in states]
            th._foreach_mul_(averages, group["momentum"])
            th._foreach_add_(averages, unflatten(step, averages))
            step = (1 - group["momentum"]) * flatten(averages)
        steps = unflatten(step, directions)
        self._move(blocks, steps)
        self.measures = {"step_size": eta, "predicted_kl": 0.5 * self._quadratic(blocks, steps)}
        for name, reduce in (("damping", th.max), ("trace_ratio", th.mean)):
            values = [state[name] for state in states if name in state]
            if values:
                self.measures[name] = reduce(th.stack(values))

    def _lacks_factors(self, block: Block) -> bool:
        return isinstance(block, LayerBlock) and "output_factor" not in self._state(block)

    def _check_factors(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            if isinstance(block, LayerBlock) and self._lacks_factors(block):
                raise RuntimeError(
                    f"K-FAC has no factors for {block.layer}, which has a gradient: call update_factors() first"
                )

    def _quadratic(self, blocks: Sequence[Block], steps: Sequence[th.Tensor]) -> th.Tensor:
        """``()`` D^T F D."""
        pairs = zip(blocks, steps, strict=True)
        return th.stack([block.quadratic(self._state(block), step) for block, step in pairs]).sum()

    @staticmethod
    def _move(blocks: Sequence[Block], steps: Sequence[th.Tensor]) -> None:
        """Add steps to the parameters that have a gradient."""
        pairs = [
            (parameter, part)
            for block, step in zip(blocks, steps, strict=True)
            for parameter, part in zip(block.parameters, block.parts(step), strict=True)
            if parameter.grad is not None
        ]
        th._foreach_add_(*map(list, zip(*pairs, strict=True)))
