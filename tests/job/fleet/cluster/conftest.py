"""A Ray cluster of two nodes on this machine, and jobs on it whose workers draw from seeds."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fluxcli.job.fleet.cluster.cluster import Cluster
from fluxcli.job.fleet.deadlines import Patience
from fluxcli.job.fleet.process import Workers

ROOT = Path(__file__).parents[4]
SMALL = {"object_store_memory": 10**8}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two, of one CPU and of two; the second has two GPUs and is another machine, or says so. While the file `bare` is
    there, fluxcli is not."""
    pytest.importorskip("ray")
    before = dict(os.environ)
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1")
    os.environ["BARE"] = str(bare := tmp_path_factory.mktemp("nodes") / "bare")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent / "blind"), str(ROOT)])
    from ray.cluster_utils import Cluster as Nodes

    try:
        cluster = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **SMALL})
        cluster.add_node(num_cpus=2, num_gpus=2, env_vars={"HOST": "second"}, **SMALL)
        cluster.bare = bare
        yield cluster
        cluster.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)


def workers(
    cluster: Cluster, count: int, patience: Patience | None = None, gpu: bool = False, **settings: Any
) -> Workers:
    """As `fleets.fleet`, on a cluster."""
    names = [f"worker {number}" for number in range(count)]

    def spawn(number: int, before: int) -> Any:
        return cluster.spawn("tests.job.fleet.drawing", names[number], before + 1, gpu)

    more = {} if patience is None else {"patience": patience}
    return Workers(settings, names, spawn, encoders=1, scattered=True, **more)


@pytest.fixture
def cluster(nodes: Any) -> Iterator[Cluster]:
    joined = Cluster(nodes.address)
    yield joined
    joined.close()


@pytest.fixture
def actors(cluster: Cluster) -> Callable[..., Workers]:
    """Workers of a test's own."""
    return partial(workers, cluster)
