"""What an iteration is predicted to take, against counts made another way."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shell import Cft
from small import LORA, small_config, tiny_llm
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from constrained_ft import cost, prediction
from constrained_ft.cli.dry_run import PaperDevice
from constrained_ft.config import LLMConfig, LoraConfig
from constrained_ft.cost import Layout, Shape, Work
from constrained_ft.fused import Head, Tilt, fused_losses
from constrained_ft.llm import LLM
from constrained_ft.loading import load_llm, load_tokenizer
from constrained_ft.memory import activation_bytes
from constrained_ft.packing import Tree
from constrained_ft.prediction import DEVICES, best_layout, predict
from constrained_ft.sizing import assumed_lengths, shape_of, work_of
from constrained_ft.tiny import byte_tokenizer

WORK = Work(
    prompts=64,
    samples=4,
    prompt_tokens=16,
    new_tokens=32,
    row_tokens=128,
    rows=64,
    pass_rows=4,
    steps=2,
    rollouts_per_step=128,
    batch=64,
)
SHAPE = Shape(
    parameters=1_200_000_000,
    products=970_000_000,
    outputs=16 * 30_000,
    linears=16 * 7,
    layers=16,
    hidden=2048,
    vocabulary=128_256,
    heads=32,
    queries=2048,
    keys=512,
)
RESOURCES = (
    "products",
    "wide",
    "memory_speed",
    "elementwise",
    "memory",
    "link",
    "network",
    "host_link",
    "shard_link",
)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> LLMConfig:
    """A random model of many layers: what is special in the first one hardly counts."""
    folder = tmp_path_factory.mktemp("deep")
    settings_ = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=257,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    AutoModelForCausalLM.from_config(settings_).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    given_ = {"model_name_or_path": str(folder), "attn_implementation": "eager"}
    return small_config().llm.model_copy(update=given_)


def with_lora(config: LLMConfig, first_layer: int = 0) -> LLMConfig:
    lora = LoraConfig(**LORA.model_dump() | {"first_layer": first_layer})
    return config.model_copy(update={"lora": lora})


def load(config: LLMConfig) -> LLM:
    return load_llm(config, load_tokenizer(config), precision="fp32", seed=0)


@pytest.mark.parametrize("first_layer", [None, 0, 4])
def test_products_of_the_trunk_are_those_that_torch_counts(
    deep: LLMConfig, first_layer: int | None
) -> None:
    config = deep if first_layer is None else with_lora(deep, first_layer)
    llm, shape = load(config), shape_of(config)
    ids_BL, lengths_B = torch.arange(80).view(2, 40), torch.tensor([40, 40])
    work = replace(WORK, bf16=False)
    with FlopCounterMode(display=False) as ahead:
        states = llm.hidden_states(ids_BL, lengths_B)
    said = cost.forward(shape, work, tokens=80, context=40, passes=1)
    assert said.trunk == pytest.approx(ahead.get_total_flops(), rel=0.02)
    with FlopCounterMode(display=False) as back:
        states.sum().backward()
    said = cost.backward(shape, work, tokens=80, context=40, passes=1)
    assert said.trunk == pytest.approx(back.get_total_flops(), rel=0.06)


def test_products_of_either_part_of_the_trunk_are_those_that_torch_counts(deep: LLMConfig) -> None:
    config = with_lora(deep, first_layer=4)
    llm, shape, work = load(config), shape_of(config), replace(WORK, bf16=False)
    packed = llm.pack([Tree(stem=tuple(range(40)))] * 2)
    size = {"tokens": packed.ids_BL.numel(), "context": packed.ids_BL.shape[1], "passes": 1}
    with FlopCounterMode(display=False) as alone:
        states_SD = llm.states_below(packed)
    below = cost.forward(cost.below(shape), work, **size).trunk
    assert below == pytest.approx(alone.get_total_flops(), rel=0.02)
    with FlopCounterMode(display=False) as rest:
        llm.packed_states(packed, states_SD)
    above = cost.forward(cost.above(shape), work, **size).trunk
    assert above == pytest.approx(rest.get_total_flops(), rel=0.02)
    assert below + above == pytest.approx(cost.forward(shape, work, **size).trunk, rel=1e-3)


def test_one_process_begins_above_the_frozen_layers() -> None:
    shape = replace(SHAPE, adapters=10_000_000, adapted=0.5)
    kept = replace(WORK, keeps_below=True)
    alone, two = Layout(), Layout(ranks=2)
    for phase in (cost.update, cost.reference):
        assert phase(shape, kept, alone).trunk < phase(shape, WORK, alone).trunk
        assert phase(shape, kept, two) == phase(shape, WORK, two)
        late = replace(alone, overlapped=True)
        assert phase(shape, kept, late) == phase(shape, WORK, late)
    mined = replace(WORK, candidates=8, keeps_prompts=True)
    read = cost.mining(shape, mined, alone).trunk
    whole = cost.mining(shape, mined, Layout(ranks=2, sharding="fsdp2")).trunk
    assert 0.5 * whole < read < 0.6 * whole
    peers = Layout(ranks=3, peers=1, sharding="fsdp2")
    assert cost.mining(shape, mined, peers).trunk == read


@pytest.mark.parametrize("trains_head", [False, True])
def test_products_with_the_vocabulary_are_those_that_torch_counts(*, trains_head: bool) -> None:
    rows, width, size, rank = 24, 32, 300, 8
    head = Head(weight_VD=torch.randn(size, width), bias_V=None, bf16_valued=False)
    other = Head(weight_VD=torch.randn(size, width), bias_V=None, bf16_valued=False)
    head.weight_VD.requires_grad_(trains_head)
    tilt = Tilt(
        hidden_MD=torch.randn(rows, width),
        head=other,
        factors_MJR=torch.randn(rows, 1, rank),
        offset_MJ=torch.zeros(rows, 1),
        tokens_JVR=torch.randn(1, size, rank),
        prior_JV=torch.zeros(1, size),
        limit=15.0,
        floor_M=None,
        weights_M=torch.ones(rows),
    )
    # The head's gradient is added in place, which torch does not count by itself.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, out_shape: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
        states = torch.randn(rows, width, requires_grad=True)
        fused_losses(states, head, tilt=tilt).loss.backward()
    shape = replace(SHAPE, hidden=width, vocabulary=size)
    products = cost.vocabulary(shape, WORK, rows, products=3 + trains_head, passes=0)
    evidence = cost.evidence(shape, replace(WORK, rank=rank), rows)
    assert (products + evidence).wide == counted.get_total_flops()


@pytest.mark.parametrize("shape", ["llama", "gpt2", "qwen2", "gemma"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_shape_counts_the_weights_that_there_are(shape: str, *, lora: bool) -> None:
    llm = tiny_llm(shape, lora=lora)
    found = shape_of(llm.config)
    trained = sum(tensor.numel() for tensor in llm.trained_parameters().values())
    everything = sum(tensor.numel() for tensor in llm.module.parameters())
    assert found.trained == trained
    assert found.parameters == everything - (trained if lora else 0)


def test_a_shape_is_read_from_the_headers_of_the_files(deep: LLMConfig, tmp_path: Path) -> None:
    file = next(Path(deep.model_name_or_path).glob("*.safetensors"))
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert 4 * shape_of(deep).parameters == file.stat().st_size - header
    # Weights are not read: a file that ends behind its header is enough.
    (tmp_path / "model.safetensors").write_bytes(file.read_bytes()[:header])
    facts = json.loads((Path(deep.model_name_or_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts))
    same = deep.model_copy(update={"model_name_or_path": str(tmp_path)})
    assert shape_of(same) == shape_of(deep)


@pytest.mark.parametrize("lora", [False, True])
def test_activations_are_about_those_that_autograd_keeps(deep: LLMConfig, *, lora: bool) -> None:
    config = with_lora(deep) if lora else deep
    work = replace(WORK, bf16=False)
    said = prediction.activations(shape_of(config), work, context=256)
    assert said == pytest.approx(activation_bytes(load(config)), rel=0.1)


@settings(max_examples=60, deadline=None)
@given(
    resource=st.sampled_from(RESOURCES),
    factor=st.floats(1, 1e3),
    ranks=st.sampled_from([1, 2, 8, 16]),
    peers=st.integers(0, 15),
    sharding=st.sampled_from(["none", "fsdp2"]),
    adapters=st.sampled_from([0, 10_000_000]),
)
def test_more_of_a_resource_never_slows_down(
    resource: str, factor: float, ranks: int, peers: int, sharding: str, adapters: int
) -> None:
    shape = replace(SHAPE, adapters=adapters)
    layout = Layout(ranks=ranks, peers=peers % ranks, overlapped=True, sharding=sharding)
    less = replace(DEVICES["a100"], shard_link=1e10)
    more = replace(less, **{resource: factor * getattr(less, resource)})
    slow, fast = (predict(shape, WORK, layout, device) for device in (less, more))
    assert fast.seconds <= slow.seconds * (1 + 1e-9)
    assert fast.fits or not slow.fits
    assert fast.sent == slow.sent


def test_peers_work_at_once_or_in_turns() -> None:
    in_turns = predict(SHAPE, WORK, Layout(ranks=8, peers=3), DEVICES["h100"])
    at_once = predict(SHAPE, WORK, Layout(ranks=8, peers=3, overlapped=True), DEVICES["h100"])
    seconds = {name: phase.total for name, phase in at_once.phases.items()}
    over, updating = seconds.pop("hand over"), seconds.pop("update") + seconds.pop("reference")
    learning = sum(seconds.values())
    assert in_turns.seconds == pytest.approx(learning + updating + over)
    assert at_once.seconds == pytest.approx(max(learning, updating) + over)
    best = best_layout(SHAPE, WORK, DEVICES["h100"], 8)
    assert best.seconds <= min(at_once.seconds, in_turns.seconds)
    alone = predict(SHAPE, WORK, Layout(), DEVICES["h100"])
    assert alone.sent == 0
    assert best.seconds < alone.seconds
    with pytest.raises(ValueError, match="leave none"):
        predict(SHAPE, WORK, Layout(ranks=2, peers=2), DEVICES["h100"])


def test_a_ring_sends_each_gradient_twice_but_for_its_own_part() -> None:
    work = replace(WORK, steps=1)
    sent = cost.update(SHAPE, work, Layout(ranks=4)).sent
    assert sent == 2 * 3 / 4 * 4 * SHAPE.parameters
    sharded = cost.update(SHAPE, work, Layout(ranks=4, sharding="fsdp2")).spread
    # Gradients of four passes once, and the weights for each pass forward and backward.
    assert sharded == 3 / 4 * 4 * SHAPE.parameters * (4 + 2 * 4)
    gloo = cost.update(SHAPE, work, Layout(ranks=4, sharding="fsdp2", gloo=True)).spread
    assert gloo == 3 / 4 * 4 * SHAPE.parameters * (2 * 4 + 2 * 4)


def test_memory_beside_the_estimate_of_a_run(deep: LLMConfig) -> None:
    config = small_config()
    work = work_of(config, assumed_lengths(config), 1)
    held = prediction.memory(shape_of(deep), work, Layout(), DEVICES["h100"])
    trained = shape_of(deep).parameters
    assert held["weights"] == 4 * trained
    assert held["moments"] == 8 * trained
    assert held["gradients"] == 4 * trained
    assert held["reference's head"] == 4 * shape_of(deep).vocabulary * shape_of(deep).hidden
    many = replace(work, prompts=10_000, batch=100_000)  # sampling is at the peak
    layout = Layout(ranks=4, sharding="fsdp2")
    sampling = prediction.memory(shape_of(deep), many, layout, DEVICES["h100"])
    assert sampling["frozen copy"] == 4 * trained
    assert sampling["moments"] == 2 * trained
    rounded = prediction.memory(shape_of(deep), replace(many, bf16=True), layout, DEVICES["h100"])
    assert rounded["frozen copy"] == 4 * trained - 2 * shape_of(deep).products
    lora = with_lora(deep)
    alone = prediction.memory(shape_of(lora), many, Layout(), DEVICES["h100"])
    assert alone["frozen copy"] == 4 * shape_of(lora).adapters


def test_a_dry_run_shows_what_an_iteration_takes(cft: Cft) -> None:
    ran = cft("train", "experiment=smoke", "--dry-run", "--nproc-per-node", "2")
    assert ran.code == 0
    assert "One iteration, predicted: 2 processes" in ran.out
    for part in ("sampling", "update", "memory of a rank", "bottleneck: "):
        assert part in ran.out


def test_a_dry_run_for_gpus_that_are_not_here(cft: Cft) -> None:
    ran = cft("train", "experiment=smoke", "--dry-run", "--nproc-per-node", "64", "--on", "h100")
    assert ran.code == 0
    said = " ".join(ran.out.split())
    assert "One iteration, predicted: 64 processes on H100 SXM 80GB" in said
    assert "it was not run" in said
    assert set(PaperDevice) == set(DEVICES)
    assert cft("train", "experiment=smoke", "--on", "h100").code == 2
    assert cft("train", "--dry-run", "--on", "abacus").code == 2


def test_the_experiment_of_seven_billion_weights_is_dry_run(cft: Cft, tmp_path: Path) -> None:
    command = ("train", "experiment=seven_billion", "data.name=OWNER/NAME", "--dry-run")
    assert cft(*command).code == 2  # a peer needs a process of its own
    shown = cft(*command, "--nproc-per-node", "8")
    assert shown.code == 0
    assert "meta-llama/Llama-2-7b-hf is not on this disk yet" in " ".join(shown.out.split())
    assert list(tmp_path.glob("outputs")) == []
    # With the files of a model of that size, of which a prediction reads the headers.
    size = LlamaConfig(intermediate_size=11008, tie_word_embeddings=False, vocab_size=32000)
    size.save_pretrained(tmp_path / "large")
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(size).state_dict()
    assert sum(tensor.numel() for tensor in weights.values()) == 6_738_415_616  # Llama 2's
    facts = {n: {"dtype": "BF16", "shape": list(one.shape)} for n, one in weights.items()}
    header = json.dumps(facts).encode()
    content = len(header).to_bytes(8, "little") + header
    (tmp_path / "large/model.safetensors").write_bytes(content)
    model = f"llm.model_name_or_path={tmp_path / 'large'}"
    ran = cft(*command, model, "--nproc-per-node", "8", "--on", "h100")
    assert ran.code == 0
    text = " ".join(ran.out.split())
    assert "256 x 8 = 2,048 completions of 20 tokens an iteration" in text
    assert "One iteration, predicted: 8 processes on H100 SXM 80GB" in text
    assert "hand over" in text  # peers


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("llm.model_name_or_path=org/model", "org/model is not on this disk yet"),
        ("llm.model_name_or_path=./nowhere", "nowhere is not on this disk yet"),
        ("trainer=grpo", "the cost of trainer.trl is not known"),
    ],
)
def test_a_dry_run_says_why_nothing_is_predicted(cft: Cft, override: str, reason: str) -> None:
    ran = cft("train", "experiment=smoke", "--dry-run", override)
    assert ran.code == 0
    assert reason in " ".join(ran.out.split())
    assert "One iteration" not in ran.out
