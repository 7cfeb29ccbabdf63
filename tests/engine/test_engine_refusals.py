"""What a list of operations cannot do again is refused, without a trace: everything is as if the function had run once."""

import contextlib
import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from owners import Batch, Learner, Values, assert_in_step, assert_same, numbers, random_state, seed_everything
from torch import nn
from torch.utils.checkpoint import checkpoint

Term = Callable[[th.Tensor], Any]
"""Something that the loss depends on, of inputs ``(5, 3)``."""

HIDDEN = {"number": 1.0, "tensor": th.ones(()), "array": np.ones(3, np.float32)}
"""What the functions below read and nobody watches; a test changes it."""


def made(term: Term) -> Callable[[Learner, Batch], th.Tensor]:
    """The loss of a learner in which the term matters."""

    def loss(learner: Learner, batch: Batch) -> th.Tensor:
        x, y = batch
        return F.mse_loss(learner.net(x), y + term(x))

    return loss


def branches(x: th.Tensor) -> th.Tensor:
    return x.sum() if x.sum() > 0 else x.mean()


def grows(x: th.Tensor) -> th.Tensor:
    while x.abs().amax() < 3:
        x = x * 1.5
    return x.mean()


def asserted(x: th.Tensor) -> th.Tensor:
    assert (x > -100).all()
    return x.mean()


def spoken(x: th.Tensor) -> float:
    return float(f"{x.mean():.3f}")


VALUES: dict[str, Term] = {
    "item": lambda x: x.mean().item(),
    "float": lambda x: float(x.mean()),
    "int": lambda x: int(10 * x.mean()) / 10,
    "complex": lambda x: complex(x.mean()).real,
    "tolist": lambda x: x.tolist()[0][0],
    "numpy": lambda x: float(x.numpy().mean()),
    "array": lambda x: float(np.asarray(x).mean()),
    "dlpack": lambda x: float(np.from_dlpack(x).mean()),
    "storage": lambda x: x.untyped_storage().tolist()[0] / 100,
    "tensor of tensors": lambda x: th.tensor([x.mean(), x.amax()]).sum(),
    "new tensor": lambda x: x.new_tensor([x.mean(), 1.0]).sum(),
    "old constructor": lambda x: th.Tensor([x.mean(), 1.0]).sum(),
    "format": spoken,
    "text": lambda x: float(str(x[0, 0])[7:12]),
    "deepcopy": lambda x: copy.deepcopy(x).mean(),
    "if": branches,
    "while": grows,
    "assert": asserted,
    "sorted": lambda x: sorted(x[:, 0])[1],  # type: ignore[type-var]
    "in": lambda x: float(0.5 in x.round(decimals=1)),
    "equal": lambda x: float(th.equal(x, x.round())),
    "is_nonzero": lambda x: float(th.is_nonzero((x[0, 0] > 0).long())),
    "mask": lambda x: x[x > 0].sum(),
    "sparse": lambda x: th.sparse.sum(x.clamp(min=0).to_sparse()),
    "masked_select": lambda x: x.masked_select(x > 0).sum(),
    "where": lambda x: len(th.where(x > 0)[0]) / 10,
    "unique": lambda x: x.round().unique().sum(),
    "one_hot": lambda x: F.one_hot(x[:, 0].abs().long()).shape[1] / 10,
    "repeat_interleave": lambda x: x.repeat_interleave(x[:, 0].abs().long(), dim=0).sum(),
    "index": lambda x: x[int(x.sum(dim=1).argmax())].sum(),
    "index of a list": lambda x: [0.1, 0.2, 0.3, 0.4, 0.5][x.sum(dim=1).argmax()],  # type: ignore[call-overload]
    "shape": lambda x: th.ones(x.sum(dim=1).argmax() + 1).sum() / 10,  # type: ignore[call-overload]
    "distribution with own check": lambda x: th.distributions.Normal(x, 1.0).log_prob(x).sum() if x.isfinite().all() else 0.0,
}
"""Values of the inputs, read by Python."""

REFUSED_OR_FOLLOWED: dict[str, Term] = {
    "alpha": lambda x: x.add(x, alpha=x.mean()).sum(),  # type: ignore[arg-type]
    "standard deviation": lambda x: th.empty(3).normal_(0, x.std()).sum(),  # type: ignore[arg-type]
    "delta": lambda x: F.huber_loss(x, x * 2, delta=x.abs().mean()),  # type: ignore[arg-type]
    "p of dropout": lambda x: F.dropout(x, x.std().clamp(0.1, 0.9)).sum(),  # type: ignore[arg-type]
    "full": lambda x: th.full((3,), x.mean()).sum(),  # type: ignore[call-overload]
    "fill": lambda x: th.zeros(3).fill_(x.mean()).sum(),
    "clamp": lambda x: x.clamp(-x.std(), x.std()).sum(),
    "lerp": lambda x: x.lerp(2 * x, x.mean()).sum(),
    "power": lambda x: (x.abs() ** x.std()).sum(),
    "arange": lambda x: th.arange(x.abs().amax()).sum(),  # type: ignore[call-overload]
    "linspace": lambda x: th.linspace(0, x.mean(), 3).sum(),
    "masked assignment": lambda x: x.clone().index_put((x > 0,), th.zeros(())).sum(),
    "multinomial": lambda x: x.flatten()[x.flatten().softmax(0).multinomial(2)].sum(),
    "index tensor": lambda x: x[x.argmax(dim=0)].sum(),
    "gather": lambda x: x.gather(1, x.argmax(dim=1, keepdim=True)).sum(),
    "sort": lambda x: x.sort(dim=0).values[0].sum(),
    "len and shape": lambda x: x.sum() / len(x) / x.shape[1] / x.numel(),
    "attribute": lambda x: x.sum() if not x.requires_grad and x.dim() == 2 and x.device.type == "cpu" else 0.0,
    "one_hot of n": lambda x: (F.one_hot(x.argmax(dim=1), 3) * x).sum(),
    "categorical": lambda x: th.distributions.Categorical(logits=x).entropy().sum(),
    "generator": lambda x: th.zeros(3).normal_(generator=GENERATOR).sum(),
    "array that is shared": lambda x: (x * th.from_numpy(HIDDEN["array"])).sum(),
    "array as a tensor that is shared": lambda x: th.as_tensor(HIDDEN["array"]).sum(),
}
"""Values read by operations, or by numbers that an operation takes; it may be refused or replayed, but never frozen."""

GENERATOR = th.Generator().manual_seed(0)

UNWATCHED: dict[str, Term] = {
    "tensor": lambda x: HIDDEN["tensor"],
    "data of a tensor": lambda x: HIDDEN["tensor"].data * 2,  # type: ignore[union-attr]
    "tensor that is written to": lambda x: HIDDEN["tensor"].mul_(x.mean()),  # type: ignore[union-attr]
    "tensor by default": lambda x, y=HIDDEN["tensor"]: (x * y).mean(),
}
"""Memory that nobody watches, read by operations."""

FROZEN: dict[str, Term] = {
    "numpy's generator": lambda x: np.random.rand(),
    "numpy's generator as a shared tensor": lambda x: th.as_tensor(np.random.rand(3).astype(np.float32)).sum(),
    "Python's generator": lambda x: random.random(),
    "drawn rows": lambda x: x[random.sample(range(5), 2)].sum(),
    "dropout by hand": lambda x: (x * th.tensor(np.random.rand(5, 3) > 0.5)).sum(),
    "array": lambda x: th.from_numpy(HIDDEN["array"].copy()).sum(),  # type: ignore[attr-defined]
    "array as a tensor": lambda x: th.as_tensor(HIDDEN["array"] + 1).sum(),  # type: ignore[operator]
    "number": lambda x: HIDDEN["number"],
    "number as a tensor": lambda x: th.tensor(HIDDEN["number"]),
    "seed": lambda x: th.manual_seed(int(10 * HIDDEN["number"])) and th.rand(3).sum(),
    "own generator": lambda x: th.rand(3, generator=th.Generator().manual_seed(int(10 * HIDDEN["number"]))).sum(),
    "state of the generator": lambda x: th.get_rng_state()[:64].sum() / 1000,
}
"""Python's values that are others at every call, which only a comparison can find."""


def checkpointed(learner: Learner, batch: Batch) -> th.Tensor:
    """Its dropout is drawn again in the backward pass, from a random state that is put back and forth."""
    net: Any = learner.net
    hidden: Any = checkpoint(lambda x: F.dropout(net[1](net[0](x)), 0.5), batch[0], use_reentrant=False)
    return F.mse_loss(net[2](hidden), batch[1])


def in_step(term: Term | None, atol: float | None, steps: int = 4) -> str:
    """
    Train with the engine and without it, and compare everything after each update.

    :param term: of the loss
    :param atol: largest difference; None for the same bits

    :return: what the engine says about it
    """
    loss = checkpointed if term is None else made(term)
    pair = Learner(loss=loss), Learner(loss=loss, enabled=False)
    hidden = copy.deepcopy(HIDDEN)
    try:
        states = []
        for one in pair:
            seed_everything(0)
            GENERATOR.manual_seed(0)
            own = []
            for step in range(steps):
                HIDDEN["number"] = step / 10
                HIDDEN["tensor"].fill_(step)  # type: ignore[attr-defined]
                HIDDEN["array"].fill(step)  # type: ignore[attr-defined]
                log = one.train([step])
                own.append((log, one.state(), random_state(), bytes(GENERATOR.get_state().numpy())))
            states.append(own)
    finally:
        HIDDEN.update(hidden)
    for step, (own, expected) in enumerate(zip(*states, strict=True)):
        assert own[2] == expected[2], f"random numbers were drawn twice, or not at all, in update {step}"
        assert own[3] == expected[3], f"the generator was asked twice, or not at all, in update {step}"
        assert_same(own[1], expected[1], atol)
        if atol is None:
            assert own[0] == expected[0]
        else:
            assert own[0] == pytest.approx(expected[0], rel=1e-5), step
    return str(pair[0].engine.report()["update"])


@pytest.mark.parametrize("name", VALUES)
def test_values_that_python_reads(name: str) -> None:
    """Refused where it is recorded, so that it is the same bits as without the engine."""
    assert in_step(VALUES[name], atol=None).startswith("ordinary: ")


@pytest.mark.parametrize("name", REFUSED_OR_FOLLOWED)
def test_values_that_operations_read(name: str) -> None:
    in_step(REFUSED_OR_FOLLOWED[name], atol=1e-6)


@pytest.mark.parametrize("name", UNWATCHED)
def test_memory_that_nobody_watches(name: str) -> None:
    assert "nobody watches" in in_step(UNWATCHED[name], atol=None)


@pytest.mark.parametrize("name", FROZEN)
def test_values_that_are_others_at_every_call(name: str) -> None:
    assert in_step(FROZEN[name], atol=1e-6).startswith("ordinary: ")


def test_a_checkpoint_with_dropout() -> None:
    assert in_step(None, atol=1e-6).startswith("ordinary: ")


@pytest.mark.parametrize("name", ["index tensor", "one_hot of n", "categorical", "gather", "lerp", "sort", "clamp"])
def test_what_needs_no_refusal_is_replayed(name: str) -> None:
    assert in_step(REFUSED_OR_FOLLOWED[name], atol=1e-6) == "replayed"


# What is refused after it has done something


def reads_late(learner: Learner, outputs: Values) -> None:
    assert outputs["loss"].item() < 100


def raises_late(learner: Learner, outputs: Values) -> None:
    raise ArithmeticError("too late")


class Late(Learner):
    """Something happens after networks were trained and random numbers drawn."""

    def __init__(self, late: Callable[[Learner, Values], None], **kwargs: Any) -> None:
        super().__init__(lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)), **kwargs)
        self.late = late

    def update(self, batch: Batch, delayed: bool = True) -> Values:
        outputs = super().update(batch, delayed)
        self.late(self, outputs)
        return outputs


OPTIMIZERS: dict[str, Any] = {
    "adam": th.optim.Adam,
    "amsgrad": lambda parameters: th.optim.Adam(parameters, amsgrad=True),
    "adamw": th.optim.AdamW,
    "momentum": lambda parameters: th.optim.SGD(parameters, momentum=0.9),
    "rmsprop": th.optim.RMSprop,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("late", [reads_late, raises_late], ids=["value", "exception"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_late_refusal_leaves_no_trace(late: Any, optimizer: str, steps_before: int) -> None:
    """Of the engine's; what the function did before it failed is done, as without the engine."""
    results = []
    for enabled in (True, False):
        own = Late(late, optimizer=OPTIMIZERS[optimizer], enabled=enabled)
        for step in range(steps_before):  # the optimizer has a state already
            own.optimizer.zero_grad()
            own.loss(own, own.batch(step)).backward()
            own.optimizer.step()
        states = []
        for step in range(4):
            if late is raises_late:
                with pytest.raises(ArithmeticError, match="too late"):
                    own.train([step])
                log = own.engine.end()
            else:
                log = own.train([step])
            gradients = {name: p.grad for name, p in own.net.named_parameters()}
            states.append((log, own.state(), gradients, random_state()))
        results.append(states)
    for mine, expected in zip(*results, strict=True):
        assert mine[0] == expected[0]
        assert_same(mine[1], expected[1])
        assert_same(mine[2], expected[2])
        assert mine[3] == expected[3]


class Recurrent(nn.Module):
    """Its operation keeps for the backward pass what a replay, which has none, does not make."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 2, batch_first=True)

    def forward(self, x: th.Tensor) -> th.Tensor:
        result: th.Tensor = self.layer(x.unsqueeze(1))[0][:, 0]
        return result


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_replay_that_fails_leaves_no_trace(optimizer: str) -> None:
    own = assert_in_step(lambda enabled: Learner(Recurrent, OPTIMIZERS[optimizer], enabled=enabled), 4, None)
    assert own.engine.report()["update"].startswith("ordinary: ")


class Failing(Learner):
    """Raises what it is told to."""

    error: type[BaseException] | None = None

    def update(self, batch: Batch, delayed: bool = True) -> Values:
        outputs = super().update(batch, delayed)
        if self.error is not None:
            raise self.error
        return outputs


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [0, 1, 2, 5])
def test_an_exception_among_updates(failing: int, error: type[BaseException]) -> None:
    """Where it would be recorded, verified and replayed; then it goes on."""
    ours, theirs = Failing(), Failing(enabled=False)
    for step in range(8):
        for one in (ours, theirs):
            one.error = error if step == failing else None
            with pytest.raises(error) if step == failing else contextlib.nullcontext():
                one.train([step])
        if error is KeyboardInterrupt and step == failing:
            theirs.copy_from(ours)  # an interrupted update is done in part
    assert th._C._len_torch_dispatch_stack() == th._C._len_torch_function_stack() == 0
    assert_same(ours.state(), theirs.state(), 1e-6)


# Batches


CHANGES: dict[str, Callable[[th.Tensor], Any]] = {
    "method": lambda x: x.mul_(2).add_(1),
    "method, again and again": lambda x: x.clamp_(-0.5, 0.5),
    "by name": lambda x: th.clamp(x, -0.5, 0.5, out=x),
    "list": lambda x: th._foreach_clamp_max_([x, x[0]], 0.4),  # type: ignore[attr-defined]
    "view": lambda x: x[1].zero_(),
    "item": lambda x: x.__setitem__((0, 0), 0.0),
    "random numbers": lambda x: x.normal_(),
    "statistics": lambda x: F.batch_norm(x * 2, x[0], x[1], training=True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_batches_that_are_changed(name: str) -> None:
    """They are the caller's: what the function does to them is done once, and is seen."""

    class InPlace(Learner):
        def update(self, batch: Batch, delayed: bool = True) -> Values:
            CHANGES[name](batch[0])
            return super().update(batch, delayed)

    ours, theirs = InPlace(), InPlace(enabled=False)
    for step in range(5):
        batches = ours.batch(step), theirs.batch(step)
        for one, batch in zip((ours, theirs), batches, strict=True):
            th.manual_seed(step)
            one.engine.begin()
            one.engine.run(one.update, batch)
            one.engine.end()
        assert_same(ours.state(), theirs.state(), 1e-6)
        assert_same({"x": batches[0][0]}, {"x": batches[1][0]}, 1e-6)


class Nested(Learner):
    """Takes batches of any kind."""

    def total(self, batch: tuple[Any, ...]) -> Values:
        return {
            "total": th.stack([part.sum().float() for part in th.utils._pytree.tree_leaves(batch) if th.is_tensor(part)]).sum()
        }


@pytest.mark.parametrize(
    "batch",
    [
        lambda i: (numbers(i, 3), None, "text", 3),
        lambda i: ({"a": numbers(i, 3), "b": numbers(i, 2)}, numbers(i, 1)),
        lambda i: (numbers(i, 3).numpy(), {"a": numbers(i, 2).double().numpy()}),
        lambda i: (numbers(i, 3).numpy()[::-1].astype(np.int64), numbers(i, 4).numpy() > 0),
        lambda i: (numbers(i, 3, 4).t(), numbers(i, 1).expand(5), numbers(i, 8)[::2]),
        lambda i: (np.asfortranarray(numbers(i, 3, 4).numpy()), numbers(i, 5, 4).numpy()[::2, 1:3]),
        lambda i: (numbers(i, 0, 3), numbers(i, 2)),
        lambda i: (numbers(i, 3), np.float32(i)),
        lambda i: (numbers(i, 3).requires_grad_(), nn.Parameter(numbers(i, 2))),
        lambda i: ((numbers(i, 3), numbers(i, 2)), numbers(i, 1)),
        lambda i: ({"a": {"b": numbers(i, 3)}},),
        lambda i: ([numbers(i, 3)],),
    ],
)
def test_batches_of_any_kind(batch: Callable[[int], tuple[Any, ...]]) -> None:
    """What is not looked into is refused, or runs as it stands."""
    ours, theirs = Nested(), Nested(enabled=False)
    for i in range(5):
        expected: Any = None
        with contextlib.suppress(TypeError):
            expected = theirs.engine.run(theirs.total, batch(i))["total"]
        if expected is None:
            with pytest.raises(TypeError):
                ours.engine.run(ours.total, batch(i))
        else:
            assert th.isclose(ours.engine.run(ours.total, batch(i))["total"], expected, rtol=1e-6, atol=1e-6)
