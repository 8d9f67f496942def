"""The coordinator: `core` has the rules, the rest carries them out."""
