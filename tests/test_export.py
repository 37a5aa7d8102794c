"""What leaves a run: `cft export`, guided decoding in plain `generate`, and `cft chat`."""

import gc
import json
import re
import sys
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import httpx
import huggingface_hub
import numpy as np
import peft
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from small import SHAPES, run, small_config, tiny_llm
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, PreTrainedModel

from constrained_ft.auxiliary import Auxiliary, FrozenAuxiliary, ProductAuxiliary
from constrained_ft.cli.main import main
from constrained_ft.compose import compose
from constrained_ft.decoding import decode
from constrained_ft.errors import CheckpointError, ConfigError, ModelError
from constrained_ft.export import export_command
from constrained_ft.generate import generate_command
from constrained_ft.llm import LLM
from constrained_ft.logits_processor import AuxiliaryLogitsProcessor
from constrained_ft.progress import Silent
from constrained_ft.prompts import tokenise_prompts
from constrained_ft.randomness import generator_for, seed_for
from constrained_ft.tiny import byte_tokenizer, tiny_model

PROMPTS = ["The baker opened", "My", "A letter"]
NEW = 10
KINDS = ["additive", "transformer", "head"]
# PEFT asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


class Drawn(LogitsProcessor):
    """Turns greedy search into a draw with given uniform numbers, by numpy."""

    def __init__(self, uniforms_BT: Tensor) -> None:
        self._uniforms = uniforms_BT.double().numpy()
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores.double().softmax(-1).numpy().cumsum(-1)
        chosen = [
            int(np.searchsorted(row, u * row[-1], side="right"))
            for row, u in zip(cumulative, self._uniforms[:, self._step], strict=True)
        ]
        self._step += 1
        forced = torch.full_like(scores, -torch.inf)
        forced[torch.arange(len(chosen)), torch.tensor(chosen)] = 0.0
        return forced


def padded(texts: Sequence[str]) -> dict[str, Tensor]:
    """A batch as people make one: padded on the left."""
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"
    return dict(tokenizer(list(texts), return_tensors="pt", padding=True))


def generated(
    model: nn.Module, texts: Sequence[str], processors: list[Any], **options: Any
) -> list[list[int]]:
    """Completions, up to the end of text."""
    given = padded(texts)
    found = model.generate(
        **given, do_sample=False, max_new_tokens=NEW, logits_processor=processors, **options
    )
    rows = found[:, given["input_ids"].shape[1] :].tolist()
    return [row[: row.index(0) + 1] if 0 in row else row for row in rows]


def random_auxiliary(llm: LLM, kind: str, folder: Path) -> FrozenAuxiliary:
    """One with opinions, on disk."""
    embeddings = llm.module.get_input_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(4)
    of = "additive" if kind == "product" else kind
    small = (f"auxiliary={of}", "auxiliary.rank=8", "auxiliary.width=32", "auxiliary.layers=1")
    config = compose(["constraint=letters", *small]).auxiliary
    each = []
    for _ in range(3 if kind == "product" else 1):
        prior_V = torch.randn(len(embeddings), generator=generator)
        each.append(Auxiliary(config, embeddings, prior_V, seed=0).eval())
        with torch.no_grad():
            for parameter in each[-1].parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    ProductAuxiliary(each).frozen().save(folder)
    return FrozenAuxiliary.load(folder, torch.device("cpu"))


# Guided decoding in plain generate ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        *((shape, "additive") for shape in SHAPES),
        *(("llama", k) for k in (*KINDS[1:], "product")),
    ],
)
def test_the_same_tokens_as_our_own_sampler_for_the_same_uniform_numbers(
    shape: str, kind: str, tmp_path: Path
) -> None:
    llm = tiny_llm(shape)
    auxiliary = random_auxiliary(llm, kind, tmp_path)
    texts = [text for text in PROMPTS for _ in range(8)]
    uniforms_BT = torch.rand(
        len(texts), NEW, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    prompts = [prompt.token_ids for prompt in tokenise_prompts(PROMPTS, llm.tokenizer)]
    said: dict[bool, list[list[int]]] = {}
    for guided in (True, False):
        guide = auxiliary.guide() if guided else None
        found = decode(llm.frozen(), prompts, uniforms_BT, guide=guide)
        said[guided] = [
            [token for token, real in zip(ids, mask, strict=True) if real]
            for ids, mask in zip(found.ids_BT.tolist(), found.mask_BT.tolist(), strict=True)
        ]
    processor = AuxiliaryLogitsProcessor(llm.module, llm.tokenizer, tmp_path)
    assert generated(llm.module, texts, [processor, Drawn(uniforms_BT)]) == said[True]
    assert said[True] != said[False]


def naive_scores(llm: LLM, auxiliary: FrozenAuxiliary, text: str, ids: Sequence[int]) -> Tensor:
    """log p + log R of the token after `ids`: one sequence, no cache, no padding."""
    prompt = byte_tokenizer()(text)["input_ids"]
    with torch.no_grad():
        output = llm.module(torch.tensor([[*prompt, *ids]]), output_hidden_states=True)
    hidden_BTD = output.hidden_states[-1][:, len(prompt) - 1 :]
    log_r = auxiliary.guide()(hidden_BTD, torch.tensor([list(ids)], dtype=torch.long))
    return (output.logits[0, -1].log_softmax(-1) + log_r[0])[: len(byte_tokenizer())]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}])
def test_greedy_search_in_a_batch_is_that_of_each_prompt_alone(
    options: dict[str, Any], tmp_path: Path
) -> None:
    llm = tiny_llm("llama", sharpness=5.0)
    auxiliary = random_auxiliary(llm, "additive", tmp_path)
    expected = []
    for text in PROMPTS:
        ids: list[int] = []
        while len(ids) < NEW and ids[-1:] != [0]:
            ids.append(int(naive_scores(llm, auxiliary, text, ids).argmax()))
        expected.append(ids)
    processor = AuxiliaryLogitsProcessor(llm.module, llm.tokenizer, tmp_path)
    assert generated(llm.module, PROMPTS, [processor], **options) == expected
    # Another generation begins anew.
    assert generated(llm.module, PROMPTS[:1], [processor], **options) == expected[:1]
    assert generated(llm.module, PROMPTS, [], **options) != expected


def test_beams_that_change_places_keep_their_own_evidence(tmp_path: Path) -> None:
    llm = tiny_llm("llama", sharpness=5.0)
    auxiliary = random_auxiliary(llm, "additive", tmp_path)
    given = padded(PROMPTS)
    found = llm.module.generate(
        **given,
        do_sample=False,
        num_beams=4,
        num_return_sequences=4,
        length_penalty=0.0,
        max_new_tokens=6,
        logits_processor=[AuxiliaryLogitsProcessor(llm.module, llm.tokenizer, tmp_path)],
        output_scores=True,
        return_dict_in_generate=True,
    )
    rows = found.sequences[:, given["input_ids"].shape[1] :].tolist()
    for place, (row, score) in enumerate(zip(rows, found.sequences_scores.tolist(), strict=True)):
        ids = row[: row.index(0) + 1] if 0 in row else row
        total = sum(
            float(naive_scores(llm, auxiliary, PROMPTS[place // 4], ids[:t])[token])
            for t, token in enumerate(ids)
        )
        assert score == pytest.approx(total, abs=1e-3)


def test_the_model_forgets_a_processor_that_is_gone(tmp_path: Path) -> None:
    llm = tiny_llm()
    random_auxiliary(llm, "head", tmp_path)
    processor = AuxiliaryLogitsProcessor(llm.module, llm.tokenizer, tmp_path)
    hooks = llm.module.get_output_embeddings()._forward_pre_hooks
    assert len(hooks) == 1
    del processor
    gc.collect()
    assert len(hooks) == 0


def test_another_model_or_an_empty_folder_is_refused(tmp_path: Path) -> None:
    llm, other = tiny_llm("llama"), tiny_llm("qwen2")
    random_auxiliary(llm, "head", tmp_path / "head")
    with pytest.raises(ModelError, match=r"257 tokens and hidden size 64, but this one has 272"):
        AuxiliaryLogitsProcessor(other.module, other.tokenizer, tmp_path / "head")
    with pytest.raises(CheckpointError, match="no readable auxiliary"):
        AuxiliaryLogitsProcessor(llm.module, llm.tokenizer, tmp_path)


def test_scores_of_another_model_are_refused(tmp_path: Path) -> None:
    llm, other = tiny_llm("llama"), tiny_model("llama", seed=9)
    random_auxiliary(llm, "head", tmp_path)
    processor = AuxiliaryLogitsProcessor(llm.module, llm.tokenizer, tmp_path)
    with pytest.raises(ConfigError, match="`generate` of the model that it was made with"):
        generated(other, PROMPTS, [processor])


# cft export ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is trained from a folder, as people's own are."""
    path = tmp_path_factory.mktemp("models") / "base"
    tiny_model("llama", seed=3).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an adapter."""
    path = tmp_path_factory.mktemp("runs") / "lora"
    given = ("llm=pretrained", f"llm.model_name_or_path={base}", "trainer.precision=fp32")
    folder = run(small_config(*given, "trainer.learning_rate=0.02", lora=True), path)
    folder.write_status("finished", exit_code=0)
    return path


@pytest.fixture(scope="module")
def merged(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hand_over(finished, tmp_path_factory.mktemp("exports") / "merged")


@pytest.fixture(scope="module")
def adapter(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hand_over(finished, tmp_path_factory.mktemp("exports") / "adapter", form="adapter")


def hand_over(target: Path, output: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {"form": "merged", "push": None, "public": False}
    export_command(str(target), output, display=Silent(), **(options | changes))
    return output


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([[5, 6, 7, 8]])).logits
    return found


def test_plain_transformers_and_peft_load_the_same_model(
    base: Path, merged: Path, adapter: Path
) -> None:
    whole = logits(load(merged))
    added = logits(peft.PeftModel.from_pretrained(load(base), adapter).eval())
    assert torch.allclose(whole, added, atol=1e-4)
    assert (whole - logits(load(base))).abs().max() > 1e-2
    assert (
        AutoTokenizer.from_pretrained(merged)("ab")["input_ids"]
        == byte_tokenizer()("ab")["input_ids"]
    )


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_an_export_is_safetensors_and_names_no_folder_of_this_machine(
    form: str, merged: Path, adapter: Path, base: Path
) -> None:
    folder = {"merged": merged, "adapter": adapter}[form]
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"README.md", "auxiliary/auxiliary.safetensors", "auxiliary/config.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    for name in files:
        assert str(base).encode() not in (folder / name).read_bytes()
    assert not list(folder.parent.glob(".*"))


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_guided_decoding_of_an_export_is_that_of_cft_generate(
    form: str, finished: Path, base: Path, merged: Path, adapter: Path
) -> None:
    rows = generate_command(
        str(finished),
        prompts=PROMPTS,
        n=4,
        guided=True,
        max_new_tokens=NEW,
        seed=7,
        display=Silent(),
    )
    tokenizer = byte_tokenizer()
    uniforms = [
        torch.rand(
            4,
            NEW,
            generator=generator_for(seed_for(7, "generate"), "rollouts", 0, prompt.id),
            dtype=torch.float64,
        )
        for prompt in tokenise_prompts(PROMPTS, tokenizer)
    ]
    model: nn.Module = load(merged)
    folder = merged
    if form == "adapter":
        model, folder = peft.PeftModel.from_pretrained(load(base), adapter).eval(), adapter
    texts = [text for text in PROMPTS for _ in range(4)]
    processor = AuxiliaryLogitsProcessor(model, tokenizer, folder)
    said = generated(model, texts, [processor, Drawn(torch.cat(uniforms))])
    assert tokenizer.batch_decode(said, skip_special_tokens=True) == [r["completion"] for r in rows]


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_what_the_card_says_runs(form: str, base: Path, merged: Path, adapter: Path) -> None:
    folder = {"merged": merged, "adapter": adapter}[form]
    card = (folder / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = "\n".join(blocks).replace('"PATH"', repr(str(folder)))
    names: dict[str, Any] = {}
    exec(code.replace('"PATH_OF_THE_BASE_MODEL"', repr(str(base))), names)
    assert len(blocks) == 2
    assert names["said"].shape[1] > len("The weather today")
    library = "peft" if form == "adapter" else "transformers"
    assert f"library_name: {library}\n" in card


def log_likelihood(model: nn.Module, context: str, continuation: str) -> tuple[float, bool]:
    """Of a continuation, in nats, and whether greedy search says it: one pass, by hand."""
    tokenizer = byte_tokenizer()
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor(tokenizer(context + continuation)["input_ids"])
    with torch.no_grad():
        log_p_TV = model(ids[None]).logits[0, :-1].double().log_softmax(-1)[start - 1 :]
    said_T = ids[start:]
    log = log_p_TV.gather(1, said_T[:, None]).sum()
    return float(log), bool((log_p_TV.argmax(-1) == said_T).all())


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_lm_eval_loads_an_export_and_reads_the_same_likelihoods(
    form: str, base: Path, merged: Path, adapter: Path
) -> None:
    given = {"pretrained": str(merged)}
    if form == "adapter":
        given = {"pretrained": str(base), "peft": str(adapter)}
    harness = HFLM(**given, device="cpu", dtype="float32", batch_size=2)
    asked = [(text, said) for text in PROMPTS for said in (" opened the door.", " was", "e")]
    requests = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(asked)]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    tuned, before = load(merged), load(base)
    for (log, greedy), pair in zip(found, asked, strict=True):
        expected, is_greedy = log_likelihood(tuned, *pair)
        assert log == pytest.approx(expected, abs=1e-4)
        assert greedy == is_greedy
        assert abs(log - log_likelihood(before, *pair)[0]) > 1e-2


def test_an_adapter_of_a_hub_model_names_it(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in finished.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "config.yaml").unlink()
    text = (finished / "config.yaml").read_text()
    text = re.sub(r"model_name_or_path: \S+", "model_name_or_path: someone/model", text)
    (copy / "config.yaml").write_text(text)
    output = hand_over(copy, tmp_path / "out", form="adapter")
    named = json.loads((output / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == "someone/model"
    assert 'base_model: "someone/model"' in (output / "README.md").read_text()


def test_what_cannot_be_exported_says_why(finished: Path, merged: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is there already"):
        hand_over(finished, merged)
    with pytest.raises(ConfigError, match="needs a run"):
        hand_over(merged, tmp_path / "out")
    with pytest.raises(ConfigError, match="give --push"):
        hand_over(finished, tmp_path / "out", public=True)
    (finished / "evaluation.json").rename(finished / "aside.json")
    with pytest.raises(CheckpointError, match=r"write it again with `cft evaluate .* --output"):
        hand_over(finished, tmp_path / "out")
    (finished / "aside.json").rename(finished / "evaluation.json")
    assert not (tmp_path / "out").exists()


# --push -------------------------------------------------------------------------------------------


There = Literal["nothing", "private", "public"]


class Hub:
    """Stands in for `HfApi`, which is made without arguments: the token is not ours to pass."""

    def __init__(self, there: There) -> None:
        self.there = there
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails = False

    def __call__(self) -> "Hub":
        return self

    def repo_info(self, repository: str) -> SimpleNamespace:
        if self.there == "nothing":
            request = httpx.Request("GET", "https://hub")
            raise RepositoryNotFoundError("none", response=httpx.Response(404, request=request))
        return SimpleNamespace(private=self.there == "private")

    def create_repo(self, repository: str, **options: Any) -> None:
        self.calls.append(("create", {"repo_id": repository} | options))

    def upload_folder(self, **options: Any) -> None:
        if self.fails:
            request = httpx.Request("POST", "https://hub")
            raise HfHubHTTPError("403 Forbidden", response=httpx.Response(403, request=request))
        self.calls.append(("upload", options))


Hubs = Callable[[There], Hub]


@pytest.fixture
def hubs(monkeypatch: pytest.MonkeyPatch) -> Hubs:
    def make(there: There) -> Hub:
        hub = Hub(there)
        monkeypatch.setattr(huggingface_hub, "HfApi", hub)
        return hub

    return make


@pytest.mark.parametrize("there", ["nothing", "private", "public"])
def test_an_upload_is_private_unless_asked_for(
    there: There, hubs: Hubs, finished: Path, tmp_path: Path
) -> None:
    hub, public = hubs(there), there == "public"
    output = hand_over(finished, tmp_path / "out", push="me/mine", public=public)
    (create, made), (upload, sent) = hub.calls
    assert (create, upload) == ("create", "upload")
    assert made == {"repo_id": "me/mine", "private": not public, "exist_ok": True}
    assert sent["folder_path"] == output
    assert sent["repo_id"] == "me/mine"
    assert (output / "README.md").is_file()


def test_nothing_goes_into_a_public_repository_unasked(
    hubs: Hubs, finished: Path, tmp_path: Path
) -> None:
    hub = hubs("public")
    with pytest.raises(ConfigError, match="the repository is public"):
        hand_over(finished, tmp_path / "out", push="me/mine")
    assert hub.calls == []
    assert not (tmp_path / "out").exists()


def test_an_upload_that_fails_leaves_the_export_and_says_what_to_do(
    hubs: Hubs, finished: Path, tmp_path: Path
) -> None:
    hub = hubs("nothing")
    hub.fails = True
    with pytest.raises(ModelError, match=r"`hf auth login`.*403 Forbidden.*the export is in"):
        hand_over(finished, tmp_path / "out", push="me/mine")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_repository_that_cannot_be_named_so_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--push a/b/c"):
        hand_over(finished, tmp_path / "out", push="a/b/c")


def test_the_command_exports(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with pytest.raises(SystemExit) as left:
        main(["-q", "export", str(finished), str(output), "--form", "adapter"])
    assert left.value.code == 0
    assert (output / "adapter_model.safetensors").is_file()


# cft chat -----------------------------------------------------------------------------------------


def chatted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, *options: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", StringIO(typed))
    code: Any = 0
    try:
        main(["-q", "chat", *options])
    except SystemExit as left:
        code = left.code
    captured = capsys.readouterr()
    return int(code or 0), captured.out, captured.err


def test_a_pipe_is_answered_line_by_line_until_it_says_quit(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (str(finished), "--n", "3", "--max-new-tokens", "6")
    typed = "The baker opened\nMy brother\nMy brother\n/quit\nnot asked\n"
    code, said, _ = chatted(monkeypatch, capsys, typed, *options)
    assert code == 0
    titles = re.findall(r"^(The|My|not) ", said, re.MULTILINE)
    assert titles == ["The", "My", "My"]
    assert said.count("base") == said.count("guided") == 3
    assert said.count("mean score") == 9
    # Each score is the scorer's: no letter e.
    for text, score in re.findall(r"(\S.*?) \[(\d\.\d\d)\]", said):
        assert float(score) == float("e" not in text)
    first, again = said.split("My brother")[1:]
    assert first != again
    assert chatted(monkeypatch, capsys, typed, *options)[1] == said


def test_an_empty_line_ends_and_a_prompt_too_long_is_an_error(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chatted(monkeypatch, capsys, "\nMy\n", str(finished)) == (0, "", "")
    code, _, error = chatted(monkeypatch, capsys, "a" * 300 + "\n", str(finished))
    assert code == 3
    assert "lower max_new_tokens" in " ".join(error.split())
