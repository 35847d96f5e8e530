"""Dense float64 twins of what gkd computes sparsely, for tests."""
