"""Portable GPU kernels in Triton with their launchers; imports torch and triton only."""
