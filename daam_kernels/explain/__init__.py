"""What a model with density attention attends to, in numbers and pictures: import it as ``daam_kernels.explain``.

    attention = explain.collect(model, loader)                   # averaged over a data set
    explain.plot_importance(attention, "importance.png")         # features by layers
    explain.plot_layer_contribution(attention, "layers.svg")
    explain.plot_density(model.attention, "density.png")         # the learned curves
    explain.plot_alignment(weights, source, target, "alignment.png")  # of AdditiveAttention, token by token

Source: Ioannides et al., arXiv 2401.11143. "Evaluation Metrics" there defines the importance factor,
IF_ij = (DA_ij - min(DA)) / (max(DA) - min(DA)), DA being the density attention maps averaged over the validation set;
its heat maps (Figure 2) have the output feature on the x axis and the encoder's layer on the y axis. Figure 3 is the
"percentage contribution of each layer to attention weights". Three choices are ours. The paper's code averages batches,
we average samples, which differs only where batches differ in size. Padding is left out of the average. And as neither
paper nor code gives a formula for Figure 3, a layer's contribution is its mean weight, over the sum of these means.

Pictures need matplotlib, the extra ``explain``; the numbers do not. Layers and features are numbered from 1.
"""

from .alignment import plot_alignment
from .collection import collect
from .importance import importance_factor, layer_contribution, write_importance
from .pictures import plot_density, plot_importance, plot_layer_contribution

__all__ = [
    "collect",
    "importance_factor",
    "layer_contribution",
    "plot_alignment",
    "plot_density",
    "plot_importance",
    "plot_layer_contribution",
    "write_importance",
]
