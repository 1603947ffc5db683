"""Fixtures of the integration tests."""

from tests.integration.mlflow_stores import mlflow_server, mlflow_sqlite, mlflow_template

__all__ = ["mlflow_server", "mlflow_sqlite", "mlflow_template"]
