"""What signatures and docstrings declare, over all rows of the registry."""

import inspect
from typing import Any

import pytest
from models import EVERY, algorithm_class, rows, small_model
from stable_baselines3 import A2C, TD3

from sb3_ac_ext import TD3X
from sb3_ac_ext.base.declarations import OffPolicyArguments
from sb3_ac_ext.base.off_policy import OffPolicyMixin
from sb3_ac_ext.base.on_policy import OnPolicyMixin
from sb3_ac_ext.signatures import arguments_of, check_arguments, passed_on, takes_anything
from sb3_ac_ext.validation import Acts, ArgumentError, Excludes, Needs, UnitInterval, check

REQUIRED = {"policy", "env"}


@rows()
def test_every_argument_is_declared(row: str) -> None:
    """Type, meaning, and a default that is legal; ``load`` constructs without arguments."""
    for name, argument in arguments_of(algorithm_class(row)).items():
        assert argument.meaning, name
        if name in REQUIRED:
            assert argument.default is inspect.Parameter.empty
        else:
            assert argument.annotation is not Any, name
            check(name, argument.default, argument.annotation)


@rows()
def test_what_goes_together_is_there(row: str) -> None:
    arguments = arguments_of(algorithm_class(row))
    for name, argument in arguments.items():
        for needed in argument.of_kind(Needs):
            for value in needed.values:
                check(needed.name, value, arguments[needed.name].annotation)
                assert name != needed.name
        for excluded in argument.of_kind(Excludes):
            assert excluded.name in arguments


@rows()
def test_signatures_are_explicit(row: str) -> None:
    """So that ``help()`` and editors show every argument, with its default and its choices."""
    cls = algorithm_class(row)
    parameters = inspect.signature(cls.__init__).parameters
    assert parameters.keys() - {"self", "_init_setup_model"} == arguments_of(cls).keys()
    for name, argument in arguments_of(cls).items():
        assert f":param {name}: " in cls.__doc__
        shown = repr(parameters[name].annotation)
        assert ("Literal[" in shown) == ("Literal[" in repr(argument.annotation) and "TypedDict" not in shown), name


@rows()
def test_defaults_are_those_of_a_model(row: str) -> None:
    """They are stored, so that a check after `load` sees the arguments."""
    model = small_model(row)
    for name, argument in arguments_of(algorithm_class(row)).items():
        check(name, model._arguments()[name], argument.annotation)
        assert hasattr(model, name) or name in ("policy", "stats_window_size")
    model.gamma = "half"
    with pytest.raises(TypeError, match=r"gamma must be a number in \[0, 1\], got 'half'"):
        model._check_arguments()


@pytest.mark.parametrize(("mixin", "sb3"), [(OffPolicyMixin, TD3), (OnPolicyMixin, A2C)], ids=["off-policy", "on-policy"])
def test_arguments_are_handed_on_to_the_next_class(mixin: Any, sb3: Any) -> None:
    class Algorithm(mixin, sb3):
        """
        An algorithm of a user's.

        :param beta: weight of something
        """

        sb3_class = sb3

        def __init__(self, *args: Any, beta: UnitInterval = 0.5, _init_setup_model: bool = True, **kwargs: Any) -> None:
            super().__init__(*args, _init_setup_model=False, **kwargs)

    arguments = arguments_of(Algorithm)
    assert {"beta", "engine", "gamma", "learning_rate"} <= arguments.keys()
    assert arguments["beta"].meaning == "weight of something"
    assert arguments["gamma"].annotation is UnitInterval  # where SB3 has float
    assert arguments["gamma"].meaning == "discount factor"
    assert ":param beta: weight of something (a number in [0, 1])" in Algorithm.__doc__
    with pytest.raises(TypeError, match="did you mean 'gamma'"):
        Algorithm("MlpPolicy", None, gama=0.5)
    with pytest.raises(ValueError, match=r"gamma must be a number in \[0, 1\], got 2"):
        Algorithm("MlpPolicy", "Pendulum-v1", gamma=2)


def test_annotations_that_cannot_be_resolved_are_left_alone() -> None:
    class Algorithm(TD3X):
        """Of a user's."""

        def __init__(self, *args: Any, beta: "NotThere" = 1, **kwargs: Any) -> None:  # type: ignore[name-defined]  # noqa: F821
            super().__init__(*args, **kwargs)

    assert arguments_of(Algorithm)["beta"].annotation is Any
    assert Algorithm("MlpPolicy", "Pendulum-v1", policy_delay=3).policy_delay == 3


def test_meaning_of_a_class_wins_over_the_shared_one() -> None:
    class Algorithm(TD3X):
        """
        Of a user's.

        :param tau: share of
            something else
        :raises ValueError: never
        """

    assert arguments_of(Algorithm)["tau"].meaning == "share of something else"
    assert arguments_of(TD3X)["tau"].meaning in " ".join((OffPolicyArguments.__doc__ or "").split())


def test_what_is_passed_on() -> None:
    class Last:
        def __init__(self, one: int, two: int = 2) -> None: ...

    class First(Last):
        def __init__(self, one: int, own: int = 3, **kwargs: Any) -> None:
            self.passed = passed_on(First, locals())

    assert First(1, own=4).passed == {"one": 1}
    assert not takes_anything(First)
    assert takes_anything(type("Open", (), {"__init__": lambda self, **kwargs: None}))


def test_what_goes_together_is_checked() -> None:
    arguments = arguments_of(algorithm_class("td3x"))
    values = {name: argument.default for name, argument in arguments.items()} | {"policy": "MlpPolicy", "env": None}
    check_arguments(TD3X, values)
    with pytest.raises(ArgumentError, match="warmup='noise' needs exploration_noise, got exploration_noise=None"):
        check_arguments(TD3X, values | {"warmup": "noise"})


@pytest.mark.parametrize("row", EVERY)
def test_when_changes_act_is_said(row: str) -> None:
    acts = {name: argument.acts for name, argument in arguments_of(algorithm_class(row)).items()}
    assert acts["seed"] is acts["policy_kwargs"] is Acts.NEVER
    assert acts["verbose"] is Acts.LEARN
    assert acts["learning_rate"] is Acts.UPDATE
    assert acts["gamma"] is (Acts.ROLLOUT if row == "a3c" else Acts.UPDATE)  # whose workers are told it before they act
