"""The arguments of a constructor: what each may be, what it means, what it goes with; read from signatures and docstrings."""

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import Parameter
from types import MappingProxyType
from typing import Any, get_type_hints

from sb3_ac_ext.validation import Acts, ArgumentError, Excludes, Needs, alternatives, check, legal, plain, shown

NOT_ARGUMENTS = frozenset({"self", "_init_setup_model"})


@dataclass(frozen=True)
class Argument:
    """An argument of a constructor."""

    name: str
    annotation: Any
    """What it may be, see `check`."""
    default: Any
    """``Parameter.empty`` if there is none."""
    meaning: str
    """In words, with its unit; empty if no docstring has it."""
    owner: type
    """The class whose constructor names it."""

    def of_kind(self, kind: type) -> Iterator[Any]:
        """What of a kind, such as `Needs`, is behind its type."""
        return (one for one in self.behind if isinstance(one, kind))

    @cached_property
    def behind(self) -> tuple[Any, ...]:
        """All that stands behind its types in ``Annotated``."""
        return tuple(dict.fromkeys(one for _, constraints in alternatives(self.annotation) for one in constraints))

    @property
    def acts(self) -> Acts:
        """When another value acts that is set on a model which is there."""
        return next(self.of_kind(Acts), Acts.UPDATE)

    @property
    def limits(self) -> str:
        """What is legal and what it goes with, in brackets; empty where anything is legal."""
        words = [] if Any in (kind for kind, _ in alternatives(self.annotation)) else [legal(self.annotation)]
        words += [f"needs {needed}" for needed in self.of_kind(Needs)]
        words += [f"excludes {excluded.name}" for excluded in self.of_kind(Excludes)]
        return f" ({'; '.join(words)})" if words else ""

    def check(self, value: Any) -> None:
        """
        :raises TypeError: if ``value`` is of the wrong type
        :raises ValueError: if it is out of range
        """
        if value is not self.default:  # which is legal
            check(self.name, value, self.annotation)

    def is_default(self, value: Any) -> bool:
        """Whether ``value`` is its default."""
        try:
            return value is self.default or bool(value == self.default)
        except (RuntimeError, ValueError):  # of arrays
            return False


@cache
def arguments_of(cls: type) -> Mapping[str, Argument]:
    """
    Every argument that a class takes, those behind ``**kwargs`` included, which are handed on to the next class.

    What its ``declarations`` (or those of a class that it is derived from) say of an argument holds wherever it is taken; of
    the others the signature says it. Meanings are in the ``:param`` lines of both.

    :param cls: an algorithm, policy, or buffer
    :return: by name, in the order of the signatures
    """
    shared: dict[str, Any] = {}
    for kind in reversed(cls.__mro__):
        if "declarations" in vars(kind):
            shared |= get_type_hints(vars(kind)["declarations"], include_extras=True)
    found: dict[str, Argument] = {}
    meanings = _meanings(cls)
    for owner, parameters in _constructors(cls):
        for name, parameter in parameters.items():
            own = (
                Any
                if isinstance(parameter.annotation, str) or parameter.annotation is Parameter.empty
                else parameter.annotation
            )
            annotation = shared.get(name, own)
            found.setdefault(name, Argument(name, annotation, parameter.default, meanings.get(name, ""), owner))
    return MappingProxyType(found)


def passed_on(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param cls: the class whose constructor this is
    :param given: its ``locals()``
    :return: the arguments that the constructors behind it take, by name
    """
    names = _names_behind(cls)
    return {name: value for name, value in given.items() if name in names}


@cache
def _names_behind(cls: type) -> frozenset[str]:
    return frozenset(name for _, parameters in _constructors(cls, behind=True) for name in parameters)


def check_given(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param cls: an algorithm
    :param given: arguments that SB3's constructor is about to compute with
    :return: the same, with Python's numbers
    :raises TypeError: if one is of the wrong type
    :raises ValueError: if one is out of range
    """
    arguments = arguments_of(cls)
    changed = {name: value for name, value in given.items() if name in arguments and value is not arguments[name].default}
    for name, value in changed.items():
        arguments[name].check(value)
    return {**given, **{name: plain(value, arguments[name].annotation) for name, value in changed.items()}}


def check_arguments(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """
    Each argument by itself, then what goes together.

    :param cls: an algorithm
    :param values: of all its arguments
    :return: those that are numbers of other libraries, as Python's
    :raises TypeError: if an argument is of the wrong type
    :raises ValueError: if one is out of range, or does not go with another
    """
    arguments = arguments_of(cls)
    changed = [argument for name, argument in arguments.items() if values[name] is not argument.default]
    for argument in changed:
        argument.check(values[argument.name])
    for argument in changed:
        if not argument.is_default(values[argument.name]):
            _check_relations(argument, arguments, values)
    numbers = {argument.name: plain(values[argument.name], argument.annotation) for argument in changed}
    return {name: number for name, number in numbers.items() if number is not values[name]}


def _check_relations(argument: Argument, arguments: Mapping[str, Argument], values: Mapping[str, Any]) -> None:
    name, value = argument.name, shown(values[argument.name])
    for needed in argument.of_kind(Needs):
        other = values[needed.name]
        if not (other in needed.values if needed.values else not arguments[needed.name].is_default(other)):
            raise ArgumentError(f"{name}={value} needs {needed}, got {needed.name}={shown(other)}")
    for excluded in argument.of_kind(Excludes):
        other = values[excluded.name]
        if not arguments[excluded.name].is_default(other):
            both = f"{excluded.name} and {name}"
            raise ArgumentError(f"{both} exclude each other, got {excluded.name}={shown(other)} and {name}={value}")


def documented(cls: type) -> str | None:
    """
    :param cls: an algorithm
    :return: its docstring, with a ``:param`` line for everything that it takes, in the signature's order, and what is legal
    """
    doc = cls.__doc__
    if not doc or "__init__" not in vars(cls):
        return doc
    arguments = arguments_of.__wrapped__(cls).values()  # names in annotations may not all be there yet
    lines = [f"    :param {one.name}: {one.meaning}{one.limits}" for one in arguments if one.meaning]
    params = "\n".join(textwrap.fill(line, 120, subsequent_indent=" " * 8) for line in lines)
    before, *_ = re.split(r"^ *:", doc, maxsplit=1, flags=re.MULTILINE)
    raises = re.search(r"^ *:raises .*", doc, re.MULTILINE | re.DOTALL)
    return f"{before.rstrip()}\n\n{params}\n{raises[0] if raises else '    '}"


def _constructors(cls: type, behind: bool = False) -> Iterator[tuple[type, dict[str, Parameter]]]:
    """The constructor that a class has, or the one behind it, and those that it hands ``**kwargs`` on to."""
    for owner in cls.__mro__:
        if "__init__" not in vars(owner) or (behind and owner is cls) or owner is object:
            continue
        parameters = _parameters(owner)
        variable = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        yield owner, {n: p for n, p in parameters.items() if p.kind not in variable and n not in NOT_ARGUMENTS}
        if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return


@cache
def takes_anything(cls: type) -> bool:
    """
    :param cls: any class
    :return: whether no constructor that it hands ``**kwargs`` on to says which it takes
    """
    *_, (owner, _) = _constructors(cls)
    return any(parameter.kind is Parameter.VAR_KEYWORD for parameter in _parameters(owner).values())


def _parameters(owner: type) -> Mapping[str, Parameter]:
    try:
        return inspect.signature(owner.__init__, eval_str=True).parameters  # type: ignore[misc]  # of a class, not an instance
    except NameError:  # of a user's class, whose annotations need not be there
        return inspect.signature(owner.__init__).parameters  # type: ignore[misc]


def _meanings(cls: type) -> dict[str, str]:
    docs = []
    for kind in cls.__mro__:
        docs.append(vars(kind).get("written_doc", kind.__doc__))
        docs += [declarations.__doc__ for declarations in getattr(vars(kind).get("declarations"), "__mro__", ())]
    return {name: text for doc in reversed(docs) for name, text in _params(doc or "").items()}


def _params(doc: str) -> dict[str, str]:
    found = re.findall(r"^ *:param (\w+): (.*?)(?=^ *:|^ *$|\Z)", doc, re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in found}
