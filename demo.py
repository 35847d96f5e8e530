"""A small end-to-end run on faces that it draws, through the public commands."""
