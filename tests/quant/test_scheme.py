"""Schemes: what fits a width, what is stored, what is read back, and which names a pattern means."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from qruntime.errors import CheckpointError
from qruntime.quant.scheme import (
    DTYPE_BYTES,
    GROUP_SIZES,
    PLAIN,
    ROTATIONS,
    Scheme,
    SchemeMap,
    name_matches,
)

quick = settings(max_examples=50, deadline=None)
quantised = st.one_of(
    st.sampled_from(GROUP_SIZES).map(lambda size: Scheme("int4", group_size=size)),
    st.sampled_from((0, *ROTATIONS)).map(lambda size: Scheme("int8", rotation=size)),
)
schemes = st.one_of(st.just(PLAIN), quantised)
columns = st.integers(1, 20_000) | st.integers(1, 40).map(lambda blocks: 32 * blocks)
plain_dtypes = st.sampled_from(["F32", "BF16", "F16"])
words = st.text("abz_0", min_size=1, max_size=3).filter(lambda word: not word.isdigit())
indices = st.integers(0, 999).map(str)
names = st.lists(st.one_of(words, indices), min_size=1, max_size=6).map(tuple)


@quick
@given(schemes, columns)
def test_what_is_fitted_divides_the_width_and_keeps_the_kind_if_it_can(scheme: Scheme, k: int) -> None:
    fitted = scheme.fit(k)
    for size in (fitted.group_size, fitted.rotation):
        assert not size or k % size == 0
    if scheme.kind == "int4":
        assert fitted.group_size in (scheme.group_size, 32) or fitted == Scheme("int8")
        assert (fitted.kind == "int4") == (k % 32 == 0)
        assert (fitted == scheme) == (k % scheme.group_size == 0)
    else:
        assert fitted.kind == scheme.kind
        assert fitted.rotation == max((r for r in ROTATIONS if r <= scheme.rotation and k % r == 0), default=0)


@quick
@given(schemes, columns)
def test_fitting_twice_changes_nothing(scheme: Scheme, k: int) -> None:
    assert scheme.fit(k).fit(k) == scheme.fit(k)


@quick
@given(schemes, st.integers(1, 500), columns, plain_dtypes)
def test_parts_have_the_bits_that_the_format_promises(scheme: Scheme, n: int, k: int, plain: str) -> None:
    fitted = scheme.fit(k)
    parts = fitted.parts(n, k, plain)
    total = sum(math.prod(part.shape) * DTYPE_BYTES[part.dtype] for part in parts)
    expected = {
        "plain": n * k * DTYPE_BYTES[plain],
        "int8": n * k + 4 * n,
        "int4": n * k // 2 + 4 * n * k // (fitted.group_size or 1),
    }
    assert total == expected[fitted.kind]
    assert len({part.suffix for part in parts}) == len(parts)
    # Rows come first, so that matrices of one width lie stacked when their parts lie behind each other.
    assert all(part.shape[0] == n for part in parts)
    assert all(a.shape[1:] == b.shape[1:] for a, b in zip(parts, fitted.parts(n + 1, k, plain), strict=True))


@quick
@given(quantised)
def test_json_and_back(scheme: Scheme) -> None:
    assert Scheme.from_json(scheme.to_json(), "a.*.weight") == scheme


def test_the_words_of_the_format() -> None:
    """What other programs read; a change here is another format."""
    assert Scheme("int4", group_size=64).to_json() == {"type": "int4", "group_size": 64}
    assert Scheme("int8").to_json() == {"type": "int8"}
    assert Scheme("int8", rotation=256).to_json() == {"type": "int8", "rotation": 256}
    assert [str(s) for s in (PLAIN, Scheme("int4", group_size=32), Scheme("int8", rotation=64))] == [
        "plain",
        "int4/g32",
        "int8/h64",
    ]
    assert [part.suffix for part in Scheme("int4", group_size=64).parts(2, 64, "BF16")] == [".q", ".scale", ".zero"]
    assert [part.suffix for part in Scheme("int8").parts(2, 64, "BF16")] == [".q", ".scale"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
near_misses = st.fixed_dictionaries(
    {"type": st.sampled_from(["int4", "int8", "int8", "int4", "plain", "INT4", 4, None])},
    optional={
        "group_size": st.sampled_from([0, 16, 32, 48, 64, 128, 256, -64, "64", None, True, 64.5, [64]]),
        "rotation": st.sampled_from([0, 32, 64, 96, 128, 256, 512, -64, "64", None, False, [64]]),
        "extra": st.just(1),
    },
)


@quick
@given(st.one_of(json_values, near_misses))
@example({"type": "int4", "group_size": 64, "rotation": 64})
@example({"type": "int8", "group_size": 64})
@example({"type": "int8", "rotation": 32})
@example({"type": "int4"})
def test_what_is_read_is_of_the_format_or_refused(fields: object) -> None:
    try:
        scheme = Scheme.from_json(fields, "name")
    except CheckpointError:
        return
    assert isinstance(fields, dict)
    assert fields["type"] == scheme.kind
    assert (fields.get("group_size") or 0) == scheme.group_size
    assert (fields.get("rotation") or 0) == scheme.rotation
    if scheme.kind == "int4":
        assert scheme.group_size in (32, 64, 128)
        assert scheme.rotation == 0
    else:
        assert scheme.kind == "int8"
        assert scheme.group_size == 0
        assert scheme.rotation in (0, 64, 128, 256)


def test_plain_is_not_written_down() -> None:
    with pytest.raises(CheckpointError):
        Scheme.from_json(PLAIN.to_json(), "a")


@quick
@given(names)
def test_a_name_matches_itself_and_with_stars_for_indices(name: tuple[str, ...]) -> None:
    pattern = ["*" if part.isdigit() else part for part in name]
    assert name_matches(".".join(name), ".".join(name))
    assert name_matches(".".join(pattern), ".".join(name))


@quick
@given(names, names)
def test_a_pattern_matches_only_what_it_spells(pattern: tuple[str, ...], name: tuple[str, ...]) -> None:
    starred = tuple("*" if part.isdigit() else part for part in pattern)
    same_form = len(starred) == len(name) and all(
        (star == "*" and part.isdigit()) or star == part for star, part in zip(starred, name, strict=True)
    )
    assert name_matches(".".join(starred), ".".join(name)) == same_form
    assert name_matches(".".join(pattern), ".".join(name)) == (pattern == name)


@quick
@given(names, words)
def test_a_star_is_one_index_and_nothing_else(name: tuple[str, ...], word: str) -> None:
    assert name_matches(".".join((*name, "*")), ".".join((*name, "7")))
    for other in ((*name, word), name, (*name, "7", "7"), (*name, ""), (*name, "-1")):
        assert not name_matches(".".join((*name, "*")), ".".join(other))


@quick
@given(names, st.lists(st.tuples(names, quantised), max_size=5))
def test_the_first_pattern_that_matches_holds(
    name: tuple[str, ...], pairs: list[tuple[tuple[str, ...], Scheme]]
) -> None:
    patterns = {".".join("*" if part.isdigit() else part for part in parts): scheme for parts, scheme in pairs}
    joined = ".".join(name)
    matching = [scheme for pattern, scheme in patterns.items() if name_matches(pattern, joined)]
    assert SchemeMap(patterns)(joined) == (matching[0] if matching else PLAIN)


@quick
@given(names, quantised, quantised)
def test_order_decides(name: tuple[str, ...], one: Scheme, other: Scheme) -> None:
    exact, starred = ".".join((*name, "3")), ".".join((*name, "*"))
    assume("*" not in exact)
    assert SchemeMap({exact: one, starred: other})(exact) == one
    assert SchemeMap({starred: other, exact: one})(exact) == other
    assert SchemeMap({exact: one, starred: other})(".".join((*name, "4"))) == other
    assert SchemeMap()(exact) == PLAIN
