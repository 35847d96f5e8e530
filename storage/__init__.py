"""Records and cached targets on disk: numpy, no torch."""
