"""Autograd functions of the hot paths: what they save, and in which layout they multiply."""
