"""Stage one: a teacher, its class centres, and the primary groups of every image."""
