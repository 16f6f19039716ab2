"""Dim expressions: integers that depend on the site, such as `C`, `4*C`, `max(1, C//16)` or `gcd(C, 8)`.

A small recursive-descent parser with limits; nothing here reaches Python's `eval`. Grammar:

    sum     = product (("+" | "-") product)*
    product = atom (("*" | "//") atom)*
    atom    = integer | symbol | function "(" sum ("," sum)* ")" | "(" sum ")"
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from esper.leyline.errors import BlueprintError, excerpt

SYMBOLS = ("C", "H", "W", "T")
MAX_LENGTH = 64
MAX_DEPTH = 8
MAX_VALUE = 1 << 24

_FUNCTIONS: dict[str, Callable[..., int]] = {"min": min, "max": max, "gcd": math.gcd}
_TOKEN = re.compile(r" *(?:([0-9]{1,9})|([A-Za-z]+)|(//|[+\-*(),]))")


@dataclass(frozen=True, slots=True)
class _Call:
    """An operator or function with its operands."""

    name: str
    args: tuple[Expr, ...]


Expr = int | str | _Call
"""A parsed expression: a number, a symbol or a call."""


def parse(text: str | int) -> Expr:
    """Parses an expression.

    Raises:
        BlueprintError: for anything outside the grammar or its limits.
    """
    if isinstance(text, int):
        return text
    if len(text) > MAX_LENGTH:
        raise BlueprintError(f"a dim expression of {len(text)} characters", remedy=f"use at most {MAX_LENGTH}")
    parser = _Parser(text, _tokens(text))
    expr = parser.sum(0)
    parser.expect_end()
    return expr


def evaluate(text: str | int, dims: Mapping[str, int]) -> int:
    """The value of an expression at a site with these `dims`.

    Raises:
        BlueprintError: if it does not parse, names a dim the site has not, divides by zero or is too large.
    """
    return _value(parse(text), dims, str(text))


def canonical(text: str | int) -> str:
    """One spelling for all expressions that parse alike: `C // 4`, `(C//4)` and `C//4` are the same."""
    return _spell(parse(text))


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    position = 0
    end = len(text.rstrip(" "))
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise BlueprintError(
                f"dim expression {excerpt(text)} has an unexpected character at {position + 1}",
                remedy="use integers, C, H, W, T, + - * //, parentheses, min, max and gcd",
            )
        tokens.append(match.group(1) or match.group(2) or match.group(3))
        position = match.end()
    return tokens


class _Parser:
    def __init__(self, text: str, tokens: Sequence[str]) -> None:
        self._text = text
        self._tokens = tokens
        self._next = 0

    def sum(self, depth: int) -> Expr:
        return self._chain(self._product, ("+", "-"), depth)

    def expect_end(self) -> None:
        if self._next < len(self._tokens):
            raise self._error(f"has {self._tokens[self._next]!r} where it should end")

    def _product(self, depth: int) -> Expr:
        return self._chain(self._atom, ("*", "//"), depth)

    def _chain(self, operand: Callable[[int], Expr], operators: tuple[str, str], depth: int) -> Expr:
        left = operand(depth)
        while self._peek() in operators:
            operator = self._take()
            left = _Call(operator, (left, operand(depth)))
        return left

    def _atom(self, depth: int) -> Expr:
        if depth >= MAX_DEPTH:
            raise self._error(f"is nested deeper than {MAX_DEPTH}")
        part = self._take()
        if part.isdigit():
            return int(part)
        if part == "(":
            inner = self.sum(depth + 1)
            self._expect(")")
            return inner
        if part in _FUNCTIONS:
            self._expect("(")
            args = [self.sum(depth + 1)]
            while self._peek() == ",":
                self._take()
                args.append(self.sum(depth + 1))
            self._expect(")")
            if len(args) < 2:
                raise self._error(f"gives {part} one argument; it takes two or more")
            return _Call(part, tuple(args))
        if part in SYMBOLS:
            return part
        raise self._error(f"has {part!r} where a number, C, H, W, T, min, max or gcd should stand")

    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        if not token:
            raise self._error("ends too early")
        self._next += 1
        return token

    def _expect(self, token: str) -> None:
        found = self._take()
        if found != token:
            raise self._error(f"has {found!r} where {token!r} should stand")

    def _error(self, what: str) -> BlueprintError:
        return BlueprintError(f"dim expression {excerpt(self._text)} {what}")


def _value(expr: Expr, dims: Mapping[str, int], text: str) -> int:
    if isinstance(expr, int):
        value = expr
    elif isinstance(expr, str):
        if expr not in dims:
            raise BlueprintError(f"dim expression {excerpt(text)} names {expr}, which such a site has not")
        value = dims[expr]
    else:
        value = _apply(expr.name, [_value(arg, dims, text) for arg in expr.args], text)
    if abs(value) > MAX_VALUE:
        raise BlueprintError(f"dim expression {excerpt(text)} is {value}, above the limit of {MAX_VALUE}")
    return value


def _apply(name: str, args: list[int], text: str) -> int:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name](*args)
    left, right = args
    if name == "+":
        return left + right
    if name == "-":
        return left - right
    if name == "*":
        return left * right
    if right == 0:
        raise BlueprintError(f"dim expression {excerpt(text)} divides by zero")
    return left // right


def _spell(expr: Expr) -> str:
    if not isinstance(expr, _Call):
        return str(expr)
    args = [_spell(arg) for arg in expr.args]
    if expr.name in _FUNCTIONS:
        return f"{expr.name}({','.join(args)})"
    return f"({args[0]}{expr.name}{args[1]})"
