"""The operators of ``torch.ops.daam_kernels``: schema, fake kernels, autograd. Only here is torch.library known."""
