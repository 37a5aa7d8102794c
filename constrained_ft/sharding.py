"""The LLM's weights divided among ranks by FSDP2, and the files that hold them.

Only the update runs on divided weights. What samples, measures or is exported has whole ones,
gathered for its length. Gradients are summed over the ranks, not averaged: every count in the loss
is that of all ranks already.

Files are those of `torch.distributed.checkpoint` in its safetensors form: each rank writes what it
has, and any number of ranks reads them again. Its other form is read with pickle, which can run
code.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from constrained_ft.distributed import World, default_device

Found = TypeVar("Found")


class Root(nn.Module):
    """A model with divided weights, and what is computed with it.

    A layer's weights are whole while it runs, all others (embeddings, head) while `forward` runs:
    so a loss that reads the head is computed in there.
    """

    def __init__(self, module: PreTrainedModel) -> None:
        super().__init__()
        self.module = module

    def forward(self, compute: Callable[[], Found]) -> Found:
        """What `compute` returns; the tensors in it may carry gradients."""
        return compute()


def divide_weights(module: PreTrainedModel, world: World) -> Root:
    """A copy of a model that has its weights, divided; the model itself is left without any.

    Every rank of `world` has to do this, with the same weights. An optimizer is made afterwards.
    """
    parameters = list(module.parameters())
    copied = copy.deepcopy(module, memo={id(one): one for one in parameters})
    remove_weights(module)
    mesh = DeviceMesh.from_group(world.bulk_group, default_device().type)
    layers = getattr(module, "_no_split_modules", None) or ()
    for part in list(copied.modules()):
        if type(part).__name__ in layers:
            fully_shard(part, mesh=mesh)
    root = Root(copied)
    fully_shard(root, mesh=mesh)
    for part in root.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return root


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a divided tensor, which all ranks ask for; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor: all of one that is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def put_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model weights by their names in `named_parameters`; tied ones stay tied."""
    named = module.named_parameters()
    new = {id(p): nn.Parameter(tensors[n], requires_grad=p.requires_grad) for n, p in named}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = new[id(parameter)]


def remove_weights(module: nn.Module) -> None:
    """Leave nothing of the weights but names, shapes and types."""
    put_weights(module, {n: p.detach().to("meta") for n, p in module.named_parameters()})


def write_shards(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Write tensors, of which each rank has a part; all ranks do this.

    Raises:
        OSError: on all ranks, when one cannot write.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    kept = {name: tensor.detach() for name, tensor in tensors.items()}
    alone = world.size == 1
    try:
        with _quiet():
            save(
                kept,
                storage_writer=writer,
                process_group=None if alone else world.control_group,
                no_dist=alone,
            )
    except CheckpointException as error:
        raise OSError(f"{folder.name}: {_reasons(error)}") from error


def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, divided or not, with what `write_shards` wrote; each rank reads its own part.

    Raises:
        ValueError: when names, shapes or types differ, parts are missing, or a file cannot be read.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        saved = reader.read_metadata().state_dict_metadata
        if saved.keys() != tensors.keys():
            names = sorted(saved.keys() ^ tensors.keys())[:3]
            raise ValueError(f"it lacks or adds {', '.join(names)}")
        for name, tensor in tensors.items():
            there = saved[name]
            facts = getattr(there, "size", None), getattr(there, "properties", None)
            dtype = getattr(facts[1], "dtype", None)
            if (facts[0], dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(
                    f"{name} is {tuple(facts[0] or ())} {dtype} there and {tuple(tensor.shape)} "
                    f"{tensor.dtype} here"
                )
            if not _are_all_rows(getattr(there, "chunks", ()), tensor.shape):
                raise ValueError(f"parts of {name} are missing or there twice")
        with _quiet():
            load(dict(tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise ValueError(f"{folder.name}: {_reasons(error)}") from error
    except SafetensorError as error:  # what it raises is a bare Exception
        raise ValueError(f"{folder.name}: {error}") from error


def _are_all_rows(parts: Sequence[ChunkStorageMetadata], shape: torch.Size) -> bool:
    """Whether parts are those of a tensor divided by rows; what is missing would stay unset."""
    if not shape:
        return len(parts) == 1
    end = 0
    for offsets, sizes in sorted((tuple(one.offsets), tuple(one.sizes)) for one in parts):
        if offsets != (end, *(0 for _ in shape[1:])) or sizes[1:] != tuple(shape[1:]):
            return False
        end += sizes[0]
    return end == shape[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remark that a rank works by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _reasons(error: CheckpointException) -> str:
    return "; ".join(str(reason) for reason, _ in error.failures.values())
