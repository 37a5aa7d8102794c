"""Sampling through a vLLM server, against a stub of its protocol; vLLM itself is not run here."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sampling_stub import SamplingStub
from several import together
from small import SMALL, prompt, tiny_llm

from constrained_ft import service
from constrained_ft.compose import compose
from constrained_ft.config import Config, SamplerConfig
from constrained_ft.distributed import StopRequest, World
from constrained_ft.errors import ConfigError, Interrupted, SamplerError, SamplingError
from constrained_ft.llm import LLM
from constrained_ft.progress import Silent
from constrained_ft.rollouts import Rollouts
from constrained_ft.run_folder import RunFolder
from constrained_ft.sampling import sample
from constrained_ft.sampling_server import SamplingServer
from constrained_ft.tiny import tiny_model
from constrained_ft.train import train

LORA = "llm.lora={r: 4, alpha: 8.0, dropout: 0.0, target_modules: all-linear, first_layer: 0}"
FEW = ("prompts.prompts_per_iteration=4", "evaluation.max_prompts=4")
# PEFT asks transformers for an attribute by its old name, in the stub.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
PROMPTS = [prompt("The weather"), prompt("A dog")]


@pytest.fixture
def stub() -> Iterator[SamplingStub]:
    one = SamplingStub(tiny_model("llama", seed=0))
    yield one
    one.close()


def trained_llm(shape: str = "llama") -> LLM:
    """One whose adapters say something."""
    llm = tiny_llm(shape, lora=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in llm.trained_parameters().values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return llm


def server_of(stub: SamplingStub, folder: Path, **keys: Any) -> SamplingServer:
    given = {"timeout": 20.0, "patience": 5.0, "batch_size": 64} | keys
    config = SamplerConfig(kind="vllm_server", url=stub.url, **given)
    return SamplingServer(config, folder / "my run" / "adapters")


def on_a_rank(world: World, stop: StopRequest, url: str, folder: Path) -> tuple[Any, ...]:
    config = SamplerConfig(kind="vllm_server", url=url, batch_size=4)
    server = SamplingServer(config, folder / "my run" / "adapters")
    rollouts = sampled(server, trained_llm(), world=world, stop=stop)
    return rollouts.ids_NT.tolist(), rollouts.sampled_by, server.gap


def sampled(
    server: SamplingServer, llm: LLM, samples: int = 3, steps: int = 6, **more: Any
) -> Rollouts:
    return sample(
        llm.frozen(),
        PROMPTS,
        samples_per_prompt=samples,
        max_new_tokens=steps,
        sampler=SamplerConfig(kind="vllm_server", url="http://unused", batch_size=4),
        seed=0,
        iteration=13,
        display=Silent(),
        server=server,
        **({"stop": StopRequest()} | more),
    )


def config_of(stub: SamplingStub, *overrides: str) -> Config:
    server = (LORA, "sampler=vllm_server", f"sampler.url={stub.url}", "sampler.patience=5")
    return compose([*SMALL, *server, *FEW, *overrides])


# What is asked and what comes back ----------------------------------------------------------------


def test_completions_come_from_the_adapter_that_was_loaded(
    stub: SamplingStub, tmp_path: Path
) -> None:
    llm, server = trained_llm(), server_of(stub, tmp_path)
    rollouts = sampled(server, llm)
    assert len(stub.loaded) == 1
    assert rollouts.sampled_by == stub.loaded[0]
    assert rollouts.sampled_by.startswith("cft-my-run-")
    assert rollouts.sampled_by.endswith("-000012")  # the LLM after twelve iterations
    assert stub.adapters == {}  # unloaded, and its folder is gone
    assert list((tmp_path / "my run" / "adapters").iterdir()) == []
    # The log-probabilities agree with those of the LLM here, adapters and all.
    assert server.gap is not None
    assert server.gap < 1e-4
    # What a completion is: its tokens, then the end or the limit; hidden states as by `decode`.
    lengths = rollouts.mask_NT.sum(-1)
    for ids, length in zip(rollouts.ids_NT.tolist(), lengths.tolist(), strict=True):
        assert 0 not in ids[: length - 1]
        assert length == 6 or ids[length - 1] == 0
    logits = llm.head(rollouts.hidden_NTD)
    ours = logits.log_softmax(-1).gather(-1, rollouts.ids_NT[..., None])[..., 0]
    stems = [PROMPTS[i].token_ids for i in rollouts.prompt_N.tolist()]
    for row, (stem, ids) in enumerate(zip(stems, rollouts.ids_NT.tolist(), strict=True)):
        whole = torch.tensor([[*stem, *ids[: int(lengths[row])]]])
        said = llm.module(whole).logits[0, len(stem) - 1 : -1].log_softmax(-1)
        expected = said.gather(-1, whole[0, len(stem) :, None])[:, 0]
        assert torch.allclose(ours[row, : int(lengths[row])], expected, atol=1e-4)
    # The same numbers again for the same seed.
    assert torch.equal(sampled(server, llm).ids_NT, rollouts.ids_NT)


def test_nothing_truncates_or_sharpens_whatever_the_servers_defaults_are(
    stub: SamplingStub, tmp_path: Path
) -> None:
    llm = trained_llm()
    rollouts = sampled(server_of(stub, tmp_path), llm, samples=600, steps=1)
    for place, one in enumerate(PROMPTS):
        logits = llm.module(torch.tensor([one.token_ids])).logits[0, -1]
        first = rollouts.ids_NT[rollouts.prompt_N == place, 0]
        # A statistic of all tokens: the mean log p of what is sampled is minus the entropy.
        logs = logits.log_softmax(-1)
        entropy = -(logs.exp() * logs).sum()
        spread = (logs.exp() * (logs + entropy) ** 2).sum().sqrt()
        error = (-logs[first].mean() - entropy).abs()
        assert error < 4 * spread / 600**0.5
        assert len(first.unique()) > 30  # the defaults would leave three
    assert len({body["seed"] for body in stub.asked}) == len(PROMPTS)


def test_tokens_beyond_the_vocabulary_are_not_sampled(tmp_path: Path) -> None:
    stub = SamplingStub(tiny_model("qwen2", seed=0))  # 272 rows in its head, 257 tokens
    try:
        rollouts = sampled(server_of(stub, tmp_path), trained_llm("qwen2"), samples=30)
    finally:
        stub.close()
    assert int(rollouts.ids_NT.max()) < 257


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("other_name", "answered with the model 'cft-my-run-.*-before'.* stale"),
        ("stale", "differ from those of the LLM here by .* nats a token"),
        ("beyond", "token id 257, and the vocabulary has 257"),
        ("few", "2 completions where 3 were asked"),
        ("text_only", "no token_ids but text alone"),
        ("short", "ends after 1 of 6 tokens without the end-of-text token 0"),
        ("other_prompt", r"read other tokens than the \d+ of the prompt"),
        ("no_logprobs", "does not hold a log-probability for each"),
        ("unloaded", "status 404: .*does not exist"),
        ("refuses_adapters", "did not load cft-.* from /.*404.*--enable-lora"),
        ("down", "status 503"),
    ],
)
def test_what_is_wrong_with_the_server_is_said(
    stub: SamplingStub, tmp_path: Path, fault: str, message: str
) -> None:
    stub.fault, stub.stale = fault, stub.base
    with pytest.raises(SamplingError, match=message) as caught:
        sampled(server_of(stub, tmp_path, patience=0.3), trained_llm())
    assert caught.value.exit_code == 4
    assert stub.adapters == {}  # unloaded all the same


def test_a_folder_the_server_does_not_see_is_named_as_it_sees_it(
    stub: SamplingStub, tmp_path: Path
) -> None:
    llm, here, there = trained_llm(), tmp_path / "here", tmp_path / "there"
    keys = {"adapters_dir": str(here), "adapters_dir_on_server": str(there)}
    server = server_of(stub, tmp_path, **keys)
    with pytest.raises(SamplingError, match=f"from {there}/cft-.*no adapter in"):
        sampled(server, llm)
    there.symlink_to(here)
    assert sampled(server, llm).sampled_by == stub.loaded[0]


def test_ranks_share_the_prompts_and_one_adapter(stub: SamplingStub, tmp_path: Path) -> None:
    alone = sampled(server_of(stub, tmp_path), trained_llm())
    first, second = together(on_a_rank, 2, f"{stub.url}/v1/", tmp_path)
    assert first == second
    assert first[0] == alone.ids_NT.tolist()
    assert stub.loaded == [alone.sampled_by, first[1]] == 2 * [alone.sampled_by]
    assert len(stub.asked) == 2 * len(PROMPTS)
    assert stub.adapters == {}


def test_an_answer_that_is_lost_is_asked_for_again(stub: SamplingStub, tmp_path: Path) -> None:
    stub.fault = "garbage_first"
    rollouts = sampled(server_of(stub, tmp_path), trained_llm())
    assert len(stub.asked) == len(PROMPTS) + 1
    assert len(rollouts.texts) == 6


def test_a_server_that_does_not_answer_in_time_is_asked_again_and_given_up(
    stub: SamplingStub, tmp_path: Path
) -> None:
    stub.fault = "slow"  # a second for each answer
    hasty = server_of(stub, tmp_path, timeout=0.2, patience=0.5)
    with pytest.raises(SamplingError, match=r"no answer within 0\.2 s") as caught:
        sampled(hasty, trained_llm(), samples=1)
    assert caught.value.exit_code == 4
    assert len(stub.asked) > 1
    assert len(sampled(server_of(stub, tmp_path), trained_llm(), samples=1).texts) == 2


def test_a_server_that_is_gone_is_said(stub: SamplingStub, tmp_path: Path) -> None:
    gone = SamplingStub(stub.base)
    gone.close()
    with pytest.raises(SamplingError, match=r"Connection refused \(http://127"):
        sampled(server_of(gone, tmp_path, patience=0.3), trained_llm())


def test_what_an_earlier_attempt_left_is_unloaded(stub: SamplingStub, tmp_path: Path) -> None:
    llm, server = trained_llm(), server_of(stub, tmp_path)
    ours = sampled(server, llm).sampled_by
    stub.adapters = {ours: stub.base, f"{ours[:-1]}1": stub.base, "cft-other-000012": stub.base}
    assert sampled(server, llm).sampled_by == ours
    assert set(stub.adapters) == {"cft-other-000012"}


def test_a_slow_server_does_not_hold_up_an_interruption(stub: SamplingStub, tmp_path: Path) -> None:
    stub.fault = "slow"

    class Stopped(StopRequest):
        asked = 0

        def check(self) -> None:
            self.asked += 1
            if self.asked > 3:
                raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        sampled(server_of(stub, tmp_path), trained_llm(), samples=1, stop=Stopped())
    assert len(stub.asked) <= len(PROMPTS)


# Runs ---------------------------------------------------------------------------------------------


def test_a_run_samples_what_it_learns_from_on_the_server(
    stub: SamplingStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CFT_TEST_KEY", "canary-of-the-tests")
    config = config_of(stub, "sampler.api_key_env=CFT_TEST_KEY", "trainer.learning_rate=0.01")
    folder = RunFolder(tmp_path / "run").start(config, ["cft", "train"])
    train(config, folder, Silent(), StopRequest())
    folder.close()
    # Once before training, then each version, the final one for R.
    assert [name[-1] for name in stub.loaded] == ["0", "0", "1", "2", "3"]
    assert stub.adapters == {}
    for iteration in (1, 2, 3):
        rows = folder.rollouts_file(iteration).read_text().splitlines()
        assert len(rows) == 16
        version = f"-00000{iteration - 1}"
        assert all(json.loads(row)["sampled_by"].endswith(version) for row in rows)
    metrics = [json.loads(row) for row in folder.metrics_file.read_text().splitlines()]
    assert all(row["rollouts/logprob_gap"] < 1e-3 for row in metrics)
    assert set(stub.keys) == {"Bearer canary-of-the-tests"}
    kept = [path for path in folder.path.rglob("*") if path.is_file()]
    assert not any(b"canary-of-the-tests" in path.read_bytes() for path in kept)


def test_a_server_that_fails_in_training_leaves_a_run_that_goes_on(
    stub: SamplingStub, tmp_path: Path
) -> None:
    config = config_of(stub)

    def fail(one: SamplingStub) -> None:
        if one.loaded[-1].endswith("-000002"):
            one.fault = "few"

    stub.on_load = fail
    folder = RunFolder(tmp_path / "run").start(config, ["cft", "train"])
    with pytest.raises(SamplingError, match="completions where 4 were asked"):
        train(config, folder, Silent(), StopRequest())
    assert folder.checkpoint(2).is_dir()
    stub.fault, stub.on_load = "", None
    folder.write_status("failed")
    folder.close()
    again = RunFolder(tmp_path / "run").resume(config, ["cft", "train"])
    train(config, again, Silent(), StopRequest())
    again.close()
    assert again.rollouts_file(3).is_file()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("down", "there is no sampling server at sampler.url=.*status 503"),
        ("refuses_adapters", "before training: .*did not load"),
        ("no room", "takes 8: start it with --max-model-len"),
    ],
)
def test_before_training_the_exit_code_is_3(
    stub: SamplingStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    monkeypatch.setattr(service, "_FIRST_PATIENCE", 0.3)
    stub.fault, stub.room = fault, 8 if fault == "no room" else 256
    config = config_of(stub)
    folder = RunFolder(tmp_path / "run").start(config, ["cft", "train"])
    with pytest.raises(SamplerError, match=message) as caught:
        train(config, folder, Silent(), StopRequest())
    folder.close()
    assert caught.value.exit_code == 3
    assert not folder.metrics_file.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampler.url=http://localhost:8000"], "needs llm.lora: only adapters reach a server"),
        ([LORA], "sampler.url"),
        ([LORA, "sampler.url=http://me:secret@host"], "sampler.url"),
        ([LORA, "sampler.url=http://localhost:8000", "trainer=grpo"], "samples by itself"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([*SMALL, "sampler=vllm_server", *overrides])
