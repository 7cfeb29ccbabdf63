"""D4PG: its losses and priorities by hand, the range of values, what it refuses, the picture of a distribution."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from batches import SGD, engine_on_and_off, flat
from environments import BOX, CONTINUOUS, RandomEnv, ScriptedEnv
from gymnasium.wrappers import TimeLimit
from models import small_model
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from torch import nn

from sb3_ac_ext import D4PG
from sb3_ac_ext.buffers.prioritized import PrioritizedDictReplayBuffer, PrioritizedHerReplayBuffer, PrioritizedReplayBuffer
from sb3_ac_ext.buffers.replay import Transitions
from sb3_ac_ext.d4pg.plots import plot_values
from sb3_ac_ext.d4pg.value_range import automatic_range
from sb3_ac_ext.validation import NonFiniteError

PROBS = (0.1, 0.2, 0.4, 0.2, 0.1)
LOGITS = (0.3, -0.2, 0.1, 0.0, -0.4)


def transitions(rows: int = 1, **changes: Any) -> Transitions:
    """A batch of R = 0.25 and D = 0.9, or with other parts."""
    generator = th.Generator().manual_seed(3)
    parts = {
        "observations": th.randn(rows, 4, generator=generator),
        "actions": th.randn(rows, 2, generator=generator).tanh(),
        "next_observations": th.randn(rows, 4, generator=generator),
        "dones": th.zeros(rows, 1),
        "rewards": th.full((rows, 1), 0.25),
        "discounts": th.full((rows, 1), 0.9),
    }
    return Transitions(**{**parts, **changes})


def giving(critic: Any, outputs: Any) -> th.Tensor:
    """Let a critic give the same outputs everywhere; its last bias, whose gradient is that of the outputs."""
    layer = critic.qf0[-1]
    layer.weight.data.zero_()
    layer.bias.data.copy_(th.as_tensor(outputs, dtype=th.float32))
    return layer.bias


def categorical(atoms: tuple[float, float] = (0.0, 4.0), logits: Any = LOGITS, **changes: Any) -> Any:
    """A model of five atoms whose target gives `PROBS`, and the bias of its critic."""
    model = small_model("d4pg", v_min=atoms[0], v_max=atoms[1], policy_kwargs={"n_atoms": 5}, **changes)
    giving(model.critic_target, np.log(PROBS))
    return model, giving(model.critic, logits)


# The losses


def test_categorical_loss_by_hand() -> None:
    model, bias = categorical()
    target, clipped = model._categorical_target(transitions())
    np.testing.assert_allclose(target[0], (0.075, 0.195, 0.42, 0.225, 0.085), atol=1e-6)
    assert clipped.item() == 0
    errors = model._categorical_errors(transitions())
    assert errors.losses.item() == pytest.approx(1.60669101, abs=1e-6)
    assert errors.priorities.item() == pytest.approx(1.60669101, abs=1e-6)
    (gradient,) = th.autograd.grad(errors.losses.sum(), bias)
    np.testing.assert_allclose(gradient, (0.19802525, -0.02940182, -0.19646583, -0.02273792, 0.05058033), atol=1e-6)
    model.priority = "kl"
    assert model._categorical_errors(transitions()).priorities.item() == pytest.approx(0.18413718, abs=1e-6)


def test_value_is_the_mean_of_the_distribution() -> None:
    model, bias = categorical()
    batch = transitions()
    (q,) = model.critic(batch.observations, batch.actions)
    assert q.shape == (1, 1)
    assert q.item() == pytest.approx(1.76177405, abs=1e-6)
    q = model.critic.q1_forward(batch.observations, batch.actions)
    assert q.item() == pytest.approx(1.76177405, abs=1e-6)
    (gradient,) = th.autograd.grad(q.sum(), bias)
    np.testing.assert_allclose(gradient, (-0.4810088, -0.1261484, 0.05325164, 0.25044615, 0.3034594), atol=1e-6)


@pytest.mark.parametrize(
    ("done", "discount", "expected"),
    [
        (0.0, 0.729, (0, 0.0412, 0.1954, 0.49, 0.2734)),
        (1.0, 0.729, (0, 0, 0, 0.954, 0.046)),
        (0.0, 0.9, (0, 0.0754, 0.1954, 0.4216, 0.3076)),  # what it would be with gamma once
    ],
    ids=["goes on", "terminated", "one step"],
)
def test_target_of_several_steps(done: float, discount: float, expected: tuple[float, ...]) -> None:
    model, _ = categorical((-10.0, 10.0))
    given = {"rewards": th.tensor([[5.23]]), "dones": th.tensor([[done]]), "discounts": th.tensor([[discount]])}
    target, _ = model._categorical_target(transitions(**given))
    np.testing.assert_allclose(target[0], expected, atol=1e-6)


@pytest.mark.parametrize("truncates", [True, False])
def test_time_limits_are_no_ends(truncates: bool) -> None:
    """Rewards are 1, 2, 3; behind a truncation the target's Q counts, times gamma to the number of rewards, else nothing."""
    env = ScriptedEnv(length=3, truncates=truncates, low=0.0, high=2.0)
    model = small_model("d4pg", env=env, gamma=0.9, v_min=-20.0, v_max=20.0).learn(6)
    giving(model.critic_target, np.linspace(0, 1, 51))
    samples = model.replay_buffer._samples(np.arange(6), None)
    target, _ = model._categorical_target(Transitions(*samples))
    atoms, probs = np.linspace(-20, 20, 51), np.exp(np.linspace(0, 1, 51))
    rewards, discounts = np.array([5.23, 4.7, 3.0] * 2), np.array([0.729, 0.81, 0.9] * 2) * truncates
    returns = np.clip(rewards[:, None] + discounts[:, None] * atoms, -20, 20)
    np.testing.assert_allclose(target @ model.critic.atoms, returns @ probs / probs.sum(), rtol=1e-4)


def test_logits_that_underflow_have_a_finite_loss() -> None:
    """Probabilities of 0, whose logarithm there is none of."""
    model, bias = categorical(logits=(1e4, -1e4, 0.0, -1e4, 1e4))
    giving(model.critic_target, (-1e4, 1e4, -1e4, 0.0, 0.0))
    for model.priority in ("cross-entropy", "kl"):
        errors = model._categorical_errors(transitions())
        (gradient,) = th.autograd.grad(errors.losses.sum(), bias)
        assert th.isfinite(errors.losses).all() and th.isfinite(errors.priorities).all() and th.isfinite(gradient).all()


def mixture() -> Any:
    """Two Gaussians: logits (0.2, -0.1), means (1, 2), standard deviations (0.5, 1); and the bias of the critic."""
    model = small_model("d4pg", "mixture", policy_kwargs={"n_components": 2, "init_std": 1.0, "min_std": 1e-3})
    scales = [math.log(math.expm1((std - 1e-3) * math.log(2))) for std in (0.5, 1.0)]
    return model, giving(model.critic, (0.2, -0.1, 1.0, 2.0, *scales))


def test_mixture_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bias = mixture()
    monkeypatch.setattr(model, "_sampled_target", lambda batch: th.tensor([[0.8, 1.5, 2.5]]))
    errors = model._mixture_errors(transitions())
    assert errors.losses.item() == pytest.approx(1.13188773, abs=1e-6)
    (gradient,) = th.autograd.grad(errors.losses.sum(), bias)
    np.testing.assert_allclose(gradient[:4], (0.06802092, -0.06802092, -0.2758395, -0.03746172), atol=1e-6)
    q = model.critic.q1_forward(transitions().observations, transitions().actions)
    assert q.item() == pytest.approx(1.42555748, abs=1e-6)
    assert errors.priorities.item() == pytest.approx(abs(1.42555748 - 1.6), abs=1e-6)


def test_samples_of_a_mixture_are_the_returns() -> None:
    """Of a terminated episode all are the reward, with a finite loss; otherwise they have the target's moments."""
    model, _ = mixture()
    giving(model.critic_target, model.critic.qf0[-1].bias.detach())
    batch = transitions(rewards=th.tensor([[5.23]]), discounts=th.tensor([[0.729]]))
    ended = batch._replace(dones=th.ones(1, 1))
    assert model._sampled_target(ended).tolist() == [pytest.approx([5.23] * 20)]
    assert th.isfinite(model._mixture_errors(ended).losses).all()
    model.n_target_samples = 100_000
    samples = model._sampled_target(batch)
    second_moment = 0.57444252 * (1.25) + 0.42555748 * (1 + 4)
    assert samples.mean().item() == pytest.approx(5.23 + 0.729 * 1.42555748, abs=0.02)
    assert samples.std().item() == pytest.approx(0.729 * math.sqrt(second_moment - 1.42555748**2), abs=0.02)


@engine_on_and_off
@pytest.mark.parametrize("bound", [None, 1e-3], ids=["free", "bounded slopes"])
def test_update_by_hand(engine: bool, bound: float | None) -> None:
    """Two steps of the critic with weights, of the actor without, by the critic as it is then."""
    model = small_model(
        "d4pg",
        policy_kwargs={**SGD, "n_atoms": 7},
        learning_rate=1.0,
        max_grad_norm=None,
        dqda_clipping=bound,
        v_min=-3.0,
        v_max=3.0,
        engine=engine,
        target_update_interval=3,
    )
    for network in (model.actor, model.critic):  # online and target networks differ
        for parameter in network.parameters():
            parameter.data.add_(0.1)
    weights = th.linspace(0.1, 1.0, 16)[:, None]
    batch = transitions(16, weights=weights, dones=(th.arange(16) % 3 == 0).float()[:, None])
    with model._updates():
        for _ in range(2):
            atoms = th.linspace(-3, 3, 7)
            logits = model.critic_target.outputs(batch.next_observations, model.actor_target(batch.next_observations))
            returns = (0.25 + 0.9 * (1 - batch.dones) * atoms).clip(-3, 3)[:, None]  # (B, 1, 7)
            kernel = (1 - (returns - atoms[:, None]).abs()).clip(0, 1)
            target = (kernel * logits.softmax(dim=1)[:, None]).sum(dim=2).detach()
            losses = -(target * model.critic.outputs(batch.observations, batch.actions).log_softmax(dim=1)).sum(dim=1)
            loss = (weights[:, 0] * losses).mean()
            critic_step = th.autograd.grad(loss, list(model.critic.parameters()))
            before = flat(model.actor), model.critic.qf0[0].weight.clone()
            outputs = model._engine.run(model._update, batch, False)
            np.testing.assert_allclose(outputs["td_errors"][:, 0], losses.detach(), atol=1e-5)  # without the weights
            assert outputs["critic_loss"].item() == pytest.approx(loss.item(), abs=1e-5)
            moved = before[1] - model.critic.qf0[0].weight
            th.testing.assert_close(moved, critic_step[0], rtol=1e-4, atol=1e-6)

            after = flat(model.actor)
            restored = after.split([parameter.numel() for parameter in model.actor.parameters()])
            for parameter, old in zip(
                model.actor.parameters(), before[0].split([len(part) for part in restored]), strict=True
            ):
                parameter.data.copy_(old.view_as(parameter))
            actions = model.actor(batch.observations)
            q = model.critic.q1_forward(batch.observations, actions)
            (slopes,) = th.autograd.grad(q.sum(), actions, retain_graph=True)
            if bound is not None:
                assert (slopes.norm(dim=1) > bound).all()
                slopes = bound * slopes / slopes.norm(dim=1, keepdim=True)
            gradients = th.autograd.grad(actions, list(model.actor.parameters()), slopes / 16)
            expected = before[0] + th.cat([gradient.flatten() for gradient in gradients])
            th.testing.assert_close(after, expected, rtol=1e-4, atol=1e-6)
            nn.utils.vector_to_parameters(after, model.actor.parameters())


@pytest.mark.parametrize("interval", [1, 3])
@engine_on_and_off
def test_targets_are_copied_every_so_many_updates_of_the_whole_training(interval: int, engine: bool) -> None:
    model = small_model("d4pg", target_update_interval=interval, engine=engine).learn(12)
    for _ in range(7):
        before = flat(model.critic_target), flat(model.actor_target)
        model.train(1, 8)
        after = flat(model.critic_target), flat(model.actor_target)
        if model._n_updates % interval == 0:
            assert th.equal(after[0], flat(model.critic)) and th.equal(after[1], flat(model.actor))
        else:
            assert all(map(th.equal, before, after))


def test_importance_weights_act() -> None:
    """Two models that differ by them alone depart from each other."""
    trained = [small_model("d4pg", replay_buffer_kwargs={"beta_start": beta, "beta_end": beta}) for beta in (0.0, 1.0)]
    actors = [flat(model.learn(40).critic) for model in trained]
    assert not th.allclose(*actors, atol=1e-3)


# The range of values


def test_range_follows_from_usual_and_rare_rewards() -> None:
    rewards = np.concatenate([np.linspace(-1, 2, 1001), [-100.0], [50.0]])
    v_min, v_max = automatic_range(rewards, 0.9)
    low, high = np.quantile(rewards, [0.05, 0.95])
    assert (v_min, v_max) == pytest.approx((10 * low - 100, 10 * high + 50))
    assert automatic_range(np.full(50, -1.0), 0.99) == pytest.approx((-101, 0))  # as of goals that were never reached
    assert automatic_range(np.zeros(50), 0.9) == pytest.approx((-10, 10))


def test_automatic_range_is_fixed_at_the_first_update_logged_and_saved(tmp_path: Path) -> None:
    model = small_model("d4pg", learning_starts=20)
    assert model.value_range is None
    model.learn(21)
    found = model.value_range
    assert found == automatic_range(model.replay_buffer.rewards[:21], model.gamma)
    model.replay_buffer.rewards[:] = 1e3
    model.learn(5, reset_num_timesteps=False)
    assert model.value_range == found
    assert [model.logger.name_to_value[f"train/{name}"] for name in ("v_min", "v_max")] == [*found]
    for critic in (model.critic, model.critic_target):
        np.testing.assert_allclose(critic.atoms, np.linspace(*found, 51), rtol=1e-5, atol=1e-4)
    model.save(tmp_path / "model")
    loaded = D4PG.load(tmp_path / "model")
    assert loaded.value_range == found
    assert th.equal(loaded.critic.atoms, model.critic.atoms)
    assert D4PG.load(tmp_path / "model", v_max=500.0).value_range == (found[0], 500.0)


def test_range_is_that_of_normalised_rewards() -> None:
    env = VecNormalize(make_vec_env(lambda: TimeLimit(ScriptedEnv(length=50), 50)), clip_reward=5.0)
    model = D4PG("MlpPolicy", env, learning_starts=30, batch_size=4, buffer_size=100, policy_kwargs={"net_arch": [4]})
    model.learn(31)
    expected = automatic_range(env.normalize_reward(model.replay_buffer.rewards[:31]), 0.99)
    assert model.value_range == pytest.approx(expected, rel=0.2)  # the statistics are a step older
    assert model.value_range[1] < automatic_range(model.replay_buffer.rewards[:31], 0.99)[1] / 2


def test_clipped_mass_is_what_lies_beyond_the_atoms_and_is_warned_of_once() -> None:
    model, _ = categorical((0.0, 4.0))
    batch = transitions(rewards=th.tensor([[1.5]]), discounts=th.tensor([[1.0]]))
    _, clipped = model._categorical_target(batch)
    assert clipped.item() == pytest.approx(0.3)  # of 4.5 and 5.5
    model.set_logger(Logger(None, []))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for mass, updates in ((0.04, 3000), (0.5, 10), (0.1, 1000), (0.9, 1000)):
            model.logger.record("train/clipped_mass", mass)
            model._record_range(updates)
            assert len(found) == (mass in (0.1, 0.9))
    assert r"10% of the returns' probability lies outside of [v_min, v_max] = [0, 4]" in str(found[0].message)


def test_the_largest_return_itself_is_not_beyond_the_atoms() -> None:
    powers = th.as_tensor(0.98 ** np.arange(6, dtype=np.float32))  # as the buffer has them
    rewards, discounts = powers[:5].sum().reshape(1, 1), powers[5:, None]
    model, _ = categorical((0.0, 50.0))
    _, clipped = model._categorical_target(transitions(rewards=rewards, discounts=discounts))
    assert (rewards + 50 * discounts).item() > 50  # by rounding: 1 / (1 - 0.98) is the largest return
    assert clipped.item() == 0


# The replay buffer


def test_replay_is_prioritised_unless_another_buffer_is_asked_for() -> None:
    env = BitFlippingEnv(n_bits=3, continuous=True)
    dicts: dict[str, Any] = {"policy": "MultiInputPolicy", "env": env}
    her = {"replay_buffer_class": HerReplayBuffer, **dicts}
    for arguments, kind, n_steps in (
        ({}, PrioritizedReplayBuffer, 5),
        ({"prioritized": False}, NStepReplayBuffer, 5),
        ({"replay_buffer_class": ReplayBuffer, "n_steps": 1}, ReplayBuffer, 1),
        ({"replay_buffer_class": NStepReplayBuffer}, NStepReplayBuffer, 5),
        (dicts, PrioritizedDictReplayBuffer, 5),
        (her, HerReplayBuffer, 1),
        ({**her, "replay_buffer_class": PrioritizedHerReplayBuffer}, PrioritizedHerReplayBuffer, 1),
        ({"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}, None, 1),
    ):
        model = small_model("d4pg", **arguments)
        assert model.n_steps == n_steps
        assert type(model.replay_buffer) is (kind or PrioritizedReplayBuffer)
        assert getattr(model.replay_buffer, "n_steps", 1) == n_steps
    with pytest.raises(NotImplementedError, match="HerReplayBuffer sums no rewards: n_steps must be 1, got 3"):
        small_model("d4pg", **her, n_steps=3)


def test_priorities_are_switched_off_and_on_by_load(tmp_path: Path) -> None:
    small_model("d4pg").save(tmp_path / "with")
    model = D4PG.load(tmp_path / "with", prioritized=False)
    assert type(model.replay_buffer) is NStepReplayBuffer
    model.save(tmp_path / "without")
    assert type(D4PG.load(tmp_path / "without").replay_buffer) is NStepReplayBuffer
    assert type(D4PG.load(tmp_path / "without", prioritized=True).replay_buffer) is PrioritizedReplayBuffer


def test_number_of_steps_is_that_of_load_where_the_file_has_the_buffer(tmp_path: Path) -> None:
    small_model("d4pg").learn(15).save(tmp_path / "model", include=["replay_buffer"])
    for n_steps, expected in ((2, 2), (None, 5)):
        loaded = D4PG.load(tmp_path / "model", n_steps=n_steps)
        assert loaded.n_steps == loaded.replay_buffer.n_steps == expected
        assert loaded.replay_buffer.size() == 15


# What is refused


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_rewards_that_are_not_finite_before_the_first_update(wrong: float) -> None:
    model = small_model("d4pg").learn(5)
    model.replay_buffer.rewards[2] = wrong
    with pytest.raises(NonFiniteError, match="environment 0 gave a non-finite reward"):
        model.train(1, 4)


@pytest.mark.parametrize("engine", [True, False])
def test_rewards_that_are_not_finite(engine: bool) -> None:
    model = small_model("d4pg", v_min=-10, v_max=10, engine=engine).learn(15)
    model.replay_buffer.rewards[:] = math.nan
    with pytest.raises(NonFiniteError, match="the parameters of the critic became non-finite"):
        model.train(1, 4)


@pytest.mark.parametrize("ends", [(1.0, -1.0), (math.nan, 1.0)])
def test_a_range_that_is_none_is_refused_when_it_acts(ends: tuple[float, float]) -> None:
    model = small_model("d4pg").learn(15)
    model.v_min, model.v_max = ends
    with pytest.raises(ValueError, match="v_min must be less than v_max, got v_min="):
        model.train(1, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"v_min": 1.0, "v_max": 1.0}, "v_min must be less than v_max, got v_min=1.0 and v_max=1.0"),
        (
            {"v_min": 1e6, "v_max": 1e6 + 1},
            "so much less than v_max that float32 has 51 atoms between them, got v_min=1000000.0",
        ),
        ({"v_min": -1e30}, r"v_min must be a number in \[-1000000000000.0, 1000000000000.0\].*, got -1e"),
        ({"v_min": "low"}, r"v_min must be a number in \[.*\],? or 'auto', got 'low'"),
        ({"gamma": 1.0}, "need gamma < 1, got gamma=1.0: give both as numbers"),
        ({"n_steps": 0}, "n_steps must be an integer >= 1 or None, got 0"),
        ({"buffer_size": 4}, r"buffer_size must be at least n_steps \* n_envs = 5, got 4"),
        ({"replay_buffer_kwargs": {"alpha": 1.5}}, r"alpha.* must be a number in \[0, 1\], got 1.5"),
        ({"replay_buffer_kwargs": {"n_steps": 2}, "n_steps": 3}, r"replay_buffer_kwargs\['n_steps'\] must be n_steps"),
        ({"distribution": "gaussian"}, "distribution must be one of 'categorical', 'mixture', got 'gaussian'"),
        ({"distribution": "mixture", "v_min": 0.0}, "v_min=0.0 needs distribution='categorical', got distribution='mixture'"),
        ({"n_target_samples": 3}, "n_target_samples=3 needs distribution='mixture'"),
        ({"target_update_interval": 0}, "target_update_interval must be an integer >= 1, got 0"),
        ({"dqda_clipping": 0.0}, "dqda_clipping must be a number >= 1e-12 or None, got 0"),
        ({"prioritized": np.ones(2)}, "prioritized must be True or False, got array"),
        ({"distribution": np.ones(2)}, "distribution must be one of 'categorical', 'mixture', got array"),
        ({"policy_kwargs": {"n_atoms": 1}}, r"policy_kwargs\['n_atoms'\] must be an integer >= 2, got 1"),
        ({"policy_kwargs": {"n_critics": 2}}, r"policy_kwargs\['n_critics'\] must be 1, got 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model("d4pg", **arguments)


@pytest.mark.parametrize("end", [-1e12, -1e3, 1e3, 1e12])
@pytest.mark.parametrize("name", ["v_min", "v_max"])
def test_the_automatic_end_makes_room_for_the_given_one(name: str, end: float) -> None:
    model = small_model("d4pg", **{name: end}).learn(15)
    low, high = automatic_range(model.replay_buffer.rewards[:11], model.gamma)
    v_min, v_max = model.value_range
    assert (v_min if name == "v_min" else v_max) == end
    assert v_min <= max(low, end) and v_max >= min(high, end)
    assert (np.diff(model.critic.atoms) > 0).all()


# The picture


@pytest.mark.parametrize("variant", ["mlp", "mixture"])
def test_plot_of_values(variant: str) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    model = small_model("d4pg", variant).learn(15)
    observations = np.stack([BOX.sample() for _ in range(3)])
    axes = plot_values(model, observations)
    obs = th.as_tensor(observations)
    with th.no_grad():
        (means,) = model.critic(obs, model.actor(obs))
    distributions, lines = axes.lines[::2], axes.lines[1::2]
    assert [line.get_xdata()[0] for line in lines] == pytest.approx(means[:, 0].tolist(), rel=1e-5)
    for line, mean in zip(distributions, means[:, 0].tolist(), strict=True):
        returns, heights = line.get_data()
        step = returns[1] - returns[0] if variant == "mixture" else 1.0
        assert np.sum(heights) * step == pytest.approx(1, abs=1e-2)
        assert np.sum(returns * heights) * step == pytest.approx(mean, abs=0.05 * float(np.ptp(returns)))
    assert axes.get_ylabel() == ("density" if variant == "mixture" else "probability")
    again = plot_values(model, observations[0], np.zeros(2), axes)
    assert again is axes and len(axes.lines) == 8
    assert len(plot_values(model, observations, np.zeros(2)).lines) == 6  # one action for all
    plt.close("all")


def test_networks_are_as_asked_for() -> None:
    env = TimeLimit(RandomEnv(BOX, CONTINUOUS), 9)
    model = D4PG("MlpPolicy", env, policy_kwargs={"net_arch": {"pi": [3], "qf": [5, 4]}, "activation_fn": nn.Tanh})
    assert [layer.out_features for layer in model.critic.qf0 if isinstance(layer, nn.Linear)] == [5, 4, 51]
    assert isinstance(model.critic.qf0[1], nn.Tanh)
