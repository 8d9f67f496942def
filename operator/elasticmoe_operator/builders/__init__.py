"""One file for each child object: what it should be, as a plain dict. Pure."""
