"""YAML that says things twice, has no end, or makes Python stumble."""

import pytest

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.overrides import load_yaml, parse_value

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than 100000 values up to line 6"),
        ("a: &a [1, *a]", "the alias in line 1 stands inside of what it names"),
        ("a: &a {b: {c: *a}}", "the alias in line 1 stands inside of what it names"),
        ("[" * 200, "nested more than 64 levels deep in line 1"),
        ("".join(f"{' ' * i}k:\n" for i in range(200)), "nested more than 64 levels deep in line 6"),
        ("a: 1\nb: 2\na: 3\n", "'a' is given twice, again in line 3"),
        ("x: {a: 1, 'a': 2}", "'a' is given twice"),
        ("1: a\n0x1: b\n", "'0x1' is given twice"),
        ("when: 2026-13-45", "month must be in 1..12"),
        ("n: !!int many", "none of its type"),
        ("n: !!bool perhaps", "none of its type"),
        ("t: !!timestamp never", "none of its type"),
        ("? [a]\n: 1\n", "unhashable key"),
        ("a: !!python/object/apply:os.system [touch x]", "could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("\x00", "cannot be read"),
    ],
)
def test_bad_yaml_is_one_line_that_names_the_file(tmp_path, text, message):
    path = tmp_path / "f.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_yaml(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert message in str(error.value) or message == "cannot be read"


def test_aliases_and_merge_keys_are_fine(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text("base: &b {lr: 1, steps: 2}\none: *b\ntwo:\n  <<: *b\n  lr: 3\n")
    assert load_yaml(path)["two"] == {"lr": 3, "steps": 2} and load_yaml(path)["one"] == {"lr": 1, "steps": 2}


@pytest.mark.parametrize("text", ["2026-13-45", "!!int many", "!!timestamp never", "{[a]: 1}", "9" * 5000])
def test_values_that_yaml_stumbles_over_stay_text(text):
    assert parse_value(text) == text


@pytest.mark.parametrize("text", ["{a: 1, a: 2}", "[" * 100, "[&a [*a]]"])
def test_values_without_bounds_are_refused(text):
    with pytest.raises(UserError):
        parse_value(text)
