"""What the off-policy algorithms have in common: SB3's updates, delays, rates, bounds, what is stored and logged."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from batches import SGD, batches, engine_on_and_off, feed, flat
from environments import RandomEnv, ScriptedEnv
from gymnasium import spaces
from models import OFF_POLICY, ONE_AGENT, SB3, SB3_OFF_POLICY, algorithm_class, environment, rows, small_model
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import FlattenExtractor
from subjects import Intervention, assert_sb3s, train
from torch import nn

from sb3_ac_ext.validation import NonFiniteError

UNEQUAL = {"net_arch": {"pi": [8], "qf": [16, 8, 4]}, "activation_fn": nn.Tanh}
OTHER_ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    *((row, {"policy_kwargs": UNEQUAL, "learning_rate": lambda progress: 1e-2 * progress}) for row in SB3_OFF_POLICY),
    *((row, {"n_steps": 3, "gamma": 0.9}) for row in SB3_OFF_POLICY),
    ("td3x", {"policy_delay": 3, "target_policy_noise": 0.4, "target_noise_clip": 0.3}),
    ("sacx", {"ent_coef": "auto_0.3", "target_entropy": -0.7, "target_update_interval": 2, "gradient_steps": 3}),
    ("sacx", {"ent_coef": 0.2, "use_sde": True, "policy_kwargs": {"use_expln": True, "clip_mean": 0.0}}),
]


@pytest.mark.parametrize(("row", "arguments"), OTHER_ARGUMENTS)
@engine_on_and_off
def test_training_is_sb3s_with_other_arguments_too(row: str, arguments: dict[str, Any], engine: bool) -> None:
    case = Intervention("nothing", lambda _: None, changes=tuple(arguments.items()))
    ours, theirs = train(row, engine, case), train(row, "sb3", case)
    assert theirs.error is None
    assert_sb3s(ours, theirs, 1e-5 if engine else 0.0)


@pytest.mark.parametrize(
    ("row", "changes", "expected"),
    [
        ("td3x", {}, {"actor": 0, "actor_target": 0, "critic": 2, "critic_target": 2}),
        ("sacx", {}, {"actor": 0, "critic": 2, "critic_target": 2}),
        ("sacx", {"value_network": True}, {"actor": 0, "critic": 2, "critic_target": 0, "value": 1, "value_target": 1}),
    ],
    ids=["td3x", "sacx", "sacx with V"],
)
def test_layer_norm_is_in_the_critics_only(row: str, changes: dict[str, Any], expected: dict[str, int]) -> None:
    model = small_model(row, "critic layer norm", **changes)
    found = {
        name: sum(isinstance(layer, nn.LayerNorm) for layer in network.modules())
        for name, network in model.policy.named_children()
    }
    assert found == expected
    assert [type(layer) for layer in model.critic.qf0] == [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Linear]


# When and how far networks move


@pytest.mark.parametrize(("row", "policy_delay"), [("ddpgx", 1), ("td3x", 1), ("td3x", 3), ("maddpg", 1), ("maddpg", 2)])
@engine_on_and_off
def test_actor_and_targets_move_every_policy_delay_updates(row: str, policy_delay: int, engine: bool) -> None:
    delay = {} if row == "ddpgx" else {"policy_delay": policy_delay}
    model = small_model(row, tau=0.25, engine=engine, **delay).learn(12)
    for _ in range(7):
        before = {name: flat(getattr(model, name)) for name in ("actor", "critic", "actor_target", "critic_target")}
        model.train(1, 8)
        moves = model._n_updates % policy_delay == 0
        assert not th.equal(flat(model.critic), before["critic"])
        assert th.equal(flat(model.actor), before["actor"]) != moves
        for name in ("actor", "critic"):
            target, old = flat(getattr(model, f"{name}_target")), before[f"{name}_target"]
            if moves:
                th.testing.assert_close(target, 0.75 * old + 0.25 * flat(getattr(model, name)), rtol=0, atol=1e-6)
            else:
                assert th.equal(target, old)


RATES: dict[str, dict[str, Any]] = {row: {"actor": "lin_4e-3", "critic": 2e-3} for row in OFF_POLICY}
RATES["sacx"] = {"actor": "lin_4e-3", "q_a": 2e-3, "q_b": 3e-3, "value": 5e-3, "ent_coef": 6e-3}
WITH_ALL_NETWORKS = {"sacx": {"value_network": True}}
EVERY_NETWORK = [(row, network) for row, networks in RATES.items() for network in networks]


@rows(OFF_POLICY)
def test_rates_of_their_own(row: str) -> None:
    rates = {f"{name}_learning_rate": rate for name, rate in RATES[row].items()}
    model = small_model(row, learning_rate=1e-3, **rates, **WITH_ALL_NETWORKS.get(row, {})).learn(12)
    model._current_progress_remaining = 0.25
    model.train(1, 8)
    used = {name: network.optimizer.param_groups[0]["lr"] for name, network in model._networks().items()}
    assert used == pytest.approx({**RATES[row], "actor": 1e-3})
    logged = model.logger.name_to_value
    assert logged["train/learning_rate"] == pytest.approx(1e-3)
    assert {name: logged[f"train/{name}_learning_rate"] for name in used} == pytest.approx(used)


def parameters_by_network(model: Any) -> dict[str, th.Tensor]:
    """What each optimizer trains."""
    groups = {name: network.optimizer.param_groups for name, network in model._networks().items()}
    return {
        name: th.cat([parameter.detach().flatten().clone() for group in groups[name] for parameter in group["params"]])
        for name in groups
    }


@pytest.mark.parametrize(("row", "network"), EVERY_NETWORK)
def test_a_rate_moves_its_network_alone(row: str, network: str) -> None:
    rates = {"learning_rate": 0.0, f"{network}_learning_rate": 1e-2}
    model = small_model(row, **rates, **WITH_ALL_NETWORKS.get(row, {}))
    before = parameters_by_network(model)
    model.learn(13)
    assert {name for name, after in parameters_by_network(model).items() if not th.equal(after, before[name])} == {network}


@rows(SB3_OFF_POLICY)
@pytest.mark.parametrize("everywhere", [True, False], ids=["all networks", "the first"])
def test_gradients_are_bounded_for_each_network(row: str, everywhere: bool) -> None:
    """MADDPG bounds those of each agent."""
    first = "q_a" if row == "sacx" else "critic"
    own = {"sacx": {"ent_coef": 0.2}, "td3x": {"policy_delay": 1}}.get(row, {})
    moved, logged = [], []
    for bound in (1e-3 if everywhere else {first: 1e-3}, None):
        model = small_model(row, max_grad_norm=bound, learning_rate=1.0, policy_kwargs=SGD, **own)
        feed(model, batches(1))
        before = parameters_by_network(model)
        th.manual_seed(0)
        model.train(1, 8)
        moved.append({name: (after - before[name]).norm().item() for name, after in parameters_by_network(model).items()})
        logged.append({name: model.logger.name_to_value[f"train/{name}_grad_norm"] for name in before})
    bounded, free = moved
    assert min(free.values()) > 1e-2
    for name in free:
        assert (bounded[name] == pytest.approx(1e-3, rel=1e-2)) == (everywhere or name == first)
    assert logged[1] == pytest.approx(free, rel=1e-3)
    assert logged[0][first] == pytest.approx(free[first], rel=1e-3)  # before it is bounded


@pytest.mark.parametrize(("row", "network"), EVERY_NETWORK)
@engine_on_and_off
def test_training_that_becomes_non_finite_stops(row: str, network: str, engine: bool) -> None:
    model = small_model(row, engine=engine, **WITH_ALL_NETWORKS.get(row, {})).learn(20)
    model._networks()[network].optimizer.param_groups[0]["params"][0].data.view(-1)[0] = float("nan")
    name = algorithm_class(row).__name__
    with pytest.raises(NonFiniteError, match=rf"{name}: the parameters of the \w+ became non-finite .* by update 11"):
        model.train(1, 8)


# What is stored, logged and kept


@rows(OFF_POLICY)
@pytest.mark.parametrize(("truncates", "done"), [(False, 1.0), (True, 0.0)], ids=["terminates", "truncates"])
def test_stored_transitions(row: str, truncates: bool, done: float) -> None:
    """
    The next observation is the episode's last one, not the next episode's first, and only termination is ``done``.

    The environment shows the step and what was done; actions in the buffer are scaled to [-1, 1].
    """
    env = ScriptedEnv(length=3, truncates=truncates, low=0.0, high=2.0)
    buffer = small_model(row, env=env, learning_starts=4, n_steps=1).learn(6).replay_buffer
    stored = buffer._get_samples(np.arange(6))
    assert stored.observations[:, 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert stored.next_observations[:, 0].tolist() == [1, 2, 3, 1, 2, 3]
    assert stored.rewards[:, 0].tolist() == [1, 2, 3, 1, 2, 3]
    assert stored.dones[:, 0].tolist() == [0, 0, done, 0, 0, done]
    assert stored.actions.abs().max() <= 1
    np.testing.assert_allclose(stored.next_observations[:, 1], stored.actions[:, 0] + 1, atol=1e-6)


LOGGED = {
    "td3x": {"q_a", "q_b", "actor_grad_norm", "critic_grad_norm"},
    "ddpgx": {"q", "action_gradient", "actor_grad_norm", "critic_grad_norm"},
    "sacx": {"q_a", "q_b", "entropy", "actor_grad_norm", "q_a_grad_norm", "q_b_grad_norm", "ent_coef_grad_norm"},
}
"""Beside what SB3 logs."""


@rows(SB3_OFF_POLICY)
def test_logged_quantities(row: str) -> None:
    model, theirs = small_model(row), small_model(SB3[row])
    q = model.critic(batches(1)[0].observations, batches(1)[0].actions)
    names = ["q"] if len(q) == 1 else ["q_a", "q_b"]
    for candidate in (model, theirs):
        feed(candidate, batches(2))
        candidate.train(1, 8)
    logged = model.logger.name_to_value
    assert [logged[f"train/{name}"] for name in names] == pytest.approx([value.mean().item() for value in q], rel=1e-4)
    assert ("train/actor_loss" in logged) == (row != "td3x")  # whose actor has not been updated
    for candidate in (model, theirs):
        candidate.train(1, 8)
    added = {key.removeprefix("train/") for key in model.logger.name_to_value.keys() - theirs.logger.name_to_value}
    assert added == LOGGED[row]


@rows(OFF_POLICY)
def test_arguments_of_the_caller_stay_as_they_were(row: str) -> None:
    """SB3's DDPG writes into the dict that it is given."""
    policy_kwargs = {"net_arch": [8]}
    algorithm_class(row)("MlpPolicy", environment(row), policy_kwargs=policy_kwargs, **WITH_ALL_NETWORKS.get(row, {}))
    assert policy_kwargs == {"net_arch": [8]}


@rows(OFF_POLICY)
def test_rollouts_act_by_replays(row: str) -> None:
    assert small_model(row).learn(30).engine_report()["act(False)"] == "replayed"


@rows(OFF_POLICY)
@pytest.mark.parametrize("matrices", [False, True], ids=["usual", "float64 matrices"])
@pytest.mark.parametrize("deterministic", [True, False], ids=["mode", "sample"])
def test_replayed_actions_are_the_policys(row: str, deterministic: bool, matrices: bool) -> None:
    """The same actions from the same random numbers, and as many of them; what the actor becomes is seen at once."""
    unusual = RandomEnv(spaces.Box(-5, 5, (2, 3), np.float64), spaces.Box(-1, 2, (3, 7), np.float64))
    model = small_model(row, env=unusual if matrices else None).learn(30)
    found = []
    for factor, size in ((1.0, None), (1.0, 1), (-2.0, 3)):
        for parameter in model.actor.parameters():
            parameter.data.mul_(factor)
        shape = model.observation_space.shape if size is None else (size, *model.observation_space.shape)
        batch = np.random.default_rng(0).normal(size=shape).astype(model.observation_space.dtype)
        for _ in range(6):
            model.predict(batch, deterministic=deterministic)
        assert model.engine_report()[f"act({deterministic})"] == "replayed"
        results = []
        for predict in (model.predict, model.policy.predict):
            th.manual_seed(4)
            results.append([predict(batch, deterministic=deterministic)[0] for _ in range(3)] + [th.rand(1).numpy()])
        for ours, theirs in zip(*results, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
        found.append(results[0][0].reshape(-1, *model.action_space.shape)[0])
    assert not np.allclose(found[1], found[2])


class Broken(gym.Wrapper):
    """Gives NaN at a step, and refuses actions that are NaN."""

    def __init__(self, env: gym.Env, what: str, at: int) -> None:
        super().__init__(env)
        self.what, self.at, self.steps = what, at, 0

    def step(self, action: Any) -> Any:
        assert np.isfinite(action).all()
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.steps += 1
        if self.steps == self.at:
            obs, reward = (np.full_like(obs, np.nan), reward) if self.what == "observation" else (obs, np.nan)
        return obs, reward, terminated, truncated, info


class ForgivingExtractor(FlattenExtractor):
    """Takes NaN for 0."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations.nan_to_num())


@rows(row for row in OFF_POLICY if row in ONE_AGENT)
@pytest.mark.parametrize("what", ["reward", "observation"])
@pytest.mark.parametrize("at", [5, 30], ids=["warm-up", "training"])
def test_what_is_not_finite_is_not_stored(row: str, what: str, at: int) -> None:
    """And the environment is named, not a network."""
    model = small_model(row, env=make_vec_env(lambda: Broken(environment(row), what, at), 2))
    with pytest.raises(NonFiniteError, match=f"environment [01] gave a non-finite {what}"):
        model.learn(100)
    assert model.num_timesteps == 2 * at
    assert all(np.isfinite(stored).all() for stored in (model.replay_buffer.rewards, model.replay_buffer.next_observations))


@rows(row for row in OFF_POLICY if row in ONE_AGENT)
def test_observations_that_the_policy_knows_what_to_do_with_are_stored(row: str) -> None:
    policy_kwargs = {"features_extractor_class": ForgivingExtractor}
    model = small_model(row, env=Broken(environment(row), "observation", 30), policy_kwargs=policy_kwargs)
    assert np.isnan(model.learn(60).replay_buffer.next_observations[:60]).any()
