"""`python -m elasticmoe_cli` is `elasticmoe`."""

from elasticmoe_cli.main import app

if __name__ == "__main__":
    app()
