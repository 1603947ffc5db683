"""From a registered model version to one submitted run: webhook, durable queue, worker."""
