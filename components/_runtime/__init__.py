"""The only code that touches S3, MLflow, keys and environment variables."""
