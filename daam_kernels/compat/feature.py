"""The paper's per-feature attention: one Gaussian for every feature, over the layers of an encoder."""

from __future__ import annotations

import contextlib
import copy

from torch import Tensor, nn

from .family import Family, waves
from .names import MultiHeadDAAM
from .recognition import Skip, holds

_HEADS = ("daams", "gcts")  # what the public code calls its list of heads
_PARAMETERS = {"mean_offset": "mean_offsets", "c": "c"}  # of a head, and ours


class FeatureHead(Family):
    """``DAAM``. Fused only within MultiHeadDAAM, which takes one time step: beyond one it mixes time and features."""

    role = "feature head"

    def fits(self, module):
        return (
            set(module._parameters) == set(_PARAMETERS)
            and [type(part) for part in module._modules.values()] == [nn.AdaptiveAvgPool1d]
            and {"eps", "attention_weights"} <= vars(module).keys()
        )

    def fuse(self, module, context):
        raise Skip("outside of a MultiHeadDAAM it may be given several time steps, which it mixes with the features")


class FeatureHeads(Family):
    """``MultiHeadDAAM``."""

    role = "feature heads"
    scratch = ("y_transform",)

    def fits(self, module):
        name = _heads_name(module)
        return bool(name) and holds(module, name, "feature head") and {"num_heads", "head_dim"} <= vars(module).keys()

    def sources(self, module):
        return [tuple(getattr(head, name) for head in _heads(module)) for name in _PARAMETERS]

    def fuse(self, module, context):
        heads = _heads(module)
        if not heads or module.num_heads != len(heads):
            raise Skip(f"num_heads is {module.num_heads}, and there are {len(heads)} heads")
        eps = [head.eps for head in heads]
        if any(each != eps[0] for each in eps):
            raise Skip(f"its heads have different values of eps: {eps}")
        features = heads[0].c.numel()
        try:
            layers = module.num_heads * module.head_dim
            new = MultiHeadDAAM(layers, 1, features, module.num_heads, eps=eps[0], device="meta")
        except (TypeError, ValueError) as error:
            raise Skip(str(error)) from None
        for (name, own), group in zip(_PARAMETERS.items(), self.sources(module)):
            setattr(new, own, context.stack(name, group, (1, features)))
        new.attention_weights = [copy.deepcopy(head.attention_weights) for head in heads]
        return new

    def restore(self, fused, module, context):
        if fused.padding_value is not None:
            raise Skip("the original class knows no padding")
        module.train(fused.training)
        for index, head in enumerate(_heads(module)):
            head.eps = fused.eps
            head.attention_weights = copy.deepcopy(fused.attention_weights[index])
            for name, own in _PARAMETERS.items():
                setattr(head, name, context.split(getattr(fused, own), (1, fused.feature_size))[index])
        return module

    def sample(self, trial, twin):
        twin.backend = "reference"
        layers, features = twin.num_layers, twin.feature_size
        for index, head in enumerate(_heads(trial)):
            head.mean_offset = nn.Parameter(0.1 * waves(1, features, start=index))
            head.c = nn.Parameter(1.5 + 0.5 * waves(1, features, start=7 + index))
        if _takes(trial, waves(2, layers, 3, features)):
            raise Skip("it takes several time steps, which the paper's class mixes with the features")
        twin.load_state_dict(trial.state_dict())
        x = waves(2, layers, features)
        for one in (x, x.unsqueeze(2), x[:1]):
            yield trial(one), twin(one)
        theirs = None
        with contextlib.suppress(AttributeError):  # in some of the public code, details look for the other list's name
            theirs = trial(x, save_attention_weights=True)
        if theirs is not None:
            ours = twin(x, save_attention_weights=True)
            yield theirs[0], ours[0]
            yield [each["attention_maps"][-1] for each in theirs[1]], [each["attention_maps"][-1] for each in ours[1]]


def _takes(trial: nn.Module, x: Tensor) -> bool:
    try:
        trial(x)
    except Exception:
        return False
    return True


def _heads_name(module: nn.Module) -> str | None:
    return next((name for name in _HEADS if name in module._modules), None)


def _heads(module: nn.Module) -> list[nn.Module]:
    return list(getattr(module, _heads_name(module)))
