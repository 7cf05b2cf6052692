"""Regexes of a config: checked once when it is read, matched in one place.

Adapters come from strangers, and Python's matcher goes back over a name for every way in which a pattern could have
matched. A pattern is therefore refused where that could take longer than a short while: repeats inside repeats,
references to groups, or several repeats of anything in a row. That bounds one match of one name; how many names there
are is up to the files, so slow matches are counted besides.
"""

from __future__ import annotations

import functools
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

from .compat import regex_parser

MAX_LENGTH = 2000
MAX_COST = 1_000_000  # of all patterns of an option: one name is then matched in milliseconds in the worst case
MAX_SECONDS = 20.0  # of computing, in matches that are slow: those of honest patterns take microseconds
_SLOW = 0.002
_spent = 0.0  # by slow matches so far
_LEAST = 500  # of one pattern, so that there are at most 2,000
_WIDE = 100  # places where a repeat of anything, such as `.*`, can end in a name
_NARROW = 5  # and one of digits, which ends at the next dot
_OPTIONAL = 3
_DIGITS = {str(digit) for digit in range(10)}


def check_patterns(patterns: Iterable[Any], where: str) -> None:
    """Raise `ValueError` for what is no regular expression, or could take long to match.

    Args: where: the option in which the patterns stand, for the message.
    """
    cost = 0
    for pattern in patterns:
        cost += max(_LEAST, _cost(pattern, where))
        if cost > MAX_COST:
            raise ValueError(
                f"{where}={pattern!r} could take very long to match: repeats of arbitrary characters, optional parts "
                "and alternatives multiply. Write it as a simpler pattern."
            )


def _cost(pattern: Any, where: str) -> int:
    if not isinstance(pattern, str):
        raise ValueError(f"{where}={pattern!r} is not a regular expression.")
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"{where} has a pattern of {len(pattern)} characters; expected at most {MAX_LENGTH}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = regex_parser.parse(pattern)
            re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}={pattern!r} is not a regular expression ({error}).") from error
    try:
        return _steps(tree, inside=False)
    except _Endless as error:
        raise ValueError(
            f"{where}={pattern!r} {error}: matching it could take very long. Write it as a simpler pattern."
        ) from error


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches the end of a dotted name, as PEFT matches `rank_pattern`.

    Raises `ValueError` once slow matches, one after the other, have taken `MAX_SECONDS`.
    """
    global _spent
    began = time.thread_time()
    found = _compiled(pattern).match(name) is not None
    took = time.thread_time() - began
    if took > _SLOW:
        _spent += took
        if _spent > MAX_SECONDS:
            _spent = 0.0
            raise ValueError(
                f"the pattern {pattern!r} of adapter_config.json takes {took:.3f} s to match a name such as "
                f"{name[:80]!r}, and there are many. Write it as a simpler pattern."
            )
    return found


def value_of(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a dotted name."""
    found = patterns or {}
    return next((value for pattern, value in found.items() if matches(pattern, name)), found.get(name, default))


@functools.lru_cache(maxsize=2 * MAX_COST // _LEAST)  # Python's own cache holds 512, and compiling is slow
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


class _Endless(Exception):
    """A pattern whose cost has no useful bound."""


def _steps(tree: Any, inside: bool) -> int:
    """About how many ways there are to match a parsed pattern. Args: inside: a repeat."""
    cost = 1
    for operation, argument in tree:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, body = argument
            cost *= _repeat(least, most, body, inside)
        elif name == "BRANCH":
            if inside:
                raise _Endless("has alternatives inside a repeat")
            cost *= _branch(argument[1])
        elif name == "SUBPATTERN":
            cost *= _steps(argument[-1], inside)
        elif name == "ATOMIC_GROUP":
            cost *= _steps(argument, inside)
        elif name in ("ASSERT", "ASSERT_NOT"):
            cost *= _steps(argument[1], inside)
        elif name.startswith("GROUPREF"):
            raise _Endless("refers to one of its groups")
    return cost


def _branch(branches: Any) -> int:
    texts = [tuple(branch) for branch in branches]
    if all(str(operation) == "LITERAL" for text in texts for operation, _ in text):
        # Of fixed texts only those go on at one place of a name that are the beginning of one another.
        starts = {text[:length] for text in texts for length in range(len(text))}
        counts = Counter(texts)
        return 1 + sum(text in starts or counts[text] > 1 for text in texts) + len(texts) // 8
    return 2 * sum(_steps(branch, inside=False) for branch in branches)


def _repeat(least: int, most: Any, body: Any, inside: bool) -> int:
    if inside:
        raise _Endless("has a repeat inside a repeat")
    if most == 1:  # an optional part
        return _OPTIONAL * _steps(body, inside)
    _steps(body, True)
    if least == most:
        return 1
    return _NARROW if all(_only_digits(*one) for one in body) else _WIDE


def _only_digits(operation: Any, argument: Any) -> bool:
    name = str(operation)
    if name == "LITERAL":
        return chr(argument) in _DIGITS
    if name == "IN":
        return all(_only_digits(*one) for one in argument)
    if name == "RANGE":
        return chr(argument[0]) in _DIGITS and chr(argument[1]) in _DIGITS
    return name == "CATEGORY" and str(argument) == "CATEGORY_DIGIT"
