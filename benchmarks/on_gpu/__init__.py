"""The parts of `benchmarks.gpu`: products in two layouts, every kernel, whole steps, losses."""
