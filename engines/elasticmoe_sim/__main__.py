"""`python -m elasticmoe_sim --port ... --data-parallel-rank ...`: one rank by hand."""

import sys

if __name__ == "__main__":  # the engine core's process imports this module again
    from elasticmoe_sim.entry import main

    sys.exit(main(None, sys.argv[1:]))
