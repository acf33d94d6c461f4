"""Triton kernels. Nothing here but launch configurations is imported before the first call that needs it."""
