"""Which batch a lane takes next."""

from collections import Counter
from itertools import pairwise

from fluxcli.core.records import Adapter, Adapters, Group, ShapeKey
from fluxcli.job.plan import Plan, plan
from fluxcli.job.run.queue import ByShape, InOrder, Work

GROUPS = [Group(64, 64, length, 2) for length in (512, 256, 128, 64)]


class Lane:
    def __init__(self) -> None:
        self.idle = True
        self.shapes: set[ShapeKey] = set()
        self.adapters: Adapters = ()

    def ready(self, key: ShapeKey) -> bool:
        return key in self.shapes

    def take(self, queue: ByShape) -> ShapeKey:
        work = queue.take(self)
        assert work is not None
        self.shapes.add(work.planned.key)
        self.adapters = work.planned.adapters
        return work.planned.key


def planned(*rows: int) -> Plan:
    return plan([group for group, count in zip(GROUPS, rows, strict=False) for _ in range(count)], 4)


def test_one_lane_takes_the_plan_in_its_order_and_what_came_back_first() -> None:
    batches = [*planned(8, 4)]
    queue = InOrder(planned(8, 4))
    first = queue.take(Lane())
    assert first == Work(batches[0]) and len(queue) == 2
    queue.give_back([Work(batches[2]), first])
    assert [queue.take(Lane()) for _ in range(5)] == [*map(Work, (batches[2], *batches)), None]


def test_lanes_share_out_the_shapes_and_help_only_where_theirs_are_used_up() -> None:
    queue, lanes = ByShape(planned(400, 400, 400, 400)), [Lane() for _ in range(4)]
    made = Counter[ShapeKey]()
    for turn in range(400):
        made[lanes[turn % 4].take(queue)] += 1
    assert len(queue) == 0 and set(made.values()) == {100}
    assert [len(lane.shapes) for lane in lanes] == [1, 1, 1, 1]


def test_a_lane_without_work_helps_where_most_is_left_for_each() -> None:
    queue, lanes = ByShape(planned(8, 400, 40)), [Lane() for _ in range(4)]
    first = [lane.take(queue).text_length for lane in lanes]
    assert first == [512, 256, 128, 256]
    assert [lanes[0].take(queue).text_length for _ in range(2)] == [512, 256]


def test_suspects_come_last_and_to_idle_lanes() -> None:
    queue, lane = ByShape(planned(8)), Lane()
    work = queue.take(lane)
    assert work is not None
    queue.give_back([Work(work.planned, 1, suspect=True)])
    assert len(queue) == 2
    assert queue.take(lane) == Work([*planned(8)][1])
    lane.idle = False
    assert queue.take(lane) is None and len(queue) == 1
    lane.idle = True
    assert queue.take(lane) == Work(work.planned, 1, suspect=True)
    assert queue.take(lane) is None and not len(queue)


def test_what_comes_back_in_halves_is_made_next() -> None:
    queue, lane = ByShape(planned(8)), Lane()
    work = queue.take(lane)
    assert work is not None
    key = work.planned.key
    halves = [Work(type(work.planned)(key, 2, work.planned.rows[at : at + 2])) for at in (0, 2)]
    queue.give_back(halves)
    lane.shapes.add(key)
    assert [queue.take(lane) for _ in range(2)] == halves


def test_lanes_share_out_the_sets_of_adapters_and_each_goes_on_with_its_own() -> None:
    sets: list[Adapters] = [(), *((Adapter(str(n), str(n), 1.0),) for n in range(3))]
    groups = [
        Group(64, 64, length, 2, adapters=adapters) for adapters in sets for length in (64, 128) for _ in range(40)
    ]
    queue, lanes = ByShape(plan(groups, 4)), [Lane(), Lane()]
    taken: list[list[tuple[Adapters, ShapeKey]]] = [[], []]
    turn = 0
    while len(queue):
        key = lanes[turn % 2].take(queue)
        taken[turn % 2].append((lanes[turn % 2].adapters, key))
        turn += 1
    assert sum(map(len, taken)) == 80
    for each in taken:  # two shapes, four sets: a lane has a shape to itself and goes through the sets, each once
        assert len({key for _, key in each}) == 1
        assert {adapters for adapters, _ in each} == set(sets)
    swaps = [sum(one != other for (one, _), (other, _) in pairwise(each)) for each in taken]
    assert swaps == [3, 3]


def test_lanes_at_one_shape_take_sets_that_no_other_has_had() -> None:
    sets: list[Adapters] = [(Adapter(str(n), str(n), 1.0),) for n in range(3)]
    queue = ByShape(plan([Group(64, 64, 64, 2, adapters=adapters) for adapters in sets for _ in range(12)], 4))
    lanes = [Lane() for _ in range(3)]
    rounds = []
    for _ in range(3):
        for lane in lanes:
            lane.take(queue)
        rounds.append([lane.adapters for lane in lanes])
    assert rounds == [sets] * 3 and not len(queue)
    halves = ByShape(plan([Group(64, 64, 64, 2, adapters=sets[0])] * 8, 4))
    for lane in lanes[1:]:
        lane.take(halves)
    assert [lane.adapters for lane in lanes[1:]] == [sets[0]] * 2, "a lane without a set of its own helps"
