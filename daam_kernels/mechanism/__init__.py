"""Attention pooling for arrays: NumPy in, NumPy out, with training, files and a picture.

NumPy, tqdm and matplotlib are imported where they are needed; with torch tensors NumPy is not.
"""

from .attention import AttentionMechanism

__all__ = ["AttentionMechanism"]
