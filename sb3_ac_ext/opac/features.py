"""Features that are linear in what is learned: the observation itself, tile coding, or the user's."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import preprocess_obs
from torch import nn

from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, UnsupportedError, shown

FEATURES = '"tile", "identity", or a function from (N, ...) observations to (N, n) features'
MOST = 10_000_000
"""Features of a tile coding."""


def check_features(name: str, value: Any) -> None:
    """
    :raises TypeError: if ``value`` is neither a string nor a function
    :raises ValueError: if it is another string
    """
    if not isinstance(value, str) and not callable(value):
        raise ArgumentTypeError(f"{name} must be {FEATURES}, got {shown(value)} of type {type(value).__name__}")
    if isinstance(value, str) and value not in ("tile", "identity"):
        raise ArgumentError(f"{name} must be {FEATURES}, got {shown(value)}")


class Identity(nn.Module):
    """
    The observation as numbers in one vector, Discrete ones one-hot, which is a table.

    :param space: of the observations
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        super().__init__()
        self.space = space
        self.size = spaces.flatdim(space)

    def forward(self, obs: th.Tensor) -> th.Tensor:
        """
        :param obs: ``(N, ...)``
        :return: ``(N, size)``
        """
        numbers = preprocess_obs(obs, self.space)
        assert isinstance(numbers, th.Tensor)
        return numbers.flatten(1)


class Given(nn.Module):
    """
    The user's function, and how many numbers it gives.

    :param function: from ``(N, ...)`` observations, a tensor, to ``(N, n)`` features
    :param space: of the observations
    :raises ValueError: if it gives something else
    """

    def __init__(self, function: Callable[[th.Tensor], Any], space: spaces.Space[Any]) -> None:
        super().__init__()
        self.function = function
        low = np.nan_to_num(getattr(space, "low", np.zeros(space.shape or ())), posinf=0.0, neginf=0.0)
        obs = th.as_tensor(np.stack([low, low]))
        try:
            features = self(obs)
        except Exception as error:
            raise ArgumentError(f"features must be {FEATURES}, got {shown(function)}, which fails: {error}") from error
        if features.ndim != 2 or len(features) != 2:
            raise ArgumentError(f"features must be {FEATURES}, got {shown(function)}, which gives {[*features.shape]} for 2")
        self.size = features.shape[1]

    def forward(self, obs: th.Tensor) -> th.Tensor:
        """
        :param obs: ``(N, ...)``
        :return: ``(N, size)``
        """
        return th.as_tensor(self.function(obs), dtype=th.float32, device=obs.device)


class TileCoding(nn.Module):
    """
    Tile coding (Sutton and Barto 2018, section 9.5.4): each tiling is a grid over the observations, of which one tile is 1.

    The grids are displaced against each other by fractions of a tile, in dimension i of d by 2 i + 1 of them, so that the
    tiles of no two grids lie on a common diagonal. What lies beyond the bounds counts as being on them.

    :param space: a Box
    :param n_tilings: grids, so features that are 1 at a time
    :param n_tiles: tiles of each dimension between the bounds; displaced grids need one more
    :param low: bounds in place of the space's, one for all dimensions or one for each
    :param high: likewise
    :raises ValueError: if there are no finite bounds, or too many tiles
    :raises UnsupportedError: for other observations than numbers in a Box
    """

    tiles: th.Tensor
    low: th.Tensor
    width: th.Tensor
    offsets: th.Tensor
    strides: th.Tensor

    def __init__(
        self,
        space: spaces.Space[Any],
        n_tilings: int,
        n_tiles: int,
        low: float | Sequence[float] | None = None,
        high: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(space, spaces.Box):
            raise UnsupportedError(f"features='tile' needs observations in a Box, got {space}: take features='identity'")
        least, most = _bounds(space, low, high)
        dimensions = len(least)
        self.size = n_tilings * (n_tiles + 1) ** dimensions
        if self.size > MOST:
            raise ArgumentError(
                f"policy_kwargs['n_tilings'] and ['n_tiles'] must make at most {MOST} tiles, got {n_tilings} and {n_tiles}, "
                f"which make {self.size} of {dimensions} dimensions"
            )
        displacements = th.arange(n_tilings)[:, None] * (2 * th.arange(dimensions) + 1) % n_tilings
        self.n_tiles = n_tiles
        self.register_buffer("low", th.as_tensor(least, dtype=th.float64), persistent=False)
        self.register_buffer("width", th.as_tensor((most - least) / n_tiles, dtype=th.float64), persistent=False)
        self.register_buffer("offsets", displacements / n_tilings, persistent=False)  # (n_tilings, d), in tiles
        self.register_buffer("strides", (n_tiles + 1) ** th.arange(dimensions), persistent=False)
        self.register_buffer("tiles", th.arange(n_tilings) * (n_tiles + 1) ** dimensions, persistent=False)

    def indices(self, obs: th.Tensor) -> th.Tensor:
        """
        :param obs: ``(N, ...)``
        :return: ``(N, n_tilings)`` the features that are 1
        """
        places = ((obs.flatten(1).to(self.low.dtype) - self.low) / self.width).clamp(0, self.n_tiles)
        tiles = (places[:, None] + self.offsets).floor().long()  # (N, n_tilings, d)
        return self.tiles + (tiles * self.strides).sum(dim=2)

    def forward(self, obs: th.Tensor) -> th.Tensor:
        """
        :param obs: ``(N, ...)``
        :return: ``(N, size)``
        """
        return th.zeros(len(obs), self.size, device=obs.device).scatter_(1, self.indices(obs), 1.0)


def _bounds(space: spaces.Box, low: Any, high: Any) -> tuple[np.ndarray, np.ndarray]:
    """``(d,)`` each, of which all are finite and differ."""
    try:
        least, most = (
            np.array(np.broadcast_to(own if given is None else np.asarray(given, np.float64), own.shape), np.float64).flatten()
            for own, given in ((space.low, low), (space.high, high))
        )
    except (ValueError, TypeError) as error:
        raise ArgumentError(
            f"policy_kwargs['low'] and ['high'] must be numbers, or as many as an observation has, got {low} and {high}"
        ) from error
    # a Box's bounds of float32 stand for none where they are the largest numbers
    wrong = ~(np.isfinite(least) & np.isfinite(most) & (least < most) & (np.abs(most) < 1e30) & (np.abs(least) < 1e30))
    if wrong.any():
        raise ArgumentError(
            f"features='tile' needs bounds with low < high: give policy_kwargs['low'] and ['high'], as dimension "
            f"{', '.join(map(str, np.flatnonzero(wrong)))} of the observations has none in {space}, got low={low}, high={high}"
        )
    return least, most
