"""Model Quarantine's core: tensors, bytes, files and frozen dataclasses.

Nothing in this package touches the network, environment variables, kfp, mlflow or boto3.
"""

__version__ = "0.1.0"
