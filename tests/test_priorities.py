"""Replay buffers that take n, gamma and priorities, in every off-policy algorithm."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from batches import engine_on_and_off, flat
from environments import BOX, CONTINUOUS, DICT, RandomEnv
from gymnasium.wrappers import TimeLimit
from models import OFF_POLICY, ONE_AGENT, algorithm_class, environment, rows, small_model
from parallel_environments import Crowd
from stable_baselines3 import TD3
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_ac_ext.buffers.prioritized import (
    PrioritizedDictReplayBuffer,
    PrioritizedHerReplayBuffer,
    PrioritizedReplayBuffer,
)
from sb3_ac_ext.maddpg.buffer import PrioritizedJointReplayBuffer

STEPS = tuple(row for row in OFF_POLICY if row != "maddpg")
"""Rows with n-step returns."""


def buffer_of(row: str) -> type[PrioritizedReplayBuffer]:
    return PrioritizedJointReplayBuffer if row == "maddpg" else PrioritizedReplayBuffer


def without_draws(row: str) -> dict[str, Any]:
    """Arguments with which an update draws nothing: no smoothing noise, and no choices of MADDPG's agents."""
    return {"maddpg": {"env": Crowd(2)}, "td3x": {"target_policy_noise": 0.0}}.get(row, {})


def prioritised(row: str, **changes: Any) -> Any:
    return small_model(row, **{"replay_buffer_class": buffer_of(row), "n_steps": 1, **changes})


# Priorities and weights


@rows(OFF_POLICY)
@engine_on_and_off
def test_priorities_are_the_errors_of_the_last_update(row: str, engine: bool) -> None:
    model = prioritised(row, engine=engine).learn(20)
    buffer = model.replay_buffer
    batch = model._sample(64)
    outputs = model._engine.run(model._update, batch, *() if row == "ddpgx" else (False,))
    assert outputs["td_errors"].shape == (64, 1) and (outputs["td_errors"] >= 0).all()
    model._update_priorities(batch, outputs)
    errors = dict(zip(batch.indices.tolist(), outputs["td_errors"][:, 0].tolist(), strict=True))  # the last one of each
    np.testing.assert_allclose(buffer.tree.leaves[[*errors]], (np.array([*errors.values()]) + 1e-6) ** 0.6, rtol=1e-5)
    assert not np.allclose(buffer.tree.leaves[:20], 1.0)


@pytest.mark.parametrize("row", ["td3x", "ddpgx", "maddpg"])
def test_errors_are_means_of_absolute_ones_without_the_weights(row: str) -> None:
    model = prioritised(row, **without_draws(row)).learn(20)
    batch = model._sample(32)
    assert not th.allclose(batch.weights, th.ones(32, 1))
    target = model._target(batch)
    with th.no_grad():
        values = model.critic(batch.observations, batch.actions)
    errors = th.stack([(value - target).abs() for value in values]).mean(dim=0)  # (B, 1), or of each agent
    active = batch.active if row == "maddpg" else th.ones(32, 1)
    expected = (errors * active).sum(dim=1) / active.sum(dim=1)
    outputs = model._engine.run(model._update, batch, *() if row == "ddpgx" else (False,))
    np.testing.assert_allclose(outputs["td_errors"][:, 0], expected, rtol=1e-4, atol=1e-5)


@rows(OFF_POLICY)
def test_weights_enter_the_loss(row: str) -> None:
    """A batch of which one transition counts is as one of this transition alone, but for the mean."""
    losses = []
    for rows_of_the_batch in (slice(0, 8), slice(2, 3)):
        model = prioritised(row, **without_draws(row)).learn(20)
        whole = model._sample(8)._replace(weights=th.zeros(8, 1).index_fill(0, th.tensor([2]), 1.0))
        parts = [part[rows_of_the_batch] if getattr(part, "ndim", 0) else part for part in whole]
        model._set_training_mode(True)
        model._engine.begin()
        th.manual_seed(0)
        options = () if row == "ddpgx" else (False,)
        outputs = model._engine.run_plainly(model._update, type(whole)(*parts), *options)
        losses.append(outputs["critic_loss"].item())
    if row not in ("sacx", "opac"):  # whose actions are draws
        assert losses[0] == pytest.approx(losses[1] / 8, rel=1e-4)
    assert losses[0] < losses[1]


@rows(STEPS)
@engine_on_and_off
def test_exponent_0_is_uniform_replay(row: str, engine: bool) -> None:
    """The same draws, so the same training but for the rounding of means with weights of 1."""
    kwargs = {"engine": engine, "n_steps": 3, **({"prioritized": False} if row == "d4pg" else {})}
    uniform = small_model(row, **kwargs).learn(40)
    without = prioritised(row, replay_buffer_kwargs={"alpha": 0.0}, **kwargs).learn(40)
    assert type(uniform.replay_buffer) is NStepReplayBuffer
    th.testing.assert_close(flat(without.policy), flat(uniform.policy), rtol=1e-4, atol=1e-4)


@rows(OFF_POLICY)
def test_beta_follows_the_training_and_is_logged(row: str) -> None:
    model = prioritised(row).learn(40)
    assert model.replay_buffer.beta == model.logger.name_to_value["train/importance_beta"] == pytest.approx(1.0)
    assert 0 < model.logger.name_to_value["train/importance_weight"] <= 1
    model.learn(20, reset_num_timesteps=False)
    model._current_progress_remaining = 0.5
    model.train(1, 8)
    assert model.replay_buffer.beta == pytest.approx(0.7)


@rows(OFF_POLICY)
def test_resumed_training_has_the_same_priorities(row: str, tmp_path: Path) -> None:
    model = prioritised(row).learn(28)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = algorithm_class(row).load(tmp_path / "model", env=environment(row))
    loaded.load_replay_buffer(tmp_path / "buffer")
    for one in (model, loaded):
        one.set_logger(model.logger)
    loaded.train(6, 8)
    model._random_state = algorithm_class(row).load(tmp_path / "model")._random_state
    model.train(6, 8)
    assert th.equal(flat(model.policy), flat(loaded.policy))
    for name in ("leaves", "result"):
        np.testing.assert_array_equal(getattr(model.replay_buffer.tree, name), getattr(loaded.replay_buffer.tree, name))
    assert model.replay_buffer.max_priority == loaded.replay_buffer.max_priority


@pytest.mark.parametrize("row", [row for row in STEPS if row != "sacx"])
def test_priorities_with_dicts_hindsight_and_several_environments(row: str) -> None:
    dicts = small_model(
        row, "dict", env=make_vec_env(lambda: TimeLimit(RandomEnv(DICT, CONTINUOUS), 7), 3), n_steps=3,
        replay_buffer_class=PrioritizedDictReplayBuffer,
    )  # fmt: skip
    her = small_model(
        row, policy="MultiInputPolicy", env=BitFlippingEnv(n_bits=3, continuous=True), n_steps=1,
        replay_buffer_class=PrioritizedHerReplayBuffer, replay_buffer_kwargs={"n_sampled_goal": 2},
    )  # fmt: skip
    for model in (dicts, her):
        model.learn(45)
        leaves = model.replay_buffer.tree.leaves
        assert len(np.unique(leaves[leaves > 0])) > 3


# What the model and the buffer have in common


@rows(STEPS)
@pytest.mark.parametrize("buffer", [NStepReplayBuffer, PrioritizedReplayBuffer])
def test_buffers_are_handed_n_and_gamma_and_follow_gamma(row: str, buffer: Any) -> None:
    model = small_model(row, replay_buffer_class=buffer, n_steps=3, gamma=0.9).learn(15)
    assert (model.replay_buffer.n_steps, model.replay_buffer.gamma) == (3, 0.9)
    model.gamma = 0.5
    discounts = model._sample(64).discounts
    assert set(np.round(np.log2(discounts.numpy()[:, 0]))) <= {-1, -2, -3}
    kwargs = {"n_steps": 3, "gamma": 0.9}
    same = small_model(row, replay_buffer_class=buffer, gamma=0.9, replay_buffer_kwargs=kwargs)
    assert (same.n_steps, same.replay_buffer.n_steps, same.replay_buffer.gamma) == (3, 3, 0.9)
    assert kwargs == {"n_steps": 3, "gamma": 0.9}  # the caller's


@pytest.mark.parametrize("buffer", [None, NStepReplayBuffer, PrioritizedReplayBuffer])
def test_contradictions_of_model_and_buffer_are_refused(buffer: Any) -> None:
    for name, value, own in (("n_steps", 4, 3), ("gamma", 0.8, 0.9)):
        with pytest.raises(
            ValueError, match=rf"replay_buffer_kwargs\['{name}'\] must be {name}.*got {value} and {name}={own}"
        ):
            small_model("td3x", replay_buffer_class=buffer, n_steps=3, gamma=0.9, replay_buffer_kwargs={name: value})


@rows(STEPS)
@pytest.mark.parametrize("buffer", [None, NStepReplayBuffer, PrioritizedReplayBuffer])
def test_load_with_another_gamma_and_n(row: str, buffer: Any, tmp_path: Path) -> None:
    model = small_model(row, replay_buffer_class=buffer, n_steps=3, gamma=0.9).learn(15)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = algorithm_class(row).load(tmp_path / "model", gamma=0.5, n_steps=2)
    assert (loaded.replay_buffer.n_steps, loaded.replay_buffer.gamma) == (2, 0.5)
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert (loaded.replay_buffer.n_steps, loaded.replay_buffer.gamma) == (2, 0.5)


def test_sb3s_zip_with_several_steps_loads_with_another_gamma(tmp_path: Path) -> None:
    """SB3 puts both into the replay buffer's arguments."""
    small_model(TD3, n_steps=3, gamma=0.9).save(tmp_path / "sb3")
    for changes, expected in (({}, (3, 0.9)), ({"gamma": 0.5}, (3, 0.5)), ({"n_steps": 4}, (4, 0.9))):
        buffer = algorithm_class("td3x").load(tmp_path / "sb3", **changes).replay_buffer
        assert type(buffer) is NStepReplayBuffer
        assert (buffer.n_steps, buffer.gamma) == expected
    assert type(algorithm_class("td3x").load(tmp_path / "sb3", n_steps=1).replay_buffer) is ReplayBuffer


@pytest.mark.parametrize("row", ["td3x", "ddpgx", "sacx"])
def test_a_buffer_that_is_asked_for_is_used_or_refused(row: str) -> None:
    her = {"policy": "MultiInputPolicy", "env": BitFlippingEnv(n_bits=3, continuous=True)}
    for arguments, message in (
        ({"replay_buffer_class": ReplayBuffer, "n_steps": 3}, "ReplayBuffer sums no rewards: n_steps must be 1, got 3"),
        ({"replay_buffer_class": DictReplayBuffer}, "DictReplayBuffer is for Dict observations, got Box"),
        ({"replay_buffer_class": HerReplayBuffer}, "HerReplayBuffer is for Dict observations, got Box"),
        ({"replay_buffer_class": PrioritizedDictReplayBuffer}, "PrioritizedDictReplayBuffer is for Dict observations"),
        ({"replay_buffer_class": HerReplayBuffer, "n_steps": 3, **her}, "HerReplayBuffer sums no rewards"),
        ({"replay_buffer_class": ReplayBuffer, **her}, "ReplayBuffer is not for Dict observations"),
        ({"replay_buffer_class": PrioritizedReplayBuffer, **her}, "PrioritizedReplayBuffer is not for Dict observations"),
    ):
        with pytest.raises((ValueError, NotImplementedError), match=message):
            small_model(row, **arguments)
    for given, n_steps in (({"n_steps": 2}, 2), ({}, 3)):  # SB3's default of this buffer
        model = small_model(row, replay_buffer_class=NStepReplayBuffer, **given).learn(15)
        assert type(model.replay_buffer) is NStepReplayBuffer
        assert model.n_steps == model.replay_buffer.n_steps == n_steps


def test_several_agents_need_a_buffer_that_knows_them() -> None:
    with pytest.raises(NotImplementedError, match="JointReplayBuffer, which knows each agent's rewards"):
        small_model("maddpg", replay_buffer_class=PrioritizedReplayBuffer)


def test_buffers_too_small_for_the_steps_are_refused() -> None:
    env = make_vec_env(lambda: TimeLimit(RandomEnv(BOX, CONTINUOUS), 7), 4)
    with pytest.raises(ValueError, match=r"buffer_size must be at least n_steps \* n_envs = 12, got 11"):
        small_model("td3x", env=env, n_steps=3, buffer_size=11)


@rows(row for row in OFF_POLICY if row in ONE_AGENT)
def test_a_buffer_of_another_number_of_steps_is_refused(row: str) -> None:
    """It may be the user's, or from a file."""
    model = small_model(row, n_steps=3).learn(20)
    one_step = ReplayBuffer(100, model.observation_space, model.action_space)
    for _ in range(20):
        one_step.add(BOX.sample(), BOX.sample(), CONTINUOUS.sample(), np.zeros(1), np.zeros(1), [{}])
    model.replay_buffer = one_step
    with pytest.raises(ValueError, match=r"replay_buffer must sum n_steps=3 rewards, got a ReplayBuffer that sums 1"):
        model.train(1, 8)


def test_arguments_of_a_buffer_that_is_in_the_file_are_refused(tmp_path: Path) -> None:
    small_model("d4pg").learn(20).save(tmp_path / "model", include=["replay_buffer"])
    cls = algorithm_class("d4pg")
    for name, value in {"buffer_size": 50, "replay_buffer_kwargs": {"alpha": 0.1}, "prioritized": False}.items():
        with pytest.raises(ValueError, match=f"{name} must be left out where the file has its replay buffer"):
            cls.load(tmp_path / "model", **{name: value})
    assert cls.load(tmp_path / "model").replay_buffer.size() == 20
