"""Pictures of what a critic believes; needs matplotlib (``pip install sb3_ac_ext[plots]``)."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from torch.nn import functional as F

from sb3_ac_ext.d4pg.d4pg import D4PG
from sb3_ac_ext.d4pg.networks import CategoricalCritic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 400
"""At which the density of a mixture is drawn."""
MARGIN = 4
"""Standard deviations that are drawn on both sides of a mixture's Gaussians."""


def plot_values(
    model: D4PG,
    observations: np.ndarray | dict[str, np.ndarray],
    actions: np.ndarray | None = None,
    axes: "Axes | None" = None,
) -> "Axes":
    """
    Draw Z(s, a), the distribution of the return from an observation on: probabilities of atoms, or the density of a mixture.
    A dotted line is its mean, Q(s, a). ::

        axes = plot_values(model, np.stack([env.observation_space.sample() for _ in range(3)]))
        axes.figure.savefig("values.png")

    :param model: whose critic
    :param observations: ``(...)`` one or ``(B, ...)`` several, as `predict` takes them
    :param actions: ``(A,)`` for all of them or ``(B, A)`` in the environment's range; None for the policy's
    :param axes: to draw on; None makes some
    :return: the axes, with a line of each observation
    """
    if axes is None:
        from matplotlib import pyplot as plt

        _, axes = plt.subplots()
    if actions is None:
        actions, _ = model.predict(observations, deterministic=True)
    model.policy.set_training_mode(False)
    with th.no_grad():
        obs, _ = model.policy.obs_to_tensor(observations)
        given = np.asarray(actions).reshape(-1, *model.action_space.shape)  # type: ignore[misc]  # a Box has one
        rows = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        scaled = model.policy.scale_action(np.broadcast_to(given, (rows, *given.shape[1:])))
        critic = model.critic
        outputs = critic.outputs(obs, th.as_tensor(scaled, dtype=th.float32, device=model.device).flatten(1))
        means = critic.mean(outputs)[:, 0].cpu().numpy()
        categorical = isinstance(critic, CategoricalCritic)
        returns, heights = _probabilities(critic, outputs) if categorical else _densities(critic, outputs)
    style: dict[str, Any] = {"drawstyle": "steps-mid"} if categorical else {}
    for i, (height, mean) in enumerate(zip(heights, means, strict=True)):
        (line,) = axes.plot(returns, height, label=f"observation {i}: Q = {mean:.3g}", **style)
        axes.axvline(mean, color=line.get_color(), linestyle=":")
    axes.set(xlabel="return", ylabel="probability" if categorical else "density")
    axes.legend()
    return axes


def _probabilities(critic: Any, outputs: th.Tensor) -> tuple[np.ndarray, np.ndarray]:
    return critic.atoms.cpu().numpy(), F.softmax(outputs, dim=1).cpu().numpy()


def _densities(critic: Any, outputs: th.Tensor) -> tuple[np.ndarray, np.ndarray]:
    weights, means, stds = (part.cpu().numpy() for part in critic.components(outputs))
    weights = np.exp(weights - weights.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    returns = np.linspace((means - MARGIN * stds).min(), (means + MARGIN * stds).max(), POINTS)
    z = (returns[:, None] - means[:, None]) / stds[:, None]  # (B, POINTS, n_components)
    densities = np.exp(-0.5 * z**2) / (stds[:, None] * math.sqrt(2 * math.pi))
    return returns, (weights[:, None] * densities).sum(axis=2)
