"""The LLM, its frozen copies and its export, for three shapes of model, with LoRA and without."""

import warnings
from pathlib import Path

import peft
import pytest
import torch
from small import SHAPES, prompt, small_config, small_parts, tiny_llm
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
)

from constrained_ft import tryout
from constrained_ft.config import LLMConfig
from constrained_ft.errors import ModelError
from constrained_ft.llm import LLM, FrozenLLM
from constrained_ft.loading import (
    export,
    load_base,
    load_context_length,
    load_frozen,
    load_llm,
    load_tokenizer,
    plain_config,
)
from constrained_ft.packing import pad_right
from constrained_ft.run_folder import RunFolder
from constrained_ft.target import learn_target
from constrained_ft.tiny import byte_tokenizer, tiny_model
from constrained_ft.train import _update

NOWHERE = RunFolder(Path("nowhere"))
TEXTS = ["the cat", "a", "some longer text that goes on"]
SEQUENCES = [list(prompt(text).token_ids) for text in TEXTS]
IDS, LENGTHS = pad_right(SEQUENCES, 0, torch.device("cpu"))


@torch.no_grad()
def logits(llm: LLM | FrozenLLM) -> Tensor:
    """The logits at the last token of each text."""
    hidden = llm.hidden_states(IDS, LENGTHS)
    return llm.head(hidden[torch.arange(len(TEXTS)), LENGTHS - 1])


def plain_logits(module: torch.nn.Module) -> Tensor:
    """The same from transformers, one text at a time, without padding."""
    module.eval()
    with torch.no_grad():
        return torch.cat([module(torch.tensor([ids])).logits[:, -1] for ids in SEQUENCES])


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_moves_the_llm_alone_and_the_export_is_what_was_trained(
    shape: str, tmp_path: Path, *, lora: bool
) -> None:
    config = small_config(
        f"llm.model_name_or_path=tiny:{shape}", "trainer.learning_rate=0.01", lora=lora
    )
    parts = small_parts(config)
    base = plain_logits(tiny_model(shape, seed=0))
    reference = parts.llm.frozen()
    close(logits(reference), base)
    target = learn_target(parts, config, reference, 1)
    before = logits(reference)
    _update(parts, target, config, NOWHERE, 1)
    _update(parts, learn_target(parts, config, parts.llm.frozen(), 2), config, NOWHERE, 2)

    assert torch.equal(logits(reference), before)
    trained = logits(parts.llm)
    assert (trained - before).abs().max() > 1e-3
    assert torch.equal(logits(parts.llm.frozen()), trained)
    close(plain_logits(parts.llm.module), trained)
    close(logits(load_base(parts.llm, precision="fp32")), base)

    export(parts.llm, tmp_path / "llm", tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype=torch.float32)
    close(plain_logits(plain), trained)
    assert AutoTokenizer.from_pretrained(tmp_path / "llm")("abc") == byte_tokenizer()("abc")
    close(logits(load_frozen(plain_config(str(tmp_path / "llm")), precision="fp32")), trained)
    if lora:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing|fan_in_fan_out")
            again = peft.PeftModel.from_pretrained(tiny_model(shape, seed=0), tmp_path / "adapter")
        close(plain_logits(again), trained)
        # Exporting merges into another copy: what is trained goes on as it was.
        assert torch.equal(logits(parts.llm), trained)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_trains_adapters_and_nothing_else(shape: str) -> None:
    full, lora = tiny_llm(shape), tiny_llm(shape, lora=True)
    names = set(lora.trained_parameters())
    assert names
    assert all("lora_" in name for name in names)
    assert len(full.trained_parameters()) == len(list(full.module.parameters()))
    assert not lora.head.weight_VD.requires_grad
    assert full.head.weight_VD.requires_grad
    # Adapters begin at nothing.
    assert torch.equal(logits(lora), logits(tiny_llm(shape)))


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_does_not_matter(shape: str) -> None:
    llm = tiny_llm(shape)
    alone = []
    for ids in SEQUENCES:
        hidden = llm.frozen().hidden_states(torch.tensor([ids]), torch.tensor([len(ids)]))
        alone.append(hidden[0, -1])
    hidden = llm.frozen().hidden_states(IDS, LENGTHS)
    close(hidden[torch.arange(len(TEXTS)), LENGTHS - 1], torch.stack(alone), 1e-6)
    # What stands in the padding is not looked at, though its id also ends texts.
    junk = torch.where(torch.arange(IDS.shape[1]) < LENGTHS[:, None], IDS, 77)
    other = llm.frozen().hidden_states(junk, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        assert torch.equal(other[row, :length], hidden[row, :length])


def test_saved_weights_go_back_where_they_were() -> None:
    llm = tiny_llm()
    saved = {name: p.detach().clone() for name, p in llm.trained_parameters().items()}
    before = logits(llm)
    with torch.no_grad():
        for parameter in llm.trained_parameters().values():
            parameter.add_(0.1)
    assert not torch.equal(logits(llm), before)
    llm.load_trained(saved)
    assert torch.equal(logits(llm), before)


def test_dropout_is_on_only_while_training() -> None:
    llm = tiny_llm("gpt2")
    assert not llm.module.training
    with llm.training():
        assert llm.module.training
    assert not llm.module.training


# Models that cannot be used -----------------------------------------------------------------------


def saved(module: torch.nn.Module, path: Path) -> str:
    module.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


def eager(path: str) -> LLMConfig:
    """Gemma's attention has no other kernel."""
    return plain_config(path).model_copy(update={"attn_implementation": "eager"})


def small_gemma(softcap: float | None) -> Gemma2ForCausalLM:
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=257,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=64,
            final_logit_softcapping=softcap,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def test_logits_that_are_capped_behind_the_head_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its logits are far below 30: this cap would hardly show.
    config = eager(saved(small_gemma(30.0), tmp_path / "capped"))
    named = r"transforms its logits after the output head \(final_logit_softcapping=30\)"
    with pytest.raises(ModelError, match=named) as caught:
        load_llm(config, load_tokenizer(config), precision="fp32", seed=0)
    assert caught.value.exit_code == 3
    with pytest.raises(ModelError, match="transforms its logits"):
        load_frozen(config, precision="fp32")
    monkeypatch.setattr(tryout, "_TRANSFORMS", {})
    unknown = eager(saved(small_gemma(0.05), tmp_path / "unknown"))
    with pytest.raises(ModelError, match=r"transforms its logits .* \(relative difference"):
        load_frozen(unknown, precision="fp32")
    plain = eager(saved(small_gemma(None), tmp_path / "plain"))
    assert load_frozen(plain, precision="fp32").head.weight_VD.shape == (257, 32)


def test_a_bias_of_the_head_counts(tmp_path: Path) -> None:
    llm = tiny_llm("qwen2")
    layer = llm.module.get_output_embeddings()
    layer.bias = torch.nn.Parameter(torch.linspace(-1, 1, layer.out_features))
    with_bias = LLM(
        llm.module, llm.tokenizer, config=llm.config, peft_model=None, bf16=False
    ).frozen()
    close(logits(with_bias), plain_logits(llm.module))


def test_bfloat16_weights_are_not_trained_in_full() -> None:
    config = small_config("llm.dtype=bfloat16").llm
    with pytest.raises(ModelError, match="lost to rounding"):
        load_llm(config, byte_tokenizer(), precision="fp32", seed=0)


def test_adapters_that_fit_no_module_are_named() -> None:
    config = small_config(lora=True).llm
    lora = config.lora.model_copy(update={"target_modules": ("nowhere",)})
    config = config.model_copy(update={"lora": lora})
    with pytest.raises(ModelError, match=r"llm.lora.target_modules=\('nowhere',\)"):
        load_llm(config, byte_tokenizer(), precision="fp32", seed=0)


@pytest.mark.parametrize("targets", ["all-linear", ("c_attn", "down_proj", "v_proj")])
@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_begin_at_the_first_layer_asked_for(
    shape: str, targets: str | tuple[str, ...]
) -> None:
    config = small_config(f"llm.model_name_or_path=tiny:{shape}", lora=True).llm
    assert config.lora is not None

    def adapted(first_layer: int) -> set[str]:
        lora = config.lora.model_copy(  # type: ignore[union-attr]
            update={"first_layer": first_layer, "target_modules": targets}
        )
        own = config.model_copy(update={"lora": lora})
        llm = load_llm(own, byte_tokenizer(), precision="fp32", seed=0)
        return set(llm.trained_parameters())

    everywhere = adapted(0)
    wanted = {name for name in everywhere if ".0." not in name.split("lora_")[0]}
    assert 0 < len(wanted) < len(everywhere)
    assert adapted(1) == wanted
    with pytest.raises(ModelError, match=r"llm.lora.first_layer=2: .* counted from 0"):
        adapted(2)


def test_the_context_length_is_known_without_the_weights(tmp_path: Path) -> None:
    path = saved(tiny_model("llama", seed=0), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert load_context_length(plain_config(path)) == 256
    assert load_context_length(small_config().llm) == 256


def test_a_model_without_a_table_of_positions_has_no_known_limit(tmp_path: Path) -> None:
    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=257, hidden_size=32, n_layer=2, n_head=2, pad_token_id=0)
    )
    config = plain_config(saved(bloom, tmp_path))
    assert load_context_length(config) is None
    close(logits(load_frozen(config, precision="fp32")), plain_logits(bloom))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_arithmetic_stays_close_and_heads_stay_float32(shape: str, *, lora: bool) -> None:
    config = small_config(f"llm.model_name_or_path=tiny:{shape}", lora=lora).llm
    exact = load_llm(config, byte_tokenizer(), precision="fp32", seed=0)
    fast = load_llm(config, byte_tokenizer(), precision="bf16", seed=0)
    assert not exact.bf16
    assert fast.bf16
    assert logits(fast).dtype == torch.float32
    assert (logits(fast) - logits(exact)).abs().max() < 0.02
    with torch.no_grad():
        for parameter in fast.trained_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    # What a frozen copy multiplies is rounded once, where the LLM rounds it in every product.
    frozen = fast.frozen()
    assert torch.equal(logits(frozen), logits(fast))
    own = frozen._trained
    assert sum(tensor.nbytes for tensor in own.values()) == fast.copied_bytes()
    tables = {"embed_tokens.weight", "wte.weight", "wpe.weight"}
    multiplied = {t.dtype for name, t in own.items() if t.ndim == 2 and name not in tables}
    assert multiplied == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_llama_with_gradient_checkpointing_has_the_same_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        config = small_config(f"llm.gradient_checkpointing={checkpointing}", lora=True).llm
        llm = load_llm(config, byte_tokenizer(), precision="fp32", seed=0)
        with llm.training():
            llm.hidden_states(IDS, LENGTHS).square().sum().backward()
        gradients.append({n: p.grad for n, p in llm.trained_parameters().items()})
    assert isinstance(llm.module, LlamaForCausalLM)
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)
