"""The two APIs that the operator calls: Kubernetes' and the coordinator's."""
