"""Load the LLM, attach what is trained, write it back: weights, adapters, precision, kernels."""

import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import peft
import safetensors
import safetensors.torch
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from constrained_ft.attention import GROUPED
from constrained_ft.config import LLMConfig, LoraConfig
from constrained_ft.distributed import default_device, wants_bf16
from constrained_ft.errors import CheckpointError, ModelError
from constrained_ft.llm import CLASS_HEAD, LLM, FrozenLLM
from constrained_ft.machine import release_freed
from constrained_ft.randomness import seed_everything
from constrained_ft.resources import explain_model_failure, resolve_model
from constrained_ft.tiny import CONTEXT_LENGTH, byte_tokenizer, tiny_model
from constrained_ft.tryout import tried_out

TINY = "tiny:"
_CLASS_HEAD_FILE = "class_head.safetensors"


def load_tokenizer(config: LLMConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the LLM.

    Raises:
        ModelError: when it is missing.
    """
    if config.model_name_or_path.startswith(TINY):
        return byte_tokenizer()
    source = resolve_model(config.model_name_or_path, config.revision)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, revision=config.revision
        )
    except (OSError, ValueError) as error:
        raise explain_model_failure(config.model_name_or_path, error) from error
    return tokenizer


def load_llm(
    config: LLMConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    precision: str,
    seed: int,
    class_head: bool = False,
) -> LLM:
    """Load the LLM and attach what will be trained.

    Args:
        config: the `llm` section.
        tokenizer: from `load_tokenizer`.
        precision: `trainer.precision`: `auto`, `bf16` or `fp32`.
        seed: of the adapters' initial weights.
        class_head: also put a head on that tells labels: the one that was exported with the model,
            or one that knows nothing yet, zeros.

    Raises:
        ModelError: when the model is missing or its head is not a plain linear layer.
    """
    bf16 = wants_bf16(precision, tiny=config.model_name_or_path.startswith(TINY))
    dtype = torch.float32
    if config.dtype == "bfloat16" or (config.dtype == "auto" and bf16 and config.lora):
        dtype = torch.bfloat16
    if dtype == torch.bfloat16 and config.lora is None:
        raise ModelError(
            "llm.dtype=bfloat16 with llm.lora=null: small updates of bfloat16 weights are lost to "
            "rounding; use llm.dtype=float32 (the arithmetic still follows trainer.precision)"
        )
    module = _load_module(config, dtype)
    peft_model = None
    if config.lora is not None:
        with seed_everything(seed):
            peft_model = _with_lora(module, config.lora)
        for layer in module.modules():
            if isinstance(layer, BaseTunerLayer):
                # Autocast sets the precision; PEFT's own cast would go to float32 and back.
                layer.cast_input_dtype_enabled = not bf16  # type: ignore[assignment]  # a bool
    if class_head:  # after the adapters, so that it gets none
        width = module.config.get_text_config().hidden_size
        found = _saved_class_head(config)
        _put_class_head(module, torch.zeros(2, width) if found is None else found)
    module.to(default_device())  # type: ignore[arg-type]  # transformers types `to` loosely
    llm = tried_out(LLM(module, tokenizer, config=config, peft_model=peft_model, bf16=bf16))
    if config.gradient_checkpointing is True:
        llm.checkpoint_activations()
    return llm


def plain_config(reference: str) -> LLMConfig:
    """The `llm` section for any transformers folder, hub id or wheel file as it is."""
    return LLMConfig(
        model_name_or_path=reference,
        revision=None,
        dtype="auto",
        attn_implementation="auto",
        gradient_checkpointing=False,
        lora=None,
    )


def load_frozen(config: LLMConfig, *, precision: str = "auto") -> FrozenLLM:
    """A model that is only read: its weights in the trunk's precision, without gradients.

    Raises:
        ModelError: when the model is missing or its head is not a plain linear layer.
    """
    tokenizer = load_tokenizer(config)
    bf16 = wants_bf16(precision, tiny=config.model_name_or_path.startswith(TINY))
    module = _load_module(config, torch.bfloat16 if bf16 else torch.float32)
    class_head = _saved_class_head(config)
    if class_head is not None:
        _put_class_head(module, class_head)
    module.requires_grad_(requires_grad=False)
    module.to(default_device())  # type: ignore[arg-type]  # transformers types `to` loosely
    llm = LLM(module, tokenizer, config=config, peft_model=None, bf16=bf16)
    return tried_out(llm).frozen()


def load_base(llm: LLM, *, precision: str) -> FrozenLLM:
    """The model as it was before training.

    With adapters it is at hand: adapters of zeros change nothing. Otherwise it is loaded again.

    Raises:
        ModelError: when the model is missing by now.
    """
    if llm.peft_model is None:
        return load_frozen(llm.config, precision=precision)
    return llm.without_adapters()


def export(llm: LLM, llm_dir: Path, adapter_dir: Path) -> None:
    """Write a folder that plain `AutoModelForCausalLM.from_pretrained` loads.

    LoRA is merged into a pristine float32 copy of the base, never into the weights that were
    trained on; the adapter alone is written beside it. A head that tells labels is a file of its
    own in each folder: `weight`, [2, D], as transformers' sequence classification has it.
    """
    if llm.peft_model is None:
        own = llm.module.state_dict()
        llm.module.save_pretrained(
            llm_dir, state_dict={n: t for n, t in own.items() if not n.startswith(CLASS_HEAD)}
        )
    else:
        llm.peft_model.save_pretrained(str(adapter_dir))
        base = _load_module(llm.config, torch.float32)
        merged = _with_lora(base, _require_lora(llm.config))
        state = peft.get_peft_model_state_dict(llm.peft_model)
        peft.set_peft_model_state_dict(merged, state)
        merged.merge_and_unload().save_pretrained(llm_dir)
    llm.tokenizer.save_pretrained(llm_dir)
    if llm.class_head is not None:
        weight_2D = llm.class_head.detach().float().cpu().contiguous()
        for folder in (llm_dir, *([] if llm.peft_model is None else [adapter_dir])):
            safetensors.torch.save_file({"weight": weight_2D}, folder / _CLASS_HEAD_FILE)


def write_adapter(llm: FrozenLLM, folder: Path) -> None:
    """Write the adapters of a frozen copy as PEFT does, for another process.

    Raises:
        ModelError: where all weights are trained.
        CheckpointError: when they cannot be written.
    """
    tensors = {name: part.float().cpu().contiguous() for name, part in llm.adapter().items()}
    assert llm.peft_model is not None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        llm.peft_model.active_peft_config.save_pretrained(str(folder))
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"the adapter cannot be written to {folder}: {error}") from error


@torch.no_grad()
def rehearse_export(llm: LLM, aside: Path, ids: Sequence[int]) -> None:
    """Export to a folder, read it back as a user would, compare, and delete it.

    Args:
        llm: before training.
        aside: the folder.
        ids: a text of the corpus; on token ids that mean nothing, bfloat16 errs widely.

    Raises:
        CheckpointError: when it cannot be written or read, or says something else than the LLM.
    """
    try:
        export(llm, aside / "llm", aside / "adapter")
        release_freed()  # what the copy of the base took
        again = AutoModelForCausalLM.from_pretrained(aside / "llm", dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"the model cannot be exported to {aside}: {error}") from error
    else:
        ids_BL = torch.tensor([ids])
        theirs_LV = again(input_ids=ids_BL).logits[0]
        lengths_B = torch.tensor([ids_BL.shape[1]], device=llm.device)
        states_BLD = llm.frozen().hidden_states(ids_BL.to(llm.device), lengths_B)
        ours_LV = llm.head(states_BLD[0]).float().cpu()
        gap = float((ours_LV - theirs_LV).norm() / ours_LV.norm().clamp_min(1e-6))
        if not gap < (0.1 if llm.bf16 else 1e-3):
            raise CheckpointError(
                f"the exported model says something else than the one in memory (logits differ by "
                f"{gap:.2g}): {type(llm.module).__name__} does not survive saving"
            )
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_context_length(config: LLMConfig) -> int | None:
    """The longest sequence the model takes, in tokens, without loading its weights.

    None where its configuration names no limit, as with ALiBi, which has no table of positions.

    Raises:
        ModelError: when the model is missing.
    """
    if config.model_name_or_path.startswith(TINY):
        return CONTEXT_LENGTH
    source = resolve_model(config.model_name_or_path, config.revision)
    try:
        found = AutoConfig.from_pretrained(source, revision=config.revision)
    except (OSError, ValueError) as error:
        raise explain_model_failure(config.model_name_or_path, error) from error
    length: int | None = getattr(found.get_text_config(), "max_position_embeddings", None)
    return length


def _load_module(config: LLMConfig, dtype: torch.dtype) -> PreTrainedModel:
    reference = config.model_name_or_path
    if reference.startswith(TINY):
        return tiny_model(reference.removeprefix(TINY), seed=0)
    try:
        module: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            resolve_model(reference, config.revision),
            revision=config.revision,
            dtype=dtype,
            attn_implementation=_attention(config),
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise explain_model_failure(reference, error) from error
    return module


def _saved_class_head(config: LLMConfig) -> Tensor | None:
    """Weights of the head that was exported with a model, [2, D]; None where there is none."""
    if config.model_name_or_path.startswith(TINY):
        return None
    file = Path(resolve_model(config.model_name_or_path, config.revision)) / _CLASS_HEAD_FILE
    if not file.is_file():
        return None
    try:
        return safetensors.torch.load_file(file)["weight"]
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise explain_model_failure(config.model_name_or_path, error) from error


def _put_class_head(module: PreTrainedModel, weight_2D: Tensor) -> None:
    layer = nn.Linear(weight_2D.shape[1], weight_2D.shape[0], bias=False)
    layer.weight = nn.Parameter(weight_2D.float())
    module.add_module(CLASS_HEAD, layer)


def _attention(config: LLMConfig) -> str:
    """The attention kernel: what is asked for, or the fastest that the architecture takes."""
    if config.attn_implementation != "auto":
        return config.attn_implementation
    source = resolve_model(config.model_name_or_path, config.revision)
    found = AutoConfig.from_pretrained(source, revision=config.revision)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(found), None)
    if default_device().type == "cpu" and getattr(
        architecture, "_supports_attention_backend", False
    ):
        return GROUPED
    return "sdpa" if getattr(architecture, "_supports_sdpa", False) else "eager"


def _require_lora(config: LLMConfig) -> LoraConfig:
    assert config.lora is not None
    return config.lora


def _with_lora(module: PreTrainedModel, lora: LoraConfig) -> peft.PeftModel:
    targets = lora.target_modules
    if lora.first_layer > 0:
        targets = _modules_from(module, lora)
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT types it int but divides it
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # GPT-2 stores its linear layers transposed; PEFT notices, adapts and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        # PEFT asks transformers for an attribute by its old name.
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        try:
            return peft.PeftModelForCausalLM(module, settings)
        except ValueError as error:
            raise ModelError(f"llm.lora.target_modules={lora.target_modules!r}: {error}") from error


def _modules_from(module: PreTrainedModel, lora: LoraConfig) -> tuple[str, ...]:
    """Full names of the modules that carry an adapter, from `lora.first_layer` on."""
    head = module.get_output_embeddings()
    names = []
    for name, layer in module.named_modules():
        number = re.search(r"\.(\d+)\.", name)
        if number is None or int(number[1]) < lora.first_layer or layer is head:
            continue
        if lora.target_modules == "all-linear":
            wanted = isinstance(layer, nn.Linear | Conv1D)
        else:
            wanted = any(f".{name}".endswith(f".{target}") for target in lora.target_modules)
        if wanted:
            names.append(name)
    if not names:
        raise ModelError(
            f"llm.lora.first_layer={lora.first_layer}: {type(module).__name__} has no module of "
            f"llm.lora.target_modules={lora.target_modules!r} in a layer from there on; its layers "
            "are counted from 0"
        )
    return tuple(names)
