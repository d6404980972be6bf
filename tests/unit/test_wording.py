"""Messages have one document and two documents."""

import re

import pytest

from internevo.wording import counted, plural
from tests.unit.test_structure import FILES, SOURCE

NOUNS = {"step": "steps", "pass": "passes", "micro-batch": "micro-batches", "entry": "entries", "day": "days"}
COUNT = re.compile(r"\{len\([^{}]*\)(:,)?\} (?!times )[a-z-]+s\b")
"""The number of things in a list, with a noun that is always in the plural."""


@pytest.mark.parametrize(("noun", "two"), NOUNS.items())
def test_a_noun_has_the_form_of_its_number(noun: str, two: str) -> None:
    assert [counted(number, noun) for number in (0, 1, 2, 2000)] == [f"0 {two}", f"1 {noun}", f"2 {two}", f"2,000 {two}"]
    assert [plural(number, noun) for number in (1, 2)] == [noun, two]


def test_no_message_has_a_count_with_a_fixed_plural() -> None:
    found = {str(path.relative_to(SOURCE)): COUNT.findall(path.read_text(encoding="utf-8")) for path in FILES}
    assert not {name: hits for name, hits in found.items() if hits}
