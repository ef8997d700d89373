"""The step cache on a model that means something: nearer to the full run than as many plain steps, and as right."""

from jobs.bench.step_cache import meaning


def test_every_preset_is_nearer_to_the_full_run_than_fewer_steps() -> None:
    full, *others = meaning(10, 2, ("single", "pair"))["rows"]
    assert full["grey_levels"] == 0 and full["single"] == full["pair"] == 1
    assert [row["name"] for row in others[::2]] == ["fine", "balanced", "fast"]
    for preset, fewer in zip(others[::2], others[1::2], strict=True):
        assert preset["mask"].count("1") == fewer["steps"] < 10
        assert 0 < 2 * preset["grey_levels"] < fewer["grey_levels"], (preset, fewer)
        assert preset["single"] == preset["pair"] == 1
