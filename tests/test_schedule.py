"""Schedules: the published tables, validation, plans."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tome import schedule
from tome.utils import parse_r

PUBLISHED = [
    (12, 8, [8] * 12),
    (12, (8, 0.0), [8] * 12),
    (12, (8, -1.0), [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]),
    (12, (16, -1.0), [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]),
    (12, (8, 1.0), [0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16]),
    (24, (8, 0), [8] * 24),
    (4, [3, 2], [3, 2, 0, 0]),
    (4, [], [0, 0, 0, 0]),
    (1, (8, -1.0), [8]),
]


@pytest.mark.parametrize(("depth", "r", "expected"), PUBLISHED, ids=str)
def test_parse_r_gives_the_published_schedules(depth, r, expected):
    assert parse_r(depth, r) == expected


def test_parse_r_refuses_a_ratio():
    with pytest.raises(TypeError, match=r"use tome\.schedule\.plan"):
        parse_r(12, 0.1)


@given(depth=st.integers(1, 48), r=st.integers(0, 64), inflection=st.floats(-1, 1))
def test_inflected_schedules_follow_the_formula(depth, r, inflection):
    result = parse_r(depth, (r, inflection))
    assert len(result) == depth
    assert all(0 <= entry <= 2 * r for entry in result)
    assert abs(sum(result) - depth * r) <= depth + 1
    assert result == sorted(result, reverse=inflection < 0) or r == 0


@given(
    r=st.one_of(st.integers(0, 300), st.floats(0.01, 0.99), st.lists(st.integers(0, 99), max_size=12)),
    tokens=st.integers(0, 300),
    prefix=st.integers(0, 5),
)
def test_plans_never_merge_more_than_half_of_the_free_tokens(r, tokens, prefix):
    if prefix > tokens:
        with pytest.raises(ValueError, match="prefix must be in"):
            schedule.plan(r, 12, tokens, prefix)
        return
    plan = schedule.plan(r, 12, tokens, prefix)
    assert len(plan.tokens) == 13
    for i, merged in enumerate(plan.r):
        assert plan.tokens[i] - plan.tokens[i + 1] == merged
        assert 0 <= merged <= (plan.tokens[i] - prefix) // 2


def test_a_ratio_is_of_the_free_tokens_without_rounding_traps():
    assert schedule.plan(0.29, 1, 101).r == (29,)
    assert schedule.plan(0.1, 3, 101).tokens == (101, 91, 82, 74)
    assert schedule.plan(0.9, 1, 101).r == (50,)


WRONG = [
    (-1, ValueError, "r must not be negative, got -1"),
    (True, TypeError, "must be an int, got True"),
    (None, TypeError, "r must be an int, .*, got None"),
    (0.0, ValueError, r"ratio must be in \(0, 1\), got 0.0"),
    (1.0, ValueError, r"ratio must be in \(0, 1\), got 1.0"),
    (float("nan"), ValueError, "got nan"),
    ((8,), ValueError, "use a list for one r per layer"),
    ((8, 1, 2), ValueError, r"must be \(r, inflection\)"),
    ((8.5, 1), TypeError, "r must be an int, got 8.5"),
    ((8, "x"), TypeError, "inflection must be a number"),
    ((8, float("nan")), ValueError, "inflection must be in"),
    ([1] * 13, ValueError, "r has 13 entries for a model of 12 layers"),
    ([1, -1], ValueError, r"r\[1\] must not be negative"),
    ([0.5], TypeError, r"r\[0\] must be an int, got 0.5"),
]


@pytest.mark.parametrize(("r", "error", "message"), WRONG, ids=str)
def test_wrong_schedules(r, error, message):
    with pytest.raises(error, match=message):
        schedule.plan(r, 12, 197)


TOO_LARGE = [
    (98, None),
    (99, "of 197 tokens, 1 of them protected, a layer can merge at most 98, not 99"),
    (16, None),  # later layers have too few tokens for it, which is no mistake
    ((49, -1.0), None),
    ((50, -1.0), "at most 98, not 100"),
    ([0, 200], "at most 98, not 200"),
    (0.5, None),
    (0.6, "at most 98, not 117"),
    ([], None),
]


@pytest.mark.parametrize(("r", "reason"), TOO_LARGE, ids=str)
def test_what_no_layer_can_follow_is_said_with_the_cap(r, reason):
    found = schedule.too_large(r, 12, 197)
    assert found is None if reason is None else found.endswith(reason)


class Host(torch.nn.Module):
    """A model whose r warns, as a patched one's does."""

    @property
    def r(self):
        return self.value

    @r.setter
    def r(self, value):
        schedule.warn_if_clipped(value, 12, 197)
        self.value = value


def test_a_clipped_schedule_warns_once_where_it_is_set():
    model = Host()
    with pytest.warns(UserWarning, match=r"r = 200 is clipped: of 197 tokens, .* at most 98, not 200") as warned:
        model.r = 200
    assert [warning.filename for warning in warned] == [__file__]
    model.r = 98


@pytest.mark.parametrize("r", [8, (8, -1.0), [8, 8, 4], 0.05, [3, 1]])
def test_schedules_in_files(tmp_path, r):
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"r": r, "more": 1}))
    loaded = schedule.load(file)
    assert (loaded, type(loaded)) == (r, type(r))
    file.write_text(json.dumps(r))
    assert schedule.load(str(file)) == r


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not JSON"),
        ("{]", "is not JSON"),
        ("\udcff", "is not JSON"),
        ("{}", 'has no "r"'),
        ('{"r": null}', "r must be an int"),
        ('{"r": [8, -1]}', r"r\[1\] must not be negative"),
        ('{"r": [8, 1.5, 2]}', r"r\[1\] must be an int"),
        ('{"r": [8, -7.0]}', "inflection must be in"),
        ('{"r": -1}', "must not be negative"),
        ('{"r": true}', "must be an int"),
    ],
)
def test_files_without_a_schedule_are_named(tmp_path, text, reason):
    file = tmp_path / "bad.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=reason) as error:
        schedule.load(file)
    assert str(file) in str(error.value)
    with pytest.raises(FileNotFoundError):
        schedule.load(tmp_path / "none.json")
