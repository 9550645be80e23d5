"""A notebook's parameters: flat typed literals, checked by name and type before anything runs.

The cell tagged `parameters` declares names, default values and, by these, types; a profile's YAML file changes values and
nothing else. papermill alone only warns of an unknown name, and hands on 1e-3 as the string that YAML 1.1 makes of it.
"""

from __future__ import annotations

import ast
import difflib
import io
import json
import math
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import yaml

_SCALARS = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}


@dataclass(frozen=True)
class Parameter:
    """One declared parameter: its default value, whose type it has, and the comment that says what it is.

    >>> Parameter(0.1, "temperature").value
    0.1
    """

    value: Any
    comment: str = ""


def read_notebook(path: str | Path) -> list[dict[str, Any]]:
    """The cells of a notebook, each with `cell_type`, `source` (one string) and `metadata`; ValueError for another file.

    >>> from cadetlib import record
    >>> read_notebook(record.checkout() / "notebooks" / "00_setup.ipynb")[0]["cell_type"]
    'markdown'
    """
    try:
        cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
        return [{**cell, "source": "".join(cell["source"]), "metadata": cell.get("metadata", {})} for cell in cells]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a notebook of nbformat 4, found something else ({error!r})") from error


def declared(notebook: str | Path) -> dict[str, Parameter]:
    """The parameters that a notebook declares in its one cell tagged `parameters`, in their order.

    ValueError when there is no such cell, or when it holds anything but assignments of flat literals.

    >>> from cadetlib import record
    >>> declared(record.checkout() / "notebooks" / "00_setup.ipynb")["profile"].value
    'digits'
    """
    tagged = [cell["source"] for cell in read_notebook(notebook) if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{notebook}: found {len(tagged)} cells tagged `parameters`, expected one")
    try:
        return literals(tagged[0])
    except ValueError as error:
        raise ValueError(f"{notebook}, cell tagged `parameters`: {error}") from error


def literals(source: str) -> dict[str, Parameter]:
    """The flat literals that a piece of Python assigns: bool, int, float, str, or a list of one of these.

    >>> literals("tau = 0.1  # temperature")
    {'tau': Parameter(value=0.1, comment='temperature')}
    """
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.msg}") from error
    comments = _comments(source)
    found: dict[str, Parameter] = {}
    for statement in statements:
        name, value = _assignment(statement)
        if name in found:
            raise ValueError(f"line {statement.lineno}: found {name} a second time, expected each parameter once")
        problem = _not_flat(value)
        if problem:
            raise ValueError(f"line {statement.lineno}: {name}: {problem}")
        comment = comments.get(statement.end_lineno or 0) or comments.get(statement.lineno, "")
        found[name] = Parameter(value, comment)
    return found


def _assignment(statement: ast.stmt) -> tuple[str, Any]:
    """The name and value of `name = literal` or `name: type = literal`."""
    if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        if len(targets) == 1 and isinstance(targets[0], ast.Name):
            try:
                return targets[0].id, ast.literal_eval(statement.value)
            except ValueError:
                pass  # not a literal: refused below
    raise ValueError(f"line {statement.lineno}: found `{ast.unparse(statement)}`, expected `name = literal`")


def _comments(source: str) -> dict[int, str]:
    """Line number -> the comment at its end."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").rstrip() for t in tokens if t.type == tokenize.COMMENT}


def _not_flat(value: Any) -> str:
    """Why `value` cannot be a parameter's default; empty when it can."""
    if value is None:
        return "found None, which has no type; write 0, '' or [] for `none`"
    kinds = {type(item) for item in (value if isinstance(value, list) else [value])}
    if not kinds <= set(_SCALARS):
        return f"found {value!r}, expected a bool, a number, a string, or a list of these"
    if len(kinds) > 1 and kinds != {int, float}:
        return f"found {value!r}, expected items of one type"
    return ""


class _StrictLoader(yaml.SafeLoader):
    """yaml.safe_load, except that a key given twice is refused instead of silently taken from its last line."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise ValueError(f"found {twice} twice, expected each parameter once")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The flat mapping name -> value of a YAML file; an empty file is an empty mapping.

    FileNotFoundError when there is no such file; ValueError when it is not YAML, not a mapping, or names a parameter twice.

    >>> from cadetlib import record
    >>> read_yaml(record.checkout() / "params" / "digits" / "08_report.yaml")
    {'profile': 'digits'}
    """
    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{path}: found {type(found).__name__} {str(found)[:60]!r}, expected lines of `name: value`")
    return found


def validate(defaults: Mapping[str, Any], given: Mapping[str, Any], source: str | Path = "parameters") -> dict[str, Any]:
    """`defaults` with the values of `given`, each of its default's type; a whole number is taken where a number is declared.

    One ValueError lists every unknown name (with the nearest known one) and every value of another type; `source` is the
    file or caller it names. Tuples stand for lists, so that a dataclass's defaults can be checked too.

    >>> validate({"lr": 0.1, "n_views": 50}, {"lr": 1})
    {'lr': 1.0, 'n_views': 50}
    """
    merged, problems = dict(defaults), []
    for name, value in given.items():
        try:
            merged[name] = _as_declared(defaults[name], value)
        except KeyError:
            near = difflib.get_close_matches(name, defaults, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(defaults)}"
            problems.append(f"{name}: unknown parameter, {hint}")
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError("\n".join(f"{source}: {problem}" for problem in problems))
    return merged


def _as_declared(default: Any, value: Any) -> Any:
    """`value` as the type of `default`, or ValueError."""
    if not isinstance(default, list | tuple):
        return _scalar(type(default), value)
    if not isinstance(value, list | tuple):
        raise ValueError(f"found {_named(value)}, expected a list like {list(default)}")
    models = default or value  # an empty default says nothing of its items: then the first one given does
    kind = float if {type(item) for item in models} == {int, float} else type(models[0]) if models else str
    return type(default)(_scalar(kind, item) for item in value)


def _scalar(kind: type, value: Any) -> Any:
    if kind not in _SCALARS:
        raise ValueError(f"found {_named(value)}, expected True or False, a number or a string")
    if kind is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise ValueError(f"found {value}, expected a finite number")
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"found {_named(value)}, expected {_SCALARS[kind]}{_advice(kind, value)}")
    return value


def _named(value: Any) -> str:
    names = {str: "the string ", int: "the whole number ", float: "the number ", list: "the list "}
    return f"{names.get(type(value), '')}{value!r}"


def _advice(kind: type, value: Any) -> str:
    """How to write what was probably meant, where YAML 1.1 reads it as something else."""
    if kind is str:
        why = "YAML 1.1 reads on, off, yes and no as True and False; " if isinstance(value, bool) else ""
        return f"; {why}write it in quotes"
    if kind is int and isinstance(value, float) and value.is_integer():
        return f"; write {value:.0f}"
    if isinstance(value, str) and kind in (int, float):
        try:
            number = Decimal(value)
        except InvalidOperation:
            return ""
        if number.is_finite() and (kind is float or number == int(number)):
            plain = format(int(number) if kind is int else number, "d" if kind is int else "f")
            return f"; YAML 1.1 takes {value} for a string, write {plain}"
    return ""
