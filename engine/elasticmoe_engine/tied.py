"""`python -m elasticmoe_engine.tied PARENT PROGRAM …` becomes a program that dies with PARENT."""

from __future__ import annotations

import os
import sys

from elasticmoe_engine.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
