"""Records and cached targets on disk: numpy; torch only where a file of torch's is read."""
