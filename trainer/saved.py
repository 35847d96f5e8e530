"""What a checkpoint holds, declared: a file that holds anything else is refused by the field."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import torch
from torch import Tensor, nn

from gkd.storage.errors import ConfigError
from gkd.trainer.logging import LOSSES

T = TypeVar("T")
Step = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]  # NaN is in no range
_REMEDY = "resume from another checkpoint beside it, or train into another folder"


class SavedStudent(msgspec.Struct, frozen=True):
    """What a checkpoint must hold to be read as a student; other fields are a run's."""

    config: dict[str, dict[str, Any]]
    data: tuple[int, int, str, str]
    model: dict[str, Tensor]
    step: Step
    accuracy: dict[str, Share]


class _Window(msgspec.Struct, frozen=True):
    losses: Tensor | None
    taken: Step


class _Rng(msgspec.Struct, frozen=True):
    cpu: Tensor
    cuda: Tensor | None


class _OptimizerState(msgspec.Struct, frozen=True):
    state: dict[int, dict[str, Tensor]]


class _Centers(msgspec.Struct, frozen=True):
    folder: str
    tensors: list[str]
    sha256: dict[str, str]


class SavedRun(SavedStudent, frozen=True):
    """The types and ranges of what ``RunState.state`` returns, and of the centres' names."""

    best: Share | None
    best_step: Annotated[int, msgspec.Meta(ge=-1)]
    evaluated: Step
    skipped: tuple[Step, Step]
    divergence: tuple[Finite | None, Finite, Step]
    window: _Window
    fit: Tensor | None
    rng: _Rng
    optimizer: _OptimizerState
    centers_optimizer: dict[str, Tensor]
    scaler: dict[str, Finite]
    centers: _Centers

    def tensors(
        self, parameters: Sequence[Tensor], num_images: int
    ) -> Iterator[tuple[str, Tensor, Sequence[int]]]:
        """Name, tensor and expected shape of all float32 tensors but the weights."""
        for number, held in self.optimizer.state.items():
            for name, tensor in held.items():
                own = number < len(parameters) and name != "step"
                shape = parameters[number].shape if own else ()
                yield f"optimizer.{name} of parameter {number}", tensor, shape
        for name, tensor in self.centers_optimizer.items():
            yield f"centers_optimizer.{name}", tensor, ()
        if self.window.losses is not None:
            yield "window.losses", self.window.losses, (len(LOSSES),)
        if self.fit is not None:
            yield "fit", self.fit, (num_images,)


def as_declared(content: Mapping[str, Any], kind: type[T], path: Path) -> T:
    """The content of the checkpoint ``path`` as the struct ``kind``, field by field.

    Raises:
        ConfigError: naming the first field that is absent, or of another type or range.
    """
    try:
        return msgspec.convert(content, kind)
    except (msgspec.ValidationError, RecursionError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: expected a checkpoint of a run as gkd writes it, got other content ({error})"
            f"; {_REMEDY}"
        ) from error


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load a checkpoint's weights, which must be those of the model: names, shapes, dtypes, finite.

    Raises:
        ConfigError: if they are not.
    """
    own = model.state_dict()
    try:
        for name, tensor in weights.items():
            if name in own and (fault := misfit(tensor, own[name].dtype, own[name].shape)):
                raise ValueError(f"{name}: {fault}")
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: its weights do not fit its configuration: {error}; {_REMEDY}"
        ) from error


def misfit(tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> str:
    """What keeps a tensor from being plain, finite numbers of this type and shape; or empty."""
    odd = tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided
    if odd or tensor.is_nested or tensor.is_neg() or tensor.dtype != dtype:
        return f"expected {dtype} in a plain tensor, got {tensor.dtype} in {type(tensor).__name__}"
    if tensor.shape != torch.Size(shape):
        return f"expected {list(shape)}, got {list(tensor.shape)}"
    return "" if bool(torch.isfinite(tensor).all()) else "expected finite numbers, got others"
