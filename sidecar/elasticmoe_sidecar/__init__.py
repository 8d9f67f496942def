"""One sidecar a rank: it registers, reports, and brings its instance to the coordinator's goal.

`journal` remembers the newest goal, `converge` says what to do next (pure), `engine` calls launcher
and gate, `observe` reads them, `agent` puts them together, `leave` and `http` are the way out and
the view from outside. A sidecar is never in the data path: when it dies, streams go on.
"""
