"""
Rewrites the tables of docs/arguments.md from the declarations; what stands around them is written by hand.

    python docs/make_arguments.py
"""

import re
from collections.abc import Iterable
from inspect import Parameter, get_annotations
from pathlib import Path
from typing import Any, get_type_hints

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy

from sb3_ac_ext.base.declarations import CommonArguments, OffPolicyArguments, OnPolicyArguments
from sb3_ac_ext.base.off_policy import OffPolicyMixin
from sb3_ac_ext.base.on_policy import OnPolicyMixin
from sb3_ac_ext.base.schedules import LEGAL
from sb3_ac_ext.signatures import Argument, arguments_of
from sb3_ac_ext.validation import Acts, Excludes, Needs, alternatives, legal
from sb3_ac_ext.zoo.registry import ALGORITHMS, AlgoSpec

DOCUMENT = Path(__file__).with_name("arguments.md")
SECTION = re.compile(r"(<!-- arguments: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = "| argument | default | legal | a change acts | meaning |\n|---|---|---|---|---|\n"
SHARED = {
    "all": (CommonArguments, OffPolicyMixin, (OffPolicyAlgorithm, OnPolicyAlgorithm)),
    "off-policy": (OffPolicyArguments, OffPolicyMixin, (OffPolicyAlgorithm,)),
    "on-policy": (OnPolicyArguments, OnPolicyMixin, (OnPolicyAlgorithm,)),
}
"""Who shares: where it is declared, a class that takes all of it, whose arguments are SB3's."""


def rewritten(text: str) -> str:
    """
    :param text: of docs/arguments.md
    :return: the same with the tables that follow from the declarations
    :raises ValueError: if a table has no place in it, or a place no table
    """
    tables = {spec.name: own_table(spec) for spec in ALGORITHMS}
    for group in SHARED:
        tables |= {f"{group}, ours": shared_table(group, sb3s=False), f"{group}, SB3's": shared_table(group, sb3s=True)}
    places = [name for _, name, _ in SECTION.findall(text)]
    if sorted(places) != sorted(tables):
        raise ValueError(f"{DOCUMENT.name} has places for {sorted(places)}, and there are the tables {sorted(tables)}")
    return SECTION.sub(lambda place: f"{place[1]}{tables[place[2]]}{place[3]}", text)


def shared_table(group: str, sb3s: bool) -> str:
    """What all, or almost all, algorithms of a group take; of SB3's arguments or of ours."""
    declarations, mixin, theirs = SHARED[group]
    specs = [spec for spec in ALGORITHMS if issubclass(spec.cls, theirs)]
    return HEAD + "".join(
        row(argument.name, default_in(specs, argument.name), argument)
        for argument in arguments_of(mixin).values()
        if argument.name in get_annotations(declarations) and all(argument.name in arguments_of(cls) for cls in theirs) is sb3s
    )


def own_table(spec: AlgoSpec) -> str:
    """What one algorithm alone takes, or means in another way than the others, and its policies."""
    cls: Any = spec.cls
    shared = arguments_of(OffPolicyMixin if issubclass(cls, OffPolicyMixin) else OnPolicyMixin)
    names = get_type_hints(cls.declarations).keys()
    rows = ""
    for argument in arguments_of(cls).values():
        common = shared[argument.name] if argument.name in names & shared.keys() else None
        if common and (argument.annotation, argument.meaning) == (common.annotation, common.meaning):
            continue
        theirs = argument.name in arguments_of(cls.sb3_class)
        rows += row(argument.name, code(argument.default), argument, note=" (SB3)" if theirs else "")
    for name, argument in policy_arguments(cls).items():
        rows += row(f'policy_kwargs["{name}"]', code(argument.default), argument, Acts.NEVER)
    return HEAD + rows


def policy_arguments(cls: Any) -> dict[str, Argument]:
    """What our policies take themselves, without what the algorithm sets and what SB3's base class has."""
    taken = [argument for policy in cls.policy_aliases.values() for argument in arguments_of(policy).values()]
    elsewhere = arguments_of(BasePolicy).keys() | arguments_of(cls).keys()
    ours = [one for one in taken if one.owner.__module__.startswith("sb3_ac_ext.") and one.default is not Parameter.empty]
    return {one.name: one for one in ours if one.name not in elsewhere}


def default_in(specs: Iterable[AlgoSpec], name: str) -> str:
    """The default that most have, those of the others, and who does not take the argument."""
    by_default: dict[str, list[str]] = {}
    for spec in specs:
        argument = arguments_of(spec.cls).get(name)
        by_default.setdefault("not taken" if argument is None else code(argument.default), []).append(f"`{spec.name}`")
    most, *others = sorted(by_default.items(), key=lambda item: -len(item[1]))
    return "; ".join([most[0], *(f"{', '.join(who)}: {default}" for default, who in others)])


def row(name: str, default: str, argument: Argument, acts: Acts | None = None, note: str = "") -> str:
    """A line of a table."""
    parts = [argument.meaning.replace("``", "`")]
    parts += [f"needs `{needed}`" for needed in argument.of_kind(Needs)]
    parts += [f"excludes `{excluded.name}`" for excluded in argument.of_kind(Excludes)]
    values = "" if alternatives(argument.annotation)[0][0] is Any else legal(argument.annotation)
    cells = [f"`{name}`{note}", default, values.replace(LEGAL, "a schedule"), acts or argument.acts, "; ".join(parts)]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def code(default: Any) -> str:
    """A default as it is written in Python."""
    if default is Parameter.empty:
        return "needed"
    return f"`{getattr(default, '__name__', None) or repr(default)}`"


if __name__ == "__main__":
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text()))
