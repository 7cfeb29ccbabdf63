"""Functions of distributional critics against numbers by hand, sums written out, and PyTorch's distributions."""

import math
from typing import Any

import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal, kl_divergence

from sb3_ac_ext.engine.recording import Replay
from sb3_ac_ext.engine.tape import Tape
from sb3_ac_ext.functional.categorical import (
    clipped_to_norm,
    cross_entropy,
    entropy,
    expected_value,
    mixture_loss,
    mixture_mean,
    mixture_samples,
    projection,
)
from sb3_ac_ext.functional.gumbel import gumbel_noise
from sb3_ac_ext.functional.losses import td_target


def row(*values: float) -> th.Tensor:
    return th.tensor([values], dtype=th.float64)


def scalar(value: float) -> th.Tensor:
    return th.tensor([[value]], dtype=th.float64)


def close(value: th.Tensor, *expected: float) -> None:
    th.testing.assert_close(value.detach(), row(*expected), rtol=0, atol=2e-8)


def gradients(value: th.Tensor, *inputs: th.Tensor) -> Any:
    return th.autograd.grad(value.sum(), inputs)


ATOMS = th.arange(5, dtype=th.float64)
WIDE = th.arange(-10, 11, 5, dtype=th.float64)
PROBS = row(0.1, 0.2, 0.4, 0.2, 0.1)

# Projection


@pytest.mark.parametrize(
    ("atoms", "reward", "discount", "expected"),
    [
        (ATOMS, 0.25, 0.9, (0.075, 0.195, 0.42, 0.225, 0.085)),
        (WIDE, 5.23, 0.729, (0, 0.0412, 0.1954, 0.49, 0.2734)),
        (WIDE, 5.23, 0.0, (0, 0, 0, 0.954, 0.046)),
        (WIDE, 5.23, 0.9, (0, 0.0754, 0.1954, 0.4216, 0.3076)),
        (ATOMS, 100.0, 0.9, (0, 0, 0, 0, 1)),
        (ATOMS, -100.0, 0.9, (1, 0, 0, 0, 0)),
        (ATOMS, 0.0, 1.0, tuple(PROBS[0].tolist())),
        (ATOMS, 2.0, 0.0, (0, 0, 1, 0, 0)),
    ],
    ids=["one step", "three steps", "terminated", "gamma, not its cube", "above", "below", "itself", "on an atom"],
)
def test_projection_by_hand(atoms: th.Tensor, reward: float, discount: float, expected: tuple[float, ...]) -> None:
    close(projection(PROBS, atoms, scalar(reward), scalar(discount)), *expected)


@st.composite
def distributions(draw: st.DrawFn) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
    """Rows of probabilities, atoms, rewards, discounts."""
    size, batch = draw(st.integers(2, 9)), draw(st.integers(1, 4))
    low = draw(st.floats(-100, 100))
    atoms = th.linspace(low, low + draw(st.floats(0.1, 200)), size, dtype=th.float64)
    masses = draw(st.lists(st.lists(st.floats(0, 1), min_size=size, max_size=size), min_size=batch, max_size=batch))
    probs = th.tensor(masses, dtype=th.float64) + 1e-3
    numbers = st.lists(st.floats(-300, 300), min_size=batch, max_size=batch)
    rewards = th.tensor(draw(numbers), dtype=th.float64)[:, None]
    discounts = th.tensor(draw(st.lists(st.floats(0, 1), min_size=batch, max_size=batch)), dtype=th.float64)[:, None]
    return probs / probs.sum(dim=1, keepdim=True), atoms, rewards, discounts


@given(distributions())
def test_projection_by_its_kernel(given_: tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]) -> None:
    probs, atoms, reward, discount = given_
    result = projection(probs, atoms, reward, discount)
    moved = (reward + discount * atoms).clamp(atoms[0], atoms[-1])
    kernel = (1 - (moved[:, :, None] - atoms).abs() / (atoms[1] - atoms[0])).clamp(0, 1)  # (B, from, to)
    th.testing.assert_close(result, (probs[:, :, None] * kernel).sum(dim=1), rtol=0, atol=1e-9)
    th.testing.assert_close(result.sum(dim=1), th.ones(len(probs), dtype=th.float64), rtol=0, atol=1e-12)
    assert (result >= 0).all()


@given(distributions(), st.floats(0, 1))
def test_projection_keeps_the_mean(given_: tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor], share: float) -> None:
    """Where nothing is clipped."""
    probs, atoms, _, discount = given_
    room = (1 - discount) * (atoms[-1] - atoms[0])
    reward = atoms[0] * (1 - discount) + share * room
    result = projection(probs, atoms, reward, discount)
    mean = reward + discount * (probs * atoms).sum(dim=1, keepdim=True)
    th.testing.assert_close((result * atoms).sum(dim=1, keepdim=True), mean, rtol=0, atol=1e-9)


def test_no_mass_is_lost_in_float32() -> None:
    """Atoms that lie on atoms: what is floor and what is ceiling there is up to rounding."""
    atoms = th.linspace(-150, 150, 51)
    probs = th.full((200, 51), 1 / 51)
    rewards = th.linspace(-300, 300, 200)[:, None]
    for discount in (0.0, 0.5, 0.99, 1.0):
        result = projection(probs, atoms, rewards, th.full((200, 1), discount))
        th.testing.assert_close(result.sum(dim=1), th.ones(200), rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_is_no_atom(wrong: float) -> None:
    discounts = scalar(0.9) if math.isnan(wrong) else scalar(wrong)  # inf times the atom 0 is NaN
    result = projection(th.cat([PROBS, PROBS]), ATOMS, th.cat([scalar(wrong), scalar(0.25)]), th.cat([discounts, scalar(0.9)]))
    assert result[0].isnan().any()
    close(result[1:], 0.075, 0.195, 0.42, 0.225, 0.085)


# Cross-entropy and value


def test_categorical_critic_by_hand() -> None:
    target = projection(PROBS, ATOMS, scalar(0.25), scalar(0.9))
    logits = row(0.3, -0.2, 0.1, 0, -0.4).requires_grad_()
    loss, value = cross_entropy(logits, target), expected_value(logits, ATOMS)
    close(loss, 1.60669101)
    close(loss - entropy(target), 0.18413718)
    close(gradients(loss, logits)[0], 0.19802525, -0.02940182, -0.19646583, -0.02273792, 0.05058033)
    close(value, 1.76177405)
    close(gradients(value, logits)[0], -0.4810088, -0.1261484, 0.05325164, 0.25044615, 0.3034594)


def test_divergence_is_pytorchs() -> None:
    logits, other = th.randn(2, 7, 11, dtype=th.float64).unbind()
    target = other.softmax(dim=1)
    divergence = kl_divergence(Categorical(logits=other), Categorical(logits=logits))
    th.testing.assert_close((cross_entropy(logits, target) - entropy(target))[:, 0], divergence)
    th.testing.assert_close(cross_entropy(other, target), entropy(target))


def test_probabilities_that_underflow() -> None:
    """exp(-200) is 0 in float32."""
    logits = th.tensor([[0.0, -200.0]], requires_grad=True)
    target = th.tensor([[0.0, 1.0]])
    loss = cross_entropy(logits, target)
    assert loss.item() == 200 and entropy(target).item() == 0
    assert gradients(loss, logits)[0].tolist() == [[1, -1]]


# Mixtures


def test_mixture_by_hand() -> None:
    logits, means = row(0.2, -0.1).requires_grad_(), row(1, 2).requires_grad_()
    log_stds = row(0.5, 1).log().requires_grad_()
    samples = row(0.8, 1.5, 2.5)
    loss, value = mixture_loss(logits, means, log_stds.exp(), samples), mixture_mean(logits, means)
    close(loss, 1.13188773)
    of_logits, of_means, of_log_stds = gradients(loss, logits, means, log_stds)
    close(of_logits, 0.06802092, -0.06802092)
    close(of_means, -0.2758395, -0.03746172)
    close(of_log_stds, 0.14660156, 0.30536859)
    close(value, 1.42555748)
    of_logits, of_means = gradients(value, logits, means)
    close(of_logits, -0.24445831, 0.24445831)
    close(of_means, 0.57444252, 0.42555748)
    assert td_target(scalar(5.23), scalar(0), scalar(0.729), samples).tolist()[0] == pytest.approx([5.8132, 6.3235, 7.0525])
    assert td_target(scalar(5.23), scalar(1), scalar(0.729), samples).tolist()[0] == [5.23, 5.23, 5.23]


def test_one_component_is_a_gaussian() -> None:
    samples = row(0.8, 1.5, 2.5)
    loss = mixture_loss(row(7), row(1.3), row(0.5), samples)
    close(loss, 1.37912469)
    by_hand = ((samples - 1.3) ** 2 / (2 * 0.5**2)).mean() + math.log(0.5 * math.sqrt(2 * math.pi))
    th.testing.assert_close(loss, by_hand[None, None])


def test_loss_far_from_all_components() -> None:
    """Where each density is 0 in float32."""
    loss = mixture_loss(th.zeros(1, 2), th.zeros(1, 2), th.full((1, 2), 1e-3), th.ones(1, 1))
    assert loss.item() == pytest.approx(5e5, rel=1e-4)


def test_samples_have_the_mixtures_moments() -> None:
    th.manual_seed(0)
    logits, means, stds = row(0.5, -1, 0.2), row(-3, 0, 4), row(0.1, 1, 2)
    draws = 200_000
    noise = gumbel_noise(th.zeros(1, draws, 3, dtype=th.float64)), th.randn(1, draws, dtype=th.float64)
    samples = mixture_samples(logits, means, stds, *noise)
    weights = logits.softmax(dim=1)
    mean = mixture_mean(logits, means)
    variance = (weights * (stds**2 + means**2)).sum() - mean**2
    assert samples.mean().item() == pytest.approx(mean.item(), abs=5 * math.sqrt(variance.item() / draws))
    assert samples.var().item() == pytest.approx(variance.item(), rel=0.02)
    share = (Normal(0.0, 1.0).cdf((-2.5 - means) / stds) * weights).sum()  # nearly all of the first component
    assert (samples < -2.5).double().mean().item() == pytest.approx(share.item(), abs=0.01)


# Gradients by the action


@pytest.mark.parametrize(
    ("gradient", "clipped"), [((3, 4), (0.6, 0.8)), ((0.3, 0.4), (0.3, 0.4)), ((0, 0), (0, 0)), ((-1e20, 0), (-1, 0))], ids=str
)
def test_clipping_by_hand(gradient: tuple[float, ...], clipped: tuple[float, ...]) -> None:
    close(clipped_to_norm(row(*gradient), 1.0), *clipped)


def test_each_sample_is_clipped_by_itself() -> None:
    gradients_ = th.tensor([[3.0, 4.0], [0.3, 0.4]])
    th.testing.assert_close(clipped_to_norm(gradients_, 0.5), th.tensor([[0.3, 0.4], [0.3, 0.4]]))


# Recorded


def test_recordings_give_the_functions_bits() -> None:
    """Losses, values and gradients as the updates of a critic have them."""
    atoms = th.linspace(-3, 3, 7)
    inputs = {"logits": th.zeros(4, 7), "probs": th.zeros(4, 7), "samples": th.zeros(4, 3), "action": th.zeros(4, 2)}
    columns = {"reward": th.zeros(4, 1), "discount": th.zeros(4, 1)}

    def drawn(seed: int) -> None:
        generator = th.Generator().manual_seed(seed)
        for value in [*inputs.values(), *columns.values()]:
            value.copy_(th.randn(value.shape, generator=generator))
        inputs["probs"].copy_(inputs["probs"].softmax(dim=1))
        columns["discount"].abs_().clamp_(max=1)

    def function() -> dict[str, th.Tensor]:
        logits = inputs["logits"].detach().requires_grad_()
        with th.no_grad():
            target = projection(inputs["probs"], atoms, columns["reward"], columns["discount"])
        loss = cross_entropy(logits, target) - entropy(target)
        value = expected_value(logits, atoms)
        means, stds = logits[:, :3], logits[:, 3:6].exp()
        mixture = mixture_loss(logits[:, 4:], means, stds, inputs["samples"])
        samples = mixture_samples(logits[:, 4:], means, stds, logits[:, None, :3] * inputs["samples"][:, :, None], means)
        total = (loss + value + mixture + mixture_mean(logits[:, 4:], means)).mean()
        return {
            "target": target,
            "loss": loss,
            "mixture": mixture,
            "samples": samples,
            "clipped": clipped_to_norm(inputs["action"], 1.0),
            "gradient": th.autograd.grad(total, logits)[0],
        }

    drawn(0)
    tape = Tape([*inputs.values(), *columns.values(), atoms])
    with tape.recording():
        outputs = {name: value.detach() for name, value in function().items()}
    replay = Replay(tape, outputs, False)
    for seed in range(3):
        drawn(seed)
        replay()
        for name, expected in function().items():
            assert th.equal(outputs[name], expected.detach()), (name, seed)
