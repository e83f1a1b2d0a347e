"""Frozen linear layers whose weights are kept in 8 or 4 bits, and made into floats again, a layer at a time, for each product.

int8: a scale for each output, as a bfloat16 number. int4: for every 32 weights of an output their lowest, and the distance between
two of the 16 values that they can take, both in float16. That is GGUF's Q4_1, so a model that came as such a file loses next to nothing.
The weights of one input lie side by side, so that each operation runs over all outputs at once.

Legend: K blocks of 32 inputs.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 32


class Quantised(nn.Linear):
    """Computes what a linear layer with the weight `self.weight` does. No gradient reaches that: the weight stays as it is.

    It derives from a plain layer for those that look for one, as peft does, and holds no float weight as that would.
    """

    codes: nn.Parameter  # int8 [in, out], or two to a byte: uint8 [K, 16, out]

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.bias = plain.bias

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, in float32: [out, in]."""
        return self.dense(torch.float32).t().contiguous()

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The same in some type, as [in, out]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        product: Tensor = _Product.apply(x, self)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def plain(self) -> nn.Linear:
        """A linear layer with the weight that the codes stand for, on the CPU, in memory that the system may move to the disk."""
        with torch.device("meta"):
            layer = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        layer.weight = nn.Parameter(_paged(self.weight))
        layer.bias = nn.Parameter(self.bias.detach().cpu()) if self.bias is not None else None
        return layer


class Int8(Quantised):
    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain)
        weight = plain.weight.detach().float().t()
        scales = (weight.abs().amax(0) / 127).bfloat16()  # [out]
        codes = weight / scales.float().clamp(min=torch.finfo(torch.float32).tiny)
        self.codes = _constant(codes.round_().clamp_(-127, 127).to(torch.int8).contiguous())
        self.scales = _constant(scales)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.codes.to(dtype).mul_(self.scales.to(dtype))


class Int4(Quantised):
    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain)
        weight = F.pad(plain.weight.detach().float(), (0, -plain.in_features % BLOCK)).t()
        blocks = weight.reshape(-1, BLOCK, plain.out_features)  # [K, 32, out]
        lowest = blocks.amin(1, keepdim=True).half()
        scales = ((blocks.amax(1, keepdim=True) - lowest.float()) / 15).half()  # [K, 1, out]
        codes = (blocks - lowest.float()) / scales.float().clamp(min=torch.finfo(torch.half).smallest_normal)
        first, second = codes.round_().clamp_(0, 15).to(torch.uint8).split(BLOCK // 2, dim=1)
        self.codes, self.lowest, self.scales = _constant(first | second << 4), _constant(lowest), _constant(scales)

    def dense(self, dtype: torch.dtype) -> Tensor:
        blocks, half, out = self.codes.shape
        values = torch.empty(blocks, BLOCK, out, dtype=dtype, device=self.codes.device)
        values[:, :half] = self.codes & 15
        values[:, half:] = self.codes >> 4
        values.mul_(self.scales.to(dtype)).add_(self.lowest.to(dtype))
        return values.view(-1, out)[: self.in_features]


class _Product(torch.autograd.Function):
    """x [..., in] times the weight of a layer -> [..., out]. Nothing is kept for the gradient of x: the weight is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantised) -> Tensor:
        ctx.layer = layer
        return x @ layer.dense(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] @ ctx.layer.dense(grads[0].dtype).t(), None


def _paged(x: Tensor) -> Tensor:
    """A copy in a temporary file that has no name: a model that fits in few bits need not fit in 32."""
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(x.nbytes)
        held = torch.from_file(file.name, shared=True, size=x.numel(), dtype=x.dtype)
    return held.view(x.shape).copy_(x)


def _constant(x: Tensor) -> nn.Parameter:
    """What is saved with the model and never trained."""
    return nn.Parameter(x, requires_grad=False)


FORMS: dict[str, type[Quantised]] = {"int8": Int8, "int4": Int4}


def num_packed(model: nn.Module) -> tuple[int, int]:
    """How many weights of a model are kept so, and the bytes that they take."""
    packed = [module for module in model.modules() if isinstance(module, Quantised)]
    num_bytes = sum(part.nbytes for module in packed for part in _parts(module))
    return sum(module.in_features * module.out_features for module in packed), num_bytes


def num_weights(model: nn.Module) -> int:
    """How many weights a model has, in whatever form they are kept."""
    inside = {id(part) for module in model.modules() if isinstance(module, Quantised) for part in _parts(module)}
    return num_packed(model)[0] + sum(one.numel() for one in model.parameters() if id(one) not in inside)


def _parts(module: Quantised) -> list[nn.Parameter]:
    """What stands for its weight."""
    return [parameter for name, parameter in module.named_parameters() if name != "bias"]
