"""Attention pooling beside plain PyTorch, eager and compiled: time and peak memory, ragged bags among them."""
