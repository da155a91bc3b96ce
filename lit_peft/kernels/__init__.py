"""Triton kernels and their launchers: the fast paths of the ops in `lit_peft.ops`, which hold the formulas."""
