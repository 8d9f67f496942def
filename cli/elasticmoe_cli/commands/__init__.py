"""The commands, a file for each kind; what they do is imported when it is needed."""
