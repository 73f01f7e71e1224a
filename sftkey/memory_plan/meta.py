"""A CPU or a GPU, imitated on torch's meta device, where tensors have a size and no numbers.

Autocast, the kernels of scaled dot product attention and dropout, NF4 and LoRA adapters, as far as
they change what is allocated and when. Adapters keep what peft's keep, and NF4 what bitsandbytes
keeps (tests compare): importing those takes seconds.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sftkey.memory_plan.held import Setting, features

META = torch.device("meta")
# What autocast runs in 16 bits, and what in 32.
NARROW = {
    *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"),
    *("conv1d", "conv2d", "scaled_dot_product_attention"),
}
WIDE = {
    *("softmax", "log_softmax", "layer_norm", "rms_norm", "group_norm", "norm", "pow", "rsqrt"),
    *("exp", "log", "sum", "prod", "cumsum", "softplus", "__pow__", "logsumexp", "reciprocal"),
}


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as these live.

    Args:
        held: Tensors that don't count.
        padded: What is asked of numbers that aren't there is a mask: is it all ones?
    """

    def __init__(self, held: Iterable[torch.Tensor], padded: bool) -> None:
        super().__init__()
        self.live = 0
        self.phase: Any = "forward"
        self.peaks: Counter[Any] = Counter()
        self._padded = padded
        storages = (each.untyped_storage() for each in held)
        self._seen: dict[int, Any] = {id(each): each for each in storages}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it makes."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return not self._padded if args[0].dtype == torch.bool else 1
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor):
                self._count(each.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = id(storage), storage.nbytes()
        if place in self._seen:
            return

        def freed(_: Any) -> None:
            del self._seen[place]
            self.live -= size

        self._seen[place] = weakref.ref(storage, freed)
        self.live += size
        self.peaks[self.phase] = max(self.peaks[self.phase], self.live)


class Device(TorchFunctionMode):
    """Does what a CPU or a GPU would: autocast, attention by its kernels, dropout.

    Args:
        setting: Says which.
        casts: The 16-bit copies of trained weights that autocast has made, by their id; None:
            they aren't kept until the end of the forward pass.
    """

    def __init__(self, setting: Setting, casts: dict[int, torch.Tensor] | None) -> None:
        super().__init__()
        self._cuda = setting.kind == "cuda"
        self._dtype = getattr(torch, setting.compute) if setting.mixed else None
        self._casts = casts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch's."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._dtype is not None and (name in NARROW or name in WIDE):
            args = self._cast(args, self._dtype if name in NARROW else torch.float32)
            kwargs = {key: self._cast(each, self._dtype) for key, each in kwargs.items()}
        drops = kwargs.get("dropout_p", 0.0) > 0 and not self._cuda  # no kernel of a CPU does
        if func is functional.scaled_dot_product_attention and not drops:
            return _attended(*args, **kwargs | {"cuda": self._cuda})
        if name == "_grouped_mm" and args[0].dtype != torch.bfloat16:  # meta has bfloat16's alone
            return torch.ops.transformers.grouped_mm_fallback(*[*args, *kwargs.values()][:3])
        if func is functional.dropout and self._cuda and kwargs.get("training", True):
            return torch.native_dropout(args[0], kwargs.get("p", 0.5), True)[0]
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._cast(each, dtype) for each in value)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        if self._casts is None or not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if value.dtype == dtype:
            return value
        return self._casts.setdefault(id(value), value.to(dtype))


def _attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # SDPA makes numbers of it
        attn_mask = attn_mask.to(query.dtype)
    return _Attention.apply(query, key, value, attn_mask, kwargs["cuda"])


class _Attention(torch.autograd.Function):
    """What the fused kernels keep and make: no weights, but the logarithm of their sums."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any, cuda: bool) -> Any:
        rows, heads, length, _ = query.shape
        found = torch.empty_like(query)  # in its order, but where CUDA's kernel for masks runs
        if (cuda and mask is not None) or value.shape[-1] != query.shape[-1]:
            found = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(rows, heads, length, dtype=torch.float32)
        ctx.cuda = cuda
        ctx.save_for_backward(query, key, value, mask, found, sums)
        return found

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        query, key, value, mask, _, sums = ctx.saved_tensors
        made = [torch.empty_like(sums)]
        if ctx.cuda and mask is None:  # flash attention adds up in float32, and all heads' own
            made.append(torch.empty_like(query, dtype=torch.float32))
            if query.shape[1] != key.shape[1]:
                made += [torch.empty_like(query), torch.empty_like(query)]
        return (*(torch.empty_like(each) for each in (query, key, value)), None, None)


class Head(torch.autograd.Function):
    """Stands for the output head, which is planned apart: a gradient comes back from it."""

    @staticmethod
    def forward(ctx: Any, states: Any) -> Any:
        """Return what stands for a loss."""
        ctx.like = states.shape, states.dtype
        return states.new_empty(())

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        """Return a gradient of the states."""
        return torch.empty(ctx.like[0], dtype=ctx.like[1], device=META)


class Adapted(nn.Module):
    """A linear module with LoRA adapters, which keeps what peft's keeps."""

    def __init__(self, base: Any, setting: Setting) -> None:
        super().__init__()
        self.base = base
        # peft widens inputs to the adapter's type, but for NF4 where it finds CUDA's autocast on.
        as_it_comes = setting.quantized and setting.mixed and setting.kind == "cuda"
        self.widens, self.dropout = not as_it_comes, setting.dropout
        sizes = features(base)
        self.context: Any = _lora(sizes, setting.context_rank)
        self.trained: Any = nn.ModuleList(_lora(sizes, rank) for rank in setting.ranks)
        self.context.requires_grad_(False)
        self.of_key = setting.context == "frozen"
        self.reading = False

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Run the module and the adapters that act in this pass."""
        result = self.base(inputs)
        acting = [self.context] if len(self.context) else []
        if not (self.of_key and self.reading) and len(self.trained) == 1:
            acting += list(self.trained)
        for lora in acting:
            result = result + lora[1](lora[0](self._dropped(inputs))) * 2.0
        if len(self.trained) > 1 and not self.reading:
            result = result + self._grid(inputs).to(result.dtype)
        return result

    def _dropped(self, inputs: torch.Tensor) -> torch.Tensor:
        inputs = inputs.float() if self.widens else inputs
        return functional.dropout(inputs, p=0.1, training=True) if self.dropout else inputs

    def _grid(self, inputs: torch.Tensor) -> torch.Tensor:
        """Run each adapter of a grid on its own copy of the rows, as key_adapter.joining."""
        most = max(lora[0].out_features for lora in self.trained)
        count, (wide_in, wide_out) = len(self.trained), features(self.base)
        first, second = self.trained[0][0].weight, self.trained[0][1].weight
        down = torch.stack([first.new_empty(most, wide_in) + first.sum()] * count)
        up = torch.stack([first.new_empty(wide_out, most) + second.sum()] * count)
        dropped = self._dropped(inputs.float())
        rows = dropped.reshape(count, -1, wide_in)
        return (rows @ down.mT @ (up * 2.0).mT).reshape(*inputs.shape[:-1], wide_out)


def _lora(sizes: tuple[int, int], rank: int) -> nn.Sequential:
    if not rank:
        return nn.Sequential()
    options: dict[str, Any] = {"bias": False, "device": META, "dtype": torch.float32}
    down = nn.Linear(sizes[0], rank, **options)
    return nn.Sequential(down, nn.Linear(rank, sizes[1], **options))


class Nf4(nn.Module):
    """A linear module in NF4: its weight is widened for each product, and its input isn't kept."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = features(linear)
        self.packed = nn.Parameter(
            torch.empty(-(-linear.weight.numel() // 2), dtype=torch.uint8, device=META), False
        )
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> Any:
        """Multiply; peft copies the product."""
        found = _Nf4Product.apply(inputs, self.packed, (self.out_features, self.in_features))
        return (found if self.bias is None else found + self.bias).clone()


class _Nf4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Any, packed: Any, shape: tuple[int, int]) -> Any:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return inputs.matmul(inputs.new_empty(shape).t())

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        return gradient[0].matmul(gradient[0].new_empty(ctx.shape)), None, None
