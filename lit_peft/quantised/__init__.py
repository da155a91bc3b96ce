"""Linear layers whose frozen weights are stored in four bits, and reading a model straight into them."""
