"""The language model p_theta and its frozen copies.

Shape suffixes:  B sequences, L token positions, N rows, D hidden width, V vocabulary.

The trunk (everything below the output head) runs in the trunk's precision; the head is
`fused.Head`, whose logits are float32 always.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import peft
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from constrained_ft.config import LLMConfig
from constrained_ft.encoding import pad_id
from constrained_ft.errors import ModelError
from constrained_ft.fused import Head
from constrained_ft.packing import Packed, Slots, Tree, pack, pad_right

_ROW_SLOTS = 256  # most of a packed row; longer ones spend more on attention than they save
_STRIDE = 37  # between the token ids that models are tried out on


class FrozenLLM:
    """A copy of the LLM that training cannot change: the reference p.

    Frozen base weights are shared with the LLM; the trained tensors (adapters, or all weights) are
    this copy's own and are swapped in for the length of a call.
    """

    def __init__(self, llm: "LLM", trained: Mapping[str, Tensor], head: Head) -> None:
        self._llm = llm
        self._trained = dict(trained)
        self.head = head
        self.tokenizer = llm.tokenizer
        self.device = llm.device
        self.bf16 = llm.bf16
        self.slots = llm.slots

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
    def packs(self) -> bool:
        """Whether sequences can lie side by side in a row."""
        return self._llm.packs

    def pack(self, trees: Sequence[Tree]) -> Packed:
        """Lay trees out as this model takes them."""
        return self._llm.pack(trees)

    def packed_states(self, packed: Packed) -> Float[Tensor, "S D"]:
        """Last hidden states of every slot of a packed batch."""
        return self.read_packed(packed, keep=False)[0]

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
    """The language model that is fine-tuned."""

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
        self._head = _head_of(module)
        self.module.eval()
        _check_head(self)
        self.packs = _can_pack(self)

    @property
    def head(self) -> Head:
        """The live head; its weight carries gradients when all weights are trained."""
        return self._head

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
        self.module.train()
        try:
            yield
        finally:
            self.module.eval()

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
        """Lay trees out: side by side where the model can keep them apart, else a row for each."""
        return pack(trees, _ROW_SLOTS, pad_id(self.tokenizer), apart=not self.packs)

    def packed_inputs(self, packed: Packed) -> dict[str, Tensor]:
        """Token ids, attention mask and positions of a packed batch."""
        if not self.packs:
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

    def packed_states(self, packed: Packed) -> Float[Tensor, "S D"]:
        """Last hidden states of every slot of a packed batch, with gradients."""
        self.slots.add(int(packed.lengths_B.sum()), packed.ids_BL.numel())
        with self.autocast():
            inputs = self.packed_inputs(packed)
            hidden_BLD: Tensor = self.trunk(**inputs, use_cache=False).last_hidden_state
        return hidden_BLD.flatten(0, 1)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name."""
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    def frozen(self) -> FrozenLLM:
        """A frozen copy of the LLM as it is now."""
        # Autocast would round adapters to the trunk's type again in every product.
        rounds = self._bf16 and self.peft_model is not None
        trained = {
            name: parameter.detach().to(torch.bfloat16 if rounds else parameter.dtype, copy=True)
            for name, parameter in self._trained_of_trunk()
        }
        return FrozenLLM(self, trained, self.head.frozen())

    def without_adapters(self) -> FrozenLLM:
        """The model that the adapters were put on, where adapters are trained."""
        zeros = {name: torch.zeros_like(parameter) for name, parameter in self._trained_of_trunk()}
        return FrozenLLM(self, zeros, self.head.frozen())

    def _trained_of_trunk(self) -> Iterator[tuple[str, nn.Parameter]]:
        return (pair for pair in self.trunk.named_parameters() if pair[1].requires_grad)

    def whole(self, trained: Mapping[str, Tensor], head: Head) -> dict[str, Tensor]:
        """Trained tensors of the trunk and a head, under their names in `_Generate`."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        live = dict(self.trunk.named_parameters())
        found = {f"module.{names[id(live[name])]}": tensor for name, tensor in trained.items()}
        # A tied head is the trunk's; a frozen one is the module's own.
        for parameter, tensor in (
            (self.head.weight_VD, head.weight_VD),
            (self.head.bias_V, head.bias_V),
        ):
            if parameter is not None and parameter.requires_grad and tensor is not None:
                found.setdefault(f"module.{names[id(parameter)]}", tensor)
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


@torch.no_grad()
def _check_head(llm: LLM) -> None:
    """Refuse models that change logits behind the head (softcap, scale): the KL would be wrong."""
    ids_BL, lengths_B = pad_right([_sequences(llm)[0][:4]], pad_id(llm.tokenizer), llm.device)
    with llm.autocast():
        own_BLV = llm.module(**right_padded_inputs(ids_BL, lengths_B)).logits.float()
    ours_BLV = llm.head(llm.hidden_states(ids_BL, lengths_B))
    gap = (own_BLV - ours_BLV).abs().max() / own_BLV.abs().max().clamp_min(1e-6)
    if not gap < (0.05 if llm.bf16 else 1e-3):
        raise ModelError(
            f"{type(llm.module).__name__} transforms its logits after the output head (relative "
            f"difference {gap:.2g}), which is not supported; use a model with a plain linear head"
        )


@torch.no_grad()
def _can_pack(llm: LLM) -> bool:
    """Whether the model keeps the sequences of one row apart, tried out on a few tokens."""
    if getattr(llm.module.config.get_text_config(), "sliding_window", None) is not None:
        return False  # the mask of a packed batch lets a token read its whole sequence
    first, second = _sequences(llm)
    trees = [
        Tree(stem=first, branches=(second[:4], second[4:])),
        Tree(stem=second, branches=(first,)),
    ]
    llm.packs = True
    try:
        packed = llm.pack(trees)
        together = llm.packed_states(packed)[torch.cat(packed.paths)]
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False  # flash attention, for one, takes no such mask
    llm.packs = False
    packed = llm.pack(trees)
    apart = llm.packed_states(packed)[torch.cat(packed.paths)]
    gap = (together - apart).float().norm() / apart.float().norm().clamp_min(1e-6)
    return bool(gap < (0.05 if llm.bf16 else 1e-3))


def _sequences(llm: LLM) -> list[tuple[int, ...]]:
    """Two sequences of 8 and 12 tokens out of the middle of the vocabulary.

    There are words, mostly. The first ids are often marks such as those of a chat's turns: there
    bfloat16 states are half noise, which differs with the layout of a batch.
    """
    size = len(llm.head.weight_VD)
    ids = [(size // 2 + _STRIDE * i) % size for i in range(20)]
    return [tuple(ids[:8]), tuple(ids[8:])]
