"""The command `elasticmoe`."""
