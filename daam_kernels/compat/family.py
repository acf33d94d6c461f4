"""What every family of public modules has to say: how it is recognised, fused, brought back, and put to the test."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .recognition import Skip

Results = tuple[object, object]  # of the public module and of ours


class Family:
    """One kind of public module. ``context`` is what converts a whole model: it keeps what is shared or tied so."""

    role: str
    keeps_parameters = False  # ours has the very same parameters, not new ones made of several
    buffers: frozenset[str] = frozenset()  # of the public module and of ours, which the conversion knows of
    scratch: tuple[str, ...] = ()  # attributes in which the public forward leaves tensors with a graph
    tolerance = 1e-9

    def fits(self, module: nn.Module) -> bool:
        """Whether a module of this role has the family's attributes, parameters and submodules."""
        raise NotImplementedError

    def sources(self, module: nn.Module) -> list[tuple[nn.Parameter, ...]]:
        """The parameters of the public module that become one, group by group."""
        raise NotImplementedError

    def fuse(self, module: nn.Module, context) -> nn.Module:
        """Ours with the values of the public ``module``. Raises Skip."""
        raise NotImplementedError

    def restore(self, fused: nn.Module, module: nn.Module, context) -> nn.Module:
        """``module``, a copy of the original without parameters, with the values of ``fused``. Raises Skip."""
        raise NotImplementedError

    def note(self, module: nn.Module) -> str:
        """What ours does otherwise, where that may matter."""
        return ""

    def sample(self, trial: nn.Module, twin: nn.Module) -> Iterator[Results]:
        """Results to compare of a small sample: of the original, and of ours in float64; both may be changed."""
        raise NotImplementedError

    def check_sample(self, fused: nn.Module, module: nn.Module) -> None:
        """Run both on a small sample: code under a public name may still compute something else."""
        trial, twin = copy.deepcopy(module), copy.deepcopy(fused).to_empty(device="cpu").double()
        try:
            with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for theirs, ours in self.sample(trial, twin):
                    torch.testing.assert_close(
                        theirs, ours, rtol=self.tolerance, atol=1e-3 * self.tolerance, equal_nan=True
                    )
        except Skip:
            raise
        except Exception as error:
            what = str(error).strip().partition("\n")[0]
            name = type(module).__name__
            raise Skip(f"{name} computes something else than the public class: {what}") from None


def waves(*sizes: int, start: int = 1) -> Tensor:
    """Numbers within [-1, 1] that look irregular and are the same every time, float64."""
    count = torch.Size(sizes).numel()
    return torch.arange(start, start + count, dtype=torch.float64, device="cpu").sin().view(sizes)
