"""Fixtures of the tests of the sweep."""

from tests.pipelines.sweep.fixtures import connection, drifted, memory, queue

__all__ = ["connection", "drifted", "memory", "queue"]
