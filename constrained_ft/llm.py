"""The language model p_theta and its frozen copies.

Shape suffixes:  B sequences, L token positions, N rows, D hidden width, V vocabulary.

The trunk (everything below the output head) runs in the trunk's precision; the head is
`fused.Head`, whose logits are float32 always.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import peft
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from constrained_ft.config import LLMConfig
from constrained_ft.distributed import World
from constrained_ft.encoding import pad_id
from constrained_ft.errors import ModelError
from constrained_ft.frozen_layers import FrozenLayers, StatesBelow
from constrained_ft.fused import Head
from constrained_ft.packing import Packed, Slots, Tree, pack
from constrained_ft.sharding import Root, divide_weights, gathered, put_weights, remove_weights

_ROW_SLOTS = 256  # most of a packed row; longer ones spend more on attention than they save

CLASS_HEAD = "class_head"  # of a model's attributes

Found = TypeVar("Found")


class FrozenLLM:
    """A copy of the LLM that training cannot change: the reference p.

    Frozen base weights are shared with the LLM; the trained tensors (adapters, or all weights) are
    this copy's own and are swapped in for the length of a call. Of an LLM whose weights are
    sharded, all weights are this copy's own, and whole.
    """

    def __init__(
        self,
        llm: "LLM",
        trained: Mapping[str, Tensor],
        head: Head,
        class_head: Tensor | None = None,
    ) -> None:
        self._llm = llm
        self._trained = dict(trained)
        self.head = head
        self.class_head = class_head
        """Weights of the head that tells labels, [2, D]: the logit of the positive class second."""
        self.tokenizer = llm.tokenizer
        self.device = llm.device
        self.bf16 = llm.bf16
        self.slots = llm.slots
        self.below: StatesBelow | None = None
        """Where decoding keeps what frozen layers make of prompts and completions, if anywhere;
        only where this `has_frozen_layers`."""

    @torch.no_grad()
    def trunk(self, **inputs: Any) -> Any:
        """The transformers output of the trunk; keyword arguments as in transformers."""
        with self._llm.autocast():
            return torch.func.functional_call(self._llm.trunk, self._trained, kwargs=inputs)

    def read(
        self, ids_BL: Int[Tensor, "B L"], mask_BS: Int[Tensor, "B S"], cache: Any = None
    ) -> tuple[Float[Tensor, "B D"], Any]:
        """Read tokens behind those that a cache holds.

        Args:
            ids_BL: the new tokens.
            mask_BS: 0 at the padding on the left, for all positions so far and the new ones.
            cache: what was returned for the S - L positions before; None where there are none.

        Returns:
            The last hidden state of each row's last token, and the model's cache of keys and
            values, which is the same object with the new positions in it.
        """
        keyword = self._llm.cache_keyword
        positions_BS = (mask_BS.cumsum(-1) - 1).clamp_min(0)
        output = self.trunk(
            input_ids=ids_BL,
            attention_mask=mask_BS,
            position_ids=positions_BS[:, -ids_BL.shape[1] :],
            use_cache=True,
            **{keyword: cache},
        )
        return output.last_hidden_state[:, -1], getattr(output, keyword)

    def hidden_states(
        self, ids_BL: Int[Tensor, "B L"], lengths_B: Int[Tensor, " B"]
    ) -> Float[Tensor, "B L D"]:
        """Last hidden states of right-padded sequences; index j predicts token j + 1."""
        inputs = right_padded_inputs(ids_BL, lengths_B)
        hidden: Tensor = self.trunk(**inputs, use_cache=False).last_hidden_state
        return hidden

    @torch.no_grad()
    def generate(self, **settings: Any) -> Int[Tensor, "B L"]:
        """transformers' `generate`, as asked for and no more; returns prompts and completions.

        A checkpoint's own defaults (truncation, penalties) would sample from another distribution.
        """
        module, defaults = self._llm.module, self._llm.module.generation_config
        module.generation_config = GenerationConfig()
        try:
            with self._llm.autocast():
                found: Tensor = torch.func.functional_call(
                    _Generate(module), self._llm.whole(self._trained, self.head), kwargs=settings
                )
        finally:
            module.generation_config = defaults
        return found

    @property
    def peft_model(self) -> peft.PeftModel | None:
        """Where adapters are trained; with live weights, not this copy's."""
        return self._llm.peft_model

    def adapter(self) -> dict[str, Tensor]:
        """This copy's adapters, by the names that PEFT gives them in files.

        Raises:
            ModelError: where all weights are trained.
        """
        if self.peft_model is None:
            raise ModelError("there are no adapters where llm.lora=null")
        own = self._llm.whole(self._trained, self.head)
        prefix = "base_model.model."
        state = {f"{prefix}{name.removeprefix('module.')}": part for name, part in own.items()}
        found: dict[str, Tensor] = peft.get_peft_model_state_dict(self.peft_model, state)
        return found

    @property
    def context_length(self) -> int | None:
        """The longest sequence the model takes, in tokens; None where no limit is known."""
        config = self._llm.module.config.get_text_config()
        length: int | None = getattr(config, "max_position_embeddings", None)
        return length

    @property
    def moves_caches(self) -> bool:
        """Whether sequences can lie side by side in a row, and keys and values move from there.

        The cache of a layer with a window counts what it has read.
        """
        return self._llm.packs and self._llm.window is None

    def pack(self, trees: Sequence[Tree]) -> Packed:
        """Lay trees out as this model takes them."""
        return self._llm.pack(trees)

    def packed_states(
        self, packed: Packed, below_SD: Float[Tensor, "S D"] | None = None
    ) -> Float[Tensor, "S D"]:
        """Last hidden states of every slot of a packed batch.

        Args:
            packed: the batch.
            below_SD: what `states_below` has for its slots, where that was kept: those layers are
                not run again.
        """
        layers = self._llm.frozen_layers
        if below_SD is None or layers is None:
            return self.read_packed(packed, keep=False)[0]
        with layers.replaced_by(below_SD.view(*packed.ids_BL.shape, -1)):
            return self.read_packed(packed, keep=False)[0]

    @property
    def has_frozen_layers(self) -> bool:
        """Whether there are layers below the first trained one, so `states_below` stay the same."""
        return self._llm.frozen_layers is not None

    def states_below(self, packed: Packed) -> Float[Tensor, "S D"]:
        """What enters the first trained layer, for every slot of a packed batch.

        The same for every frozen copy of an LLM. Only where `has_frozen_layers`.
        """
        return self._llm.states_below(packed)

    def watched(self) -> AbstractContextManager[list[Float[Tensor, "B L D"]]]:
        """A list that passes fill with the same, each with one tensor, where `below` is set."""
        if self.below is None:
            return nullcontext([])
        layers = self._llm.frozen_layers
        assert layers is not None
        return layers.watched()

    def read_packed(self, packed: Packed, *, keep: bool = True) -> tuple[Float[Tensor, "S D"], Any]:
        """Last hidden states of every slot, and the model's cache, [B, L] as the batch is."""
        self.slots.add(int(packed.lengths_B.sum()), packed.ids_BL.numel())
        output = self.trunk(**self._llm.packed_inputs(packed), use_cache=keep)
        cache = getattr(output, self._llm.cache_keyword, None)
        return output.last_hidden_state.flatten(0, 1), cache


class _Generate(nn.Module):
    """`functional_call` calls `forward` and nothing else."""

    def __init__(self, module: PreTrainedModel) -> None:
        super().__init__()
        self.module = module

    def forward(self, **settings: Any) -> Tensor:
        """Token ids."""
        found: Tensor = self.module.generate(**settings)  # type: ignore[operator]  # a method that transformers mixes in
        return found


class LLM:
    """The language model that is fine-tuned.

    A new one reads a row for every sequence; `tryout.tried_out` finds what else it can do.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        config: LLMConfig,
        peft_model: peft.PeftModel | None,
        bf16: bool,
    ) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.config = config
        self.device = module.device
        self.slots = Slots()
        """What it and its frozen copies have read."""
        self.checkpoints = False
        """Whether backward passes compute activations again."""
        self.peft_model = peft_model
        """Where adapters are trained."""
        self._bf16 = bf16
        self.trunk: nn.Module = module.base_model
        # Renamed in transformers 5.24, model by model.
        takes = inspect.signature(self.trunk.forward).parameters
        self.cache_keyword = "cache" if "cache" in takes else "past_key_values"
        self._root: Root | None = None
        self._world = World.alone()  # who shares the weights
        self._still = False  # whole weights that nothing trains meanwhile
        head = _head_of(module)
        self._frozen_head = None if head.weight_VD.requires_grad else head
        self.module.eval()
        text = module.config.get_text_config()
        self.window: int | None = getattr(text, "sliding_window", None)
        """How many tokens back the model reads; None is all of them."""
        self.packs = False
        """Whether it keeps apart the sequences that lie side by side in a row."""
        self.frozen_layers: FrozenLayers | None = None
        """The layers below the first trained one, where that can be run without them."""
        self.still_below = False
        """Whether those give the same while it is trained."""

    @property
    def head(self) -> Head:
        """The live head; its weight carries gradients when all weights are trained.

        Such a weight is whole inside `inside` alone where weights are sharded.
        """
        return _head_of(self._live) if self._frozen_head is None else self._frozen_head

    @property
    def class_head(self) -> Tensor | None:
        """Weights of the head that tells labels, live, [2, D]; None where there is none."""
        layer: nn.Linear | None = getattr(self._live, CLASS_HEAD, None)
        return None if layer is None else layer.weight

    @property
    def is_sharded(self) -> bool:
        """Whether each rank has a part of the weights."""
        return self._root is not None

    @property
    def _live(self) -> PreTrainedModel:
        """What is trained: `module`, or a copy with sharded weights; `module` has none then."""
        return self.module if self._root is None else self._root.module

    def shard(self, world: World) -> None:
        """Divide the weights among ranks, each of which has to do this; before an optimizer."""
        self._root, self._world = divide_weights(self.module, world), world
        self.frozen_layers = None  # every pass gathers every layer

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """`module` with whole weights, which nothing may train meanwhile.

        All ranks that share the weights take part. A frozen copy made here is valid here.
        """
        root = self._root
        if root is None:
            yield
            return
        with self._world.together():
            whole = {n: gathered(p.detach()) for n, p in root.module.named_parameters()}
        put_weights(self.module, whole)
        self._root, self._still = None, True
        try:
            yield
        finally:
            remove_weights(self.module)
            self._root, self._still = root, False

    def _together(self) -> AbstractContextManager[None]:
        """For what gathers weights: ranks that share them begin it together, or learn why not."""
        return self._world.together() if self.is_sharded else nullcontext()

    def inside(self, compute: Callable[[], Found]) -> Found:
        """Compute a loss with the live weights; see `sharding.Root`."""
        if self._root is None:
            return compute()
        found: Found = self._root(compute)
        return found

    @property
    def bf16(self) -> bool:
        """Whether the trunk multiplies in bfloat16."""
        return self._bf16

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The trunk's precision."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Dropout and gradient checkpointing on, for the length of an update."""
        live = self._live
        live.train()
        try:
            yield
        finally:
            live.eval()

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        self._enable_checkpoints()
        if self.peft_model is not None:
            self.module.enable_input_require_grads()
        self.checkpoints = True

    def _enable_checkpoints(self) -> None:
        self.module.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )

    @contextmanager
    def keeping_activations(self) -> Iterator[None]:
        """Training as it would be without `checkpoint_activations`."""
        if self.checkpoints:
            self.module.gradient_checkpointing_disable()
        try:
            with self.training():
                yield
        finally:
            if self.checkpoints:
                self._enable_checkpoints()

    def hidden_states(
        self, ids_BL: Int[Tensor, "B L"], lengths_B: Int[Tensor, " B"]
    ) -> Float[Tensor, "B L D"]:
        """Last hidden states of right-padded sequences, with gradients; j predicts token j + 1."""
        with self.autocast():
            inputs = right_padded_inputs(ids_BL, lengths_B)
            hidden: Tensor = self.trunk(**inputs, use_cache=False).last_hidden_state
        return hidden

    def pack(self, trees: Sequence[Tree]) -> Packed:
        """Lay trees out: side by side where the model can keep them apart, else a row for each.

        There a token reads its sequence from the start, so no sequence may be longer than a window
        that limits how far back tokens read.
        """
        window = self.window or _ROW_SLOTS
        longest = max(len(t.stem) + max(map(len, t.branches), default=0) for t in trees)
        apart = not self.packs or (self.window is not None and longest > window)
        return pack(trees, min(_ROW_SLOTS, window), pad_id(self.tokenizer), apart=apart)

    def packed_inputs(self, packed: Packed) -> dict[str, Tensor]:
        """Token ids, attention mask and positions of a packed batch."""
        if packed.apart:
            return right_padded_inputs(
                packed.ids_BL.to(self.device), packed.lengths_B.to(self.device)
            )
        mask = packed.mask_B1LL.to(self.device)
        if self.module.config._attn_implementation != "sdpa":
            lowest = torch.finfo(torch.float32).min
            mask = torch.zeros(mask.shape, device=self.device).masked_fill_(~mask, lowest)
        return {
            "input_ids": packed.ids_BL.to(self.device),
            "attention_mask": mask,
            "position_ids": packed.position_BL.to(self.device),
        }

    def packed_states(
        self, packed: Packed, below_SD: Float[Tensor, "S D"] | None = None
    ) -> Float[Tensor, "S D"]:
        """Last hidden states of every slot of a packed batch, with gradients.

        Args:
            packed: the batch.
            below_SD: what `states_below` has for its slots, where that was kept and the LLM
                `begins_above`: those layers are not run again.
        """
        self.slots.add(int(packed.lengths_B.sum()), packed.ids_BL.numel())
        if below_SD is None or self.frozen_layers is None:
            return self._pass(packed)
        with self.frozen_layers.replaced_by(below_SD.view(*packed.ids_BL.shape, -1)):
            return self._pass(packed)

    def _pass(self, packed: Packed) -> Float[Tensor, "S D"]:
        with self.autocast():
            inputs = self.packed_inputs(packed)
            trunk = self._live.base_model
            hidden_BLD: Tensor = trunk(**inputs, use_cache=False).last_hidden_state
        return hidden_BLD.flatten(0, 1)

    @property
    def begins_above(self) -> bool:
        """Whether an update's passes can begin with what `states_below` had before.

        Not where layers drop something out when they train, or are computed again for the backward
        pass.
        """
        return self.frozen_layers is not None and self.still_below and not self.checkpoints

    @torch.no_grad()
    def states_below(self, packed: Packed) -> Float[Tensor, "S D"]:
        """What enters the first trained layer, for every slot; only with `frozen_layers`.

        Not counted as read: whoever goes on from there counts the tokens.
        """
        assert self.frozen_layers is not None
        return self.frozen_layers.alone(lambda: self._pass(packed)).flatten(0, 1)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name."""
        return {n: p for n, p in self._live.named_parameters() if p.requires_grad}

    def whole_trained(self) -> dict[str, Tensor]:
        """The same whole, on every rank; all that share the weights have to ask.

        Raises:
            CftError: what another one of them failed with meanwhile.
        """
        with self._together():
            return {n: gathered(p.detach()) for n, p in self.trained_parameters().items()}

    def frozen(self) -> FrozenLLM:
        """A frozen copy of the LLM as it is now; all ranks that share the weights make it.

        Raises:
            CftError: what another one of them failed with meanwhile.
        """
        copies, types = not (self.is_sharded or self._still), self._types_of_copy()
        with self._together():
            trained = {
                name: gathered(tensor.to(types[name], copy=copies))
                for name, tensor, _ in self._own_of_trunk()
            }
            live = self.class_head
            class_head = None if live is None else gathered(live.detach()).clone()
            head = self._whole_head()
        if class_head is not None and not class_head.any():
            class_head = None  # a new one: it says nothing yet
        return FrozenLLM(self, trained, head, class_head)

    def without_adapters(self) -> FrozenLLM:
        """The model that the adapters were put on, where adapters are trained."""
        own = {
            name: torch.zeros_like(tensor) if trains else gathered(tensor)
            for name, tensor, trains in self._own_of_trunk()
        }
        return FrozenLLM(self, own, self._whole_head())

    def copied_bytes(self) -> int:
        """What a frozen copy takes, but for its head."""
        types = self._types_of_copy()
        own = self._live.base_model.named_parameters()
        kept = {n: p.numel() for n, p in own if p.requires_grad or self.is_sharded}
        return sum(count * types[name].itemsize for name, count in kept.items())

    def _types_of_copy(self) -> dict[str, torch.dtype]:
        """By name, how a frozen copy keeps the trunk's tensors.

        What linear layers multiply is rounded once: autocast would do so in every product. Of
        whole weights that stand still a copy has nothing of its own but adapters.
        """
        trunk = self._live.base_model
        layers = [part for part in trunk.modules() if isinstance(part, nn.Linear | Conv1D)]
        rounds = self._bf16 and not (self._still and self.peft_model is None)
        linear = {id(p) for part in layers for p in part.parameters(recurse=False) if rounds}
        return {
            name: torch.bfloat16 if id(parameter) in linear else parameter.dtype
            for name, parameter in trunk.named_parameters()
        }

    def _own_of_trunk(self) -> Iterator[tuple[str, Tensor, bool]]:
        """What a frozen copy does not share: names, tensors, and whether they are trained."""
        for name, parameter in self._live.base_model.named_parameters():
            if parameter.requires_grad or self.is_sharded:
                yield name, parameter.detach(), parameter.requires_grad

    def _whole_head(self) -> Head:
        head = self.head.frozen()
        bias = None if head.bias_V is None else gathered(head.bias_V)
        return replace(head, weight_VD=gathered(head.weight_VD), bias_V=bias)

    def whole(self, trained: Mapping[str, Tensor], head: Head) -> dict[str, Tensor]:
        """Trained tensors of the trunk and a head, under their names in `_Generate`."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        live = dict(self.trunk.named_parameters())
        found = {f"module.{names[id(live[name])]}": tensor for name, tensor in trained.items()}
        # A tied head is the trunk's; a frozen one is the module's own, where that has weights.
        layer = self.module.get_output_embeddings()
        assert isinstance(layer, nn.Linear)
        for name, parameter in layer.named_parameters(recurse=False):
            tensor = head.weight_VD if name == "weight" else head.bias_V
            if tensor is not None and (parameter.requires_grad or parameter.is_meta):
                found.setdefault(f"module.{names[id(parameter)]}", tensor.to(parameter.dtype))
        return found

    def load_trained(self, tensors: Mapping[str, Tensor]) -> None:
        """Put saved values of `trained_parameters` back."""
        with torch.no_grad():
            for name, parameter in self.trained_parameters().items():
                parameter.copy_(tensors[name])


def right_padded_inputs(
    ids_BL: Int[Tensor, "B L"], lengths_B: Int[Tensor, " B"]
) -> dict[str, Tensor]:
    """Token ids, attention mask (by length, never by token id) and positions."""
    positions_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    mask_BL = positions_L[None, :] < lengths_B[:, None]
    return {
        "input_ids": ids_BL,
        "attention_mask": mask_BL.long(),
        "position_ids": positions_L.expand_as(ids_BL),
    }


def _head_of(module: PreTrainedModel) -> Head:
    layer = module.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise ModelError(
            f"{type(module).__name__} has no linear output head ({type(layer).__name__}); "
            "use a causal language model"
        )
    parameters: dict[str, Tensor] = dict(layer.named_parameters(recurse=False))
    weight, bias = parameters["weight"], parameters.get("bias")
    bf16_valued = weight.dtype == torch.bfloat16
    if not weight.requires_grad:
        weight = weight.detach().float()
        bias = None if bias is None else bias.detach().float()
    return Head(weight_VD=weight, bias_V=bias, bf16_valued=bf16_valued)
