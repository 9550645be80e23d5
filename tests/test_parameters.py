"""Parameters: against Python itself (exec), against papermill's reader, and against what YAML 1.1 makes of a text."""

import keyword
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from papermill.iorw import read_yaml_file

from cadetlib import parameters

NAMES = st.from_regex(r"[a-z][a-z_0-9]{0,8}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name))
SCALARS = [st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)]
VALUES = st.one_of(*SCALARS, *(st.lists(scalar, max_size=3) for scalar in SCALARS))


@given(st.dictionaries(NAMES, VALUES, min_size=1, max_size=5), st.booleans())
def test_declared_literals_are_what_python_would_assign(values, annotated):
    source = "".join(f"{n}{': object' if annotated else ''} = {v!r}  # about {n}\n" for n, v in values.items())
    namespace = {}
    exec(source, {}, namespace)
    namespace.pop("__annotations__", None)
    found = parameters.literals(source)
    assert {name: p.value for name, p in found.items()} == namespace
    assert all(p.comment == f"about {name}" for name, p in found.items())
    assert parameters.validate(namespace, namespace) == namespace


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os", "found `import os`, expected `name = literal`"),
        ("n = 2 * 3", "found `n = 2 \\* 3`"),
        ("a = b = 1", "expected `name = literal`"),
        ("a: int", "expected `name = literal`"),
        ("a = 1\na = 2", "line 2: found a a second time"),
        ("a = None", "a: found None"),
        ("a = {'b': 1}", "a: found {'b': 1}, expected a bool"),
        ("a = [[1]]", "list of these"),
        ("a = [1, 'b']", "items of one type"),
        ("a = [True, 1]", "items of one type"),
        ("a = (", "line 1"),
    ],
)
def test_anything_but_a_flat_literal_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        parameters.literals(source)


def test_a_notebook_has_one_parameters_cell(write_notebook):
    path = write_notebook("00_a", parameters="sizes = [\n    1,\n    2,\n]  # of the sets\n")
    assert list(parameters.declared(path)) == ["profile", "output", "sizes"]
    assert parameters.declared(path)["sizes"] == parameters.Parameter([1, 2], "of the sets")
    path.write_text(path.read_text().replace('["parameters"]', "[]"))
    with pytest.raises(ValueError, match="found 0 cells tagged `parameters`, expected one"):
        parameters.declared(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected a notebook"):
        parameters.declared(path)


def test_yaml_is_read_as_papermill_reads_it_and_more_strictly(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text("lr: 0.001\nn: 5\nname: 'off'\non_gpu: false\nsizes: [1, 2]\nwarm: 1.0e-5\n")
    assert parameters.read_yaml(file) == read_yaml_file(str(file))
    assert parameters.read_yaml(file)["warm"] == 1e-5
    file.write_text("# nothing\n")
    assert parameters.read_yaml(file) == {}
    for text, message in {
        "a: 1\na: 2": "found a twice",
        "- 1": "expected lines of",
        "1: 2": "expected lines of",
        "a: [": "a.yaml",
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            parameters.read_yaml(file)


@pytest.mark.parametrize("text", ["1e-3", "25e-8", "1e5", "3E2"])
def test_the_advice_for_a_number_that_yaml_reads_as_a_string_is_right(text):
    value = yaml.safe_load(text)
    assert isinstance(value, str)
    for default, kind in ((0.1, float), (1, int)):
        with pytest.raises(ValueError, match=f"lr: found the string '{text}', expected") as error:
            parameters.validate({"lr": default}, {"lr": value}, "file.yaml")
        advised = re.search(r"write ([\d.]+)$", str(error.value))
        if kind is float or float(text).is_integer():
            assert advised is not None
            assert yaml.safe_load(advised.group(1)) == float(text)
            assert type(kind(yaml.safe_load(advised.group(1)))) is kind
        else:
            assert advised is None


@pytest.mark.parametrize(
    ("default", "value"),
    [
        *[(1, True), (1, 1.5), (1, "1"), (1, [1]), (0.1, True), (0.1, float("nan")), (0.1, "x"), (True, 1), (True, "yes")],
        *[("a", 1), ("a", False), ("a", None), ([1], 1), ([1], [1.5]), ([1], [True]), (["a"], [1]), ([0.1], ["1e-3"])],
        *[([], [1, "a"]), ([], [None])],
    ],
)
def test_a_changed_type_is_refused(default, value):
    with pytest.raises(ValueError, match=r"file.yaml: name: found .*, expected"):
        parameters.validate({"name": default}, {"name": value}, "file.yaml")


def test_what_is_accepted_has_the_declared_type():
    merged = parameters.validate(
        {"a": 0.1, "b": [0.1], "c": [1, 0.5], "d": (1, 2), "e": [], "f": 3}, {"a": 1, "b": [1, 2.5], "d": [3], "e": ["x"]}
    )
    assert merged == {"a": 1.0, "b": [1.0, 2.5], "c": [1, 0.5], "d": (3,), "e": ["x"], "f": 3}
    assert [type(merged["a"]), type(merged["b"][0])] == [float, float]


def test_every_problem_is_named_at_once():
    with pytest.raises(ValueError) as error:
        parameters.validate({"learning_rate": 0.1, "tau": "x"}, {"learning_rte": 1, "tau": False, "zzz": 0}, "p.yaml")
    first, second, third = str(error.value).splitlines()
    assert first == "p.yaml: learning_rte: unknown parameter, did you mean learning_rate?"
    assert second.startswith("p.yaml: tau: found False, expected a string; YAML 1.1 reads on, off")
    assert third == "p.yaml: zzz: unknown parameter, expected one of learning_rate, tau"
