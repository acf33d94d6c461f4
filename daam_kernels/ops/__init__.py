"""The operators of ``torch.ops.daam_kernels``: schema, fake kernels, autograd. Only this package knows torch.library."""
