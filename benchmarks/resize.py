"""Resizes 2 -> 3 -> 2 -> 3 -> 2 under streaming load: with the product, then vLLM alone.

    python benchmarks/resize.py [--engine sim|vllm-cpu] [--clients N] [--out FILE]

Both have the same flags, sizes and users; vLLM alone is resized as `alone.py` says. Exit status 1
when a request failed with the product.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import alone
from elasticmoe_cli import demo, profiles
from elasticmoe_cli.errors import CommandFailed
from limits import limited
from rich.console import Console


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--engine", choices=("sim", "vllm-cpu"), default="sim")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for all of it")
    options = parser.parse_args()
    if not 1 <= options.clients <= 64 or options.limit <= 0:
        parser.error("--clients is 1 to 64, and --limit more than 0")
    console = Console(width=100, highlight=False)
    plan = demo.Plan(clients=options.clients)
    try:
        if options.out:
            demo.write(options.out)  # before minutes of work
        profile = profiles.find(options.engine)
        with limited(options.limit):
            product = demo.run(profile, plan, console)
            other = alone.run(profile, plan, console)
    except CommandFailed as failure:
        print(f"resize.py: {failure}", file=sys.stderr)
        return failure.status
    except KeyboardInterrupt:
        return 130
    console.print(alone.compare(product, other))
    if options.out:
        figures = {"with": product.as_json(), "alone": alone.as_json(other)}
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    return int(bool(product.failed or product.output_mismatches))


if __name__ == "__main__":
    sys.exit(main())
