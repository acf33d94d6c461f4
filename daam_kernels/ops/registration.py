"""What every operator of the package tells torch.library once its schema and its backward's are defined."""

from __future__ import annotations

from typing import Callable

import torch


def register(
    library: torch.library.Library,
    name: str,
    *,
    forward: tuple[Callable, Callable],
    backward: tuple[Callable, Callable],
    gradient: Callable,
    setup_context: Callable,
    eager: str | None = None,
) -> None:
    """Registers ``name`` and ``name_backward``: each one's implementation on any device and its fake, and the gradient.

    ``eager`` is what to call for gradients of gradients, which the backward refuses; None: daam_kernels.``name``.
    """
    pair = {name: forward, f"{name}_backward": backward}
    for each, (implementation, fake) in pair.items():
        library.impl(each, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"daam_kernels::{each}", fake, lib=library)
    torch.library.register_autograd(f"daam_kernels::{name}", gradient, setup_context=setup_context, lib=library)

    def refuse(ctx, *_):
        raise RuntimeError(
            f"torch.ops.daam_kernels.{name}_backward is not differentiable itself; for gradients of gradients call "
            f"{eager or f'daam_kernels.{name}'} outside of torch.compile, with create_graph=True"
        )

    torch.library.register_autograd(f"daam_kernels::{name}_backward", refuse, lib=library)
