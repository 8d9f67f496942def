"""The rules of a group, pure: no clock, no socket, no chance. `group.Group` is the way in."""
