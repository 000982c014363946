"""A Ray cluster of several nodes on this one machine, for the tests, in a process of its own each node."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"object_store_memory": 80 << 20, "include_dashboard": False}  # bytes


@contextmanager
def cluster(nodes: int) -> Iterator[Any]:
    """A head without processors, and so many nodes of one processor each."""
    pytest.importorskip("ray", reason="needs pip install 'loratune[ray]'")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
    try:
        for _ in range(nodes):
            made.add_node(num_cpus=1, **SMALL)
        yield made
    finally:
        if ray.is_initialized():
            ray.shutdown()
        made.shutdown()
