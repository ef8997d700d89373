"""The plan, as properties: it is pure, loses no row, mixes no shapes and runs the largest first."""

import copy
import itertools

from hypothesis import given
from hypothesis import strategies as st

from fluxcli.core.records import Adapter, Group
from fluxcli.job.plan import Plan, bucket, padded_sizes, plan

_sides = st.sampled_from([64, 80, 512, 1024, 4096])
ONE, TWO = Adapter("one", "1" * 64, 1.0), Adapter("two", "2" * 64, 0.5)
_sets = st.sampled_from([(), (ONE,), (ONE, TWO)])
_groups = st.builds(Group, _sides, _sides, st.sampled_from([64, 128, 512]), st.sampled_from([1, 4, 28]), _sets)
_inputs = st.lists(_groups, max_size=40)
_batch_sizes = st.integers(1, 9)
_lengths = st.lists(st.integers(1, 512), min_size=1, max_size=5, unique=True).map(lambda each: tuple(sorted(each)))


def plans(groups: list[Group], batch_size: int) -> list[Plan]:
    return [plan(groups, batch_size), plan(groups, batch_size, padded_sizes(batch_size))]


@given(_inputs, _batch_sizes)
def test_every_row_runs_exactly_once(groups: list[Group], batch_size: int) -> None:
    for planned in plans(groups, batch_size):
        assert sorted(row for batch in planned for row in batch.rows) == list(range(len(groups)))


@given(_inputs, _batch_sizes)
def test_a_batch_mixes_neither_shapes_nor_steps_nor_adapters(groups: list[Group], batch_size: int) -> None:
    for planned in plans(groups, batch_size):
        for batch in planned:
            key = batch.key
            group = Group(key.height, key.width, key.text_length, batch.num_inference_steps, batch.adapters)
            assert {groups[row] for row in batch.rows} == {group}


@given(_inputs, _batch_sizes)
def test_a_batch_has_at_most_batch_size_rows(groups: list[Group], batch_size: int) -> None:
    for planned in plans(groups, batch_size):
        for batch in planned:
            assert 1 <= len(batch.rows) <= batch.key.batch_size <= batch_size


@given(_inputs, _batch_sizes)
def test_only_the_last_batch_of_a_group_is_short(groups: list[Group], batch_size: int) -> None:
    for planned in plans(groups, batch_size):
        assert len(planned) == sum(-(-groups.count(group) // batch_size) for group in set(groups))


@given(_inputs, _batch_sizes)
def test_without_sizes_nothing_is_padded(groups: list[Group], batch_size: int) -> None:
    assert all(batch.key.batch_size == len(batch.rows) for batch in plan(groups, batch_size))


@given(_inputs, _batch_sizes)
def test_a_tail_is_padded_to_the_nearest_size_that_holds_it(groups: list[Group], batch_size: int) -> None:
    sizes = padded_sizes(batch_size)
    for batch in plan(groups, batch_size, sizes):
        assert batch.key.batch_size == min(size for size in sizes if size >= len(batch.rows))


@given(st.integers(1, 1024))
def test_padded_sizes_ascend_to_the_batch_size_and_waste_less_than_half(batch_size: int) -> None:
    sizes = padded_sizes(batch_size)
    assert sizes[0] == 1
    assert sizes[-1] == batch_size
    assert all(low < high <= 2 * low for low, high in itertools.pairwise(sizes))


@given(_inputs, _batch_sizes)
def test_the_largest_shapes_of_a_set_of_adapters_come_first(groups: list[Group], batch_size: int) -> None:
    for planned in plans(groups, batch_size):
        for _, batches in itertools.groupby(planned, key=lambda batch: batch.adapters):
            images = [batch.key.height * batch.key.width // 256 + batch.key.text_length for batch in batches]
            assert images == sorted(images, reverse=True)
        shapes = planned.shapes()
        assert [key.tokens() for key in shapes] == sorted((key.tokens() for key in shapes), reverse=True)
        assert len(shapes) == len(set(shapes))
        assert set(shapes) == {batch.key for batch in planned}


@given(_inputs, _batch_sizes)
def test_each_set_of_adapters_is_merged_once_and_none_come_first(groups: list[Group], batch_size: int) -> None:
    for planned in plans(groups, batch_size):
        sets = [adapters for adapters, _ in itertools.groupby(batch.adapters for batch in planned)]
        assert sorted(map(len, sets)) == sorted(map(len, {group.adapters for group in groups}))
        assert () not in sets[1:]
        assert planned.swaps == len([adapters for adapters in sets if adapters])


@given(_inputs, _batch_sizes)
def test_rows_of_a_group_keep_the_inputs_order(groups: list[Group], batch_size: int) -> None:
    for planned in plans(groups, batch_size):
        for group in set(groups):
            rows = [row for batch in planned for row in batch.rows if groups[row] == group]
            assert rows == sorted(rows)


@given(_inputs, _batch_sizes)
def test_planning_is_pure(groups: list[Group], batch_size: int) -> None:
    before = copy.deepcopy(groups)
    assert plan(groups, batch_size) == plan(iter(groups), batch_size)
    assert groups == before


@given(_inputs, _inputs, _batch_sizes)
def test_a_growing_input_leaves_full_batches_as_they_are(first: list[Group], more: list[Group], size: int) -> None:
    full = [(batch.key, tuple(batch.rows)) for batch in plan(first, size) if len(batch.rows) == size]
    grown = {(batch.key, tuple(batch.rows)) for batch in plan(first + more, size)}
    assert set(full) <= grown


@given(st.integers(0, 2000), _lengths)
def test_a_bucket_is_the_smallest_that_holds_the_prompt_else_the_largest(tokens: int, lengths: tuple[int, ...]) -> None:
    chosen = bucket(tokens, lengths)
    holding = [length for length in lengths if length >= tokens]
    assert chosen == (min(holding) if holding else max(lengths))


def test_no_rows_make_no_batches() -> None:
    assert len(plan([], 8)) == 0
    assert plan([], 8).shapes() == []


@given(_inputs, _batch_sizes, st.data())
def test_rows_of_one_prompt_follow_each_other(groups: list[Group], batch_size: int, data: st.DataObject) -> None:
    drawn = [data.draw(st.integers(0, 5)) for _ in groups]
    first = [drawn.index(prompt) for prompt in drawn]
    order = [row for batch in plan(groups, batch_size, prompts=first) for row in batch.rows]
    assert sorted(order) == list(range(len(groups)))
    runs = [key for key, _ in itertools.groupby((groups[row], first[row]) for row in order)]
    assert len(runs) == len(set(runs))


def test_each_group_may_have_its_own_batch_size() -> None:
    small, large = Group(64, 64, 64, 4), Group(128, 128, 64, 4)
    made = plan([small] * 10 + [large] * 3, {small: 8, large: 2}.__getitem__, (1, 2, 4, 8))
    assert [(batch.key.height, batch.key.batch_size, len(batch.rows)) for batch in made] == [
        (128, 2, 2), (128, 1, 1), (64, 8, 8), (64, 2, 2),
    ]  # fmt: skip


def test_adapters_are_told_apart_by_their_bytes_and_scales_not_by_their_paths() -> None:
    same, halved = Adapter("elsewhere/one", ONE.sha256, 1.0), Adapter("one", ONE.sha256, 0.5)
    groups = [Group(64, 64, 64, 4, adapters=(each,)) for each in (ONE, halved, same)]
    assert [[*batch.rows] for batch in plan(groups, 8)] == [[0, 2], [1]]
