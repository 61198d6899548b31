"""What is said of a wrong value: in our words, in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.config_cases import GOOD, complaint


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("input=in", "input: 'in'; expected a section with keys."),
        ("limits=null", "limits: null; expected a section with keys."),
        ("lanes.gpu_decode=off", "lanes.gpu_decode: false; expected a section with keys."),
        ("window=off", "window: false; expected a section with keys. Write null for none."),
        ("input.passthrough=user_id", "input.passthrough: 'user_id'; expected a list."),
        ("input.passthrough=[]", "input.passthrough: []; expected a list of at least 1."),
        ("model.size=[1, 2, 3]", "model.size: [1, 2, 3]; expected a list of at most 2."),
        ("name=2026-11-20", "name: 2026-11-20; expected text. Put it between quotes."),
        ("name=off", "name: false; expected text. Put it between quotes."),
        ("input.uri=3", "input.uri: 3; expected text. Put it between quotes."),
        ("input.uri=null", "input.uri: null; expected text."),
        ("input.uri={}", "input.uri: expected text."),
        ("model.class_names=off", "class_names: false; expected text. Write null for none."),
        ("limits.min_rows=many", "limits.min_rows: 'many'; expected a whole number."),
        ("limits.min_rows=1.5", "limits.min_rows: 1.5; expected a whole number."),
        ("limits.max_psi=much", "limits.max_psi: 'much'; expected a number."),
        ("limits.max_psi=.nan", "limits.max_psi: nan; expected a finite number."),
        ("limits.max_quarantined=-1", "-1; expected a number of at least 0."),
        ("limits.max_quarantined=2", "2; expected a number of at most 1."),
        ("limits.max_usd=0", "limits.max_usd: 0; expected a number above 0."),
        ("lanes.mix_devices=maybe", "'maybe'; expected true or false."),
        ("output.delta=[]", "output.delta: []; expected true or false or text."),
        ("model.head=logits", "model.head: 'logits'; expected 'classes' or 'scores'."),
        ("metrics={textfile: a.txt}", "'a.txt'; expected a path that ends in .prom."),
        ("window={deadline: noon}", "'noon'; expected a time of day such as \"07:00\"."),
        (
            "name=Users!",
            "'Users!'; expected lower case letters, digits, `-` and `_`, the first one no sign.",
        ),
    ],
)
def test_a_wrong_value_is_told_in_our_own_words(tmp_path: Path, override: str, said: str) -> None:
    assert complaint(tmp_path, GOOD, override).endswith(said)


def test_both_ways_to_be_wrong_of_one_value_are_one_problem(tmp_path: Path) -> None:
    said = complaint(tmp_path, GOOD, "output.delta=[]", "limits.min_rows=x", "name=X")
    assert said.endswith("(2 more problems.)")


def test_an_unknown_key_may_have_the_name_of_a_type(tmp_path: Path) -> None:
    assert "str: unknown key." in complaint(tmp_path, GOOD, "str=1")
    assert "output.bool: unknown key." in complaint(tmp_path, GOOD, "output.bool=1")
