"""The command line: the only place where pipeline and trainer meet."""
