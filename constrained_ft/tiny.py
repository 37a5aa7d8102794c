"""Small random language models with a byte-level tokenizer, built in memory: nothing is fetched.

They stand in for real models in tests and in `experiment=smoke`.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from constrained_ft.errors import ConfigError
from constrained_ft.randomness import seed_everything

END_OF_TEXT = "<|endoftext|>"
CONTEXT_LENGTH = 256
_CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of 256 bytes and one end-of-text token, which is also the padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_OF_TEXT: 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def tiny_model(shape: str, seed: int) -> PreTrainedModel:
    """A random model of about 100,000 parameters.

    Args:
        shape: `llama` (rotary, tied head), `gpt2` (absolute positions, tied head), `qwen2`
            (rotary, biases, untied head, vocabulary padded beyond the tokenizer) or `gemma`
            (rotary, heads wider than the states, scaled embeddings, tied head).
        seed: of the initial weights.

    Raises:
        ConfigError: for any other shape.
    """
    common = {"vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    rotary = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT_LENGTH,
    }
    config: PreTrainedConfig
    match shape:
        case "llama":
            config = LlamaConfig.from_dict(common | rotary | {"tie_word_embeddings": True})
        case "qwen2":
            padded = {"vocab_size": 272, "tie_word_embeddings": False}
            config = Qwen2Config.from_dict(common | rotary | padded)
        case "gemma":
            wide = {"head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": True}
            config = GemmaConfig.from_dict(common | rotary | wide)
        case "gpt2":
            absolute = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT_LENGTH}
            no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
            config = GPT2Config.from_dict(common | absolute | no_dropout)
        case _:
            raise ConfigError(
                f"llm.model_name_or_path: no tiny model has the shape {shape!r}; "
                "use tiny:llama, tiny:gpt2, tiny:qwen2 or tiny:gemma"
            )
    with seed_everything(seed):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model
