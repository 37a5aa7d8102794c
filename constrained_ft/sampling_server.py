"""A vLLM server that samples: prompts go out as token ids, completions come back as token ids.

Weights reach it as LoRA adapters, each under a name of its own with the run and the LLM's version
in it: written to a folder that the server sees, loaded, sampled from, unloaded. Its answers have to
name that adapter, and the log-probabilities it gives are compared to those of the LLM here, so that
stale or other weights do not go unnoticed.

The protocol is that of vLLM's OpenAI-compatible server (docs.vllm.ai: "OpenAI-Compatible Server",
"LoRA Adapters"): `/v1/completions` with `return_token_ids`, `/v1/models`, `/v1/load_lora_adapter`,
`/v1/unload_lora_adapter`. vLLM itself is not imported.

Shape suffixes:  M completion tokens, D hidden width.
"""

import hashlib
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.nn.functional as F

from constrained_ft.config import SamplerConfig
from constrained_ft.decoding import Decoded
from constrained_ft.distributed import StopRequest, World, pack
from constrained_ft.errors import SamplerError, SamplingError
from constrained_ft.llm import FrozenLLM
from constrained_ft.loading import write_adapter
from constrained_ft.service import (
    HEALING,
    Address,
    Asking,
    Final,
    Passing,
    Service,
    Unanswered,
)

_POLL_SECONDS = 0.2
_LEAVING_SECONDS = 5.0  # to unload after a failure
_MALFORMED = 5  # answers in a row that are no JSON
_CHUNK_ROWS = 256
_START = (
    "the server needs --enable-lora, --max-lora-rank of llm.lora.r or more, "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and that folder, under this path "
    "(sampler.adapters_dir_on_server); see docs/sampling-server.md"
)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked for of one prompt."""

    prompt: tuple[int, ...]
    """Token ids."""
    samples: int
    """Completions, n."""
    max_new_tokens: int
    """Longest completion, T."""
    seed: int
    """Of the server's random numbers for this prompt."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """One completion."""

    ids: tuple[int, ...]
    """Its tokens, end-of-text included."""
    logprobs: tuple[float, ...]
    """What the server says of their probability, nats."""


class SamplingServer:
    """The server of one run."""

    def __init__(self, config: SamplerConfig, folder: Path) -> None:
        """Get ready; nothing is asked yet.

        Args:
            config: the `sampler` section, of `kind: vllm_server`.
            folder: where the run keeps adapters if the section does not say.

        Raises:
            SamplerError: if httpx or tenacity is missing, or the key's variable is not set.
        """
        assert config.url is not None
        self._config = config
        self._url = config.url.rstrip("/").removesuffix("/v1")
        self._folder = (Path(config.adapters_dir) if config.adapters_dir else folder).resolve()
        self._seen = PurePosixPath(config.adapters_dir_on_server or self._folder.as_posix())
        run = folder.resolve().parent
        slug = re.sub(r"[^A-Za-z0-9.-]", "-", run.name)[:40]
        # Runs of a sweep have folders of the same name.
        self._run = f"cft-{slug}-{hashlib.sha256(str(run).encode()).hexdigest()[:6]}"
        self._service = Service(
            Address(
                section="sampler",
                kind="vllm_server",
                error=SamplerError,
                url=config.url,
                timeout=config.timeout,
                patience=config.patience,
                in_flight=config.in_flight,
                api_key_env=config.api_key_env,
            )
        )
        self.gap: float | None = None
        """Mean |log p there - log p here| of the last iteration's tokens, nats."""

    def probe(self) -> None:
        """See whether it is there.

        Raises:
            SamplerError: when it does not say which models it serves.
        """
        self._models_before()

    def require_room(self, tokens: int) -> None:
        """See whether a prompt and its completion fit.

        Raises:
            SamplerError: when the server takes less, or is gone.
        """
        models = self._models_before()
        room = min((one for one in models.values() if one is not None), default=tokens)
        if tokens > room:
            raise SamplerError(
                f"the longest prompt and prompts.max_new_tokens are {tokens} tokens, and the "
                f"sampling server ({self._service.where}) takes {room}: start it with "
                f"--max-model-len {tokens}"
            )

    @contextmanager
    def serving(self, llm: FrozenLLM, iteration: int, world: World) -> Iterator["Version"]:
        """Have the server sample from a frozen copy for as long as this lasts.

        Args:
            llm: its adapters are loaded by the first rank and unloaded afterwards.
            iteration: the one at whose start the LLM stands like this; its version is one less.
            world: who samples; all of them have to enter and leave.

        Raises:
            SamplingError: when the server does not load it.
        """
        self._service.begin()
        name = f"{self._run}-{iteration - 1:06d}"
        try:
            if world.leads:
                self._load(llm, name)
            world.tell(pack({}, name))  # nobody asks before it is there
            version = Version(self._service, self._url, self._config, name)
            yield version
            total, count = world.totals([version.gap_sum, float(version.gap_count)])
            self.gap = total / max(count, 1.0)
        except BaseException:
            if world.leads:
                self._leave(name)
            raise
        finally:
            if world.leads:
                shutil.rmtree(self._folder / name, ignore_errors=True)
        if world.leads:
            self._ask(lambda asking: self._unload(asking, name), f"did not unload {name}")

    def _load(self, llm: FrozenLLM, name: str) -> None:
        write_adapter(llm, self._folder / name)
        body = {"lora_name": name, "lora_path": str(self._seen / name)}

        def once(asking: Asking) -> None:
            # What an earlier attempt of this run left there, or a request whose answer was lost.
            for old in self._models(asking):
                if old.startswith(f"{self._run}-"):
                    self._unload(asking, old)
            with self._service.turn(asking):
                # A folder that it cannot read is status 500, and stays so.
                url = f"{self._url}/v1/load_lora_adapter"
                self._service.send("POST", url, body, heals=HEALING - {500})

        self._ask(once, f"did not load {name} from {body['lora_path']}", _START)

    def _unload(self, asking: Asking, name: str, timeout: float | None = None) -> None:
        url = f"{self._url}/v1/unload_lora_adapter"
        with self._service.turn(asking):
            try:
                self._service.send("POST", url, {"lora_name": name}, timeout=timeout)
            except Final as error:
                if error.status != 404:  # it is gone already
                    raise

    def _leave(self, name: str) -> None:
        """One try to unload; what is left there, the next attempt of this run unloads."""
        self._service.begin()
        try:
            self._service.ask(
                lambda asking: self._unload(asking, name, _LEAVING_SECONDS), lambda: True
            )
        except Unanswered:
            return

    def _models(self, asking: Asking) -> dict[str, int | None]:
        """The names that it serves, and how many tokens each takes where it says so."""
        with self._service.turn(asking):
            tree = self._service.json("GET", f"{self._url}/v1/models")
            try:
                return {str(one["id"]): one.get("max_model_len") for one in tree["data"]}
            except (LookupError, TypeError, AttributeError):
                raise Final("it does not list models under /v1/models") from None

    def _ask(self, once: Callable[[Asking], None], failed: str, hint: str = "") -> None:
        try:
            self._service.ask(once, lambda: False)
        except Unanswered as error:
            words = f"; {hint}" if hint else ""
            raise SamplingError(f"the sampling server {failed}: {error}{words}") from None

    def _models_before(self) -> dict[str, int | None]:
        """Before training."""
        self._service.begin()
        try:
            return self._service.ask(self._models, lambda: False)
        except Unanswered as error:
            raise SamplerError(
                f"there is no sampling server at sampler.url={self._url}: {error}; start one "
                "(docs/sampling-server.md), or use sampler=cft"
            ) from None


class Version:
    """An adapter that is loaded: one version of the LLM."""

    def __init__(self, service: Service, url: str, config: SamplerConfig, name: str) -> None:
        """Of a server that has it.

        Args:
            service: the server.
            url: where it is.
            config: the `sampler` section.
            name: the adapter's.
        """
        self.name = name
        self.gap_sum = 0.0
        """Sum over tokens of |log p there - log p here|, nats."""
        self.gap_count = 0
        """Tokens compared."""
        self._service, self._url, self._config = service, url, config

    def complete(
        self, llm: FrozenLLM, wanted: Sequence[Wanted], stop: StopRequest
    ) -> list[list[Said]]:
        """Completions of each prompt at temperature 1 without truncation.

        Args:
            llm: names the tokens that there are, and the one that ends a completion.
            wanted: the prompts.
            stop: polled meanwhile.

        Raises:
            SamplingError: when the server gives nothing that can be used.
            Interrupted: when asked to stop.
        """
        threads = ThreadPoolExecutor(min(self._config.in_flight, max(len(wanted), 1)))
        futures = [threads.submit(self._prompt, llm, one) for one in wanted]
        try:
            pending = set(futures)
            while pending:
                stop.check()
                done, pending = wait(pending, _POLL_SECONDS)
                for future in done:
                    future.result()  # the first failure ends all
            return [future.result() for future in futures]
        except BaseException:
            self._service.cancel()
            raise
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def compare(self, llm: FrozenLLM, said: Sequence[Said], found: Decoded) -> None:
        """Hold the server's log-probabilities against those of the LLM here.

        Args:
            llm: whose adapters the server is to have.
            said: the completions, with what the server says of them.
            found: the same, with the hidden states of the LLM here.

        Raises:
            SamplingError: when the mean gap is above `sampler.max_logprob_gap`.
        """
        hidden_MD, tokens_M = found.hidden_BTD[found.mask_BT], found.ids_BT[found.mask_BT]
        chunks = zip(hidden_MD.split(_CHUNK_ROWS), tokens_M.split(_CHUNK_ROWS), strict=True)
        with torch.no_grad():
            own = [-F.cross_entropy(llm.head(h), tokens, reduction="none") for h, tokens in chunks]
        theirs_M = torch.tensor([value for one in said for value in one.logprobs])
        gap_M = (torch.cat(own).cpu().double() - theirs_M.double()).abs()
        self.gap_sum += float(gap_M.sum())
        self.gap_count += len(gap_M)
        gap = self.gap_sum / self.gap_count
        if not gap <= self._config.max_logprob_gap:
            raise SamplingError(
                f"the sampling server's log-probabilities for {self.name} differ from those of the "
                f"LLM here by {gap:.3g} nats a token (sampler.max_logprob_gap="
                f"{self._config.max_logprob_gap:g}): it samples from stale or other weights, or in "
                f"another precision ({self._service.where})"
            )

    def _prompt(self, llm: FrozenLLM, wanted: Wanted) -> list[Said]:
        malformed = 0

        def once(asking: Asking) -> list[Said]:
            nonlocal malformed
            try:
                with self._service.turn(asking):
                    url = f"{self._url}/v1/completions"
                    tree = self._service.json("POST", url, request(self.name, llm, wanted))
            except Passing as error:
                malformed += error.malformed
                raise
            return read(tree, self.name, llm, wanted)

        try:
            return self._service.ask(once, lambda: malformed >= _MALFORMED)
        except Unanswered as error:
            raise SamplingError(
                f"the sampling server gave no completions that can be used: {error}"
            ) from None


def request(name: str, llm: FrozenLLM, wanted: Wanted) -> dict[str, Any]:
    """The body for `/v1/completions`.

    Everything that shapes the distribution is said: a server takes what is left out from the
    model's `generation_config.json`. A completion ends at the tokenizer's own end-of-text alone.
    """
    end = llm.tokenizer.eos_token_id
    beyond = range(len(llm.tokenizer), len(llm.head.weight_VD))  # a head may be padded
    return {
        "model": name,
        "prompt": list(wanted.prompt),
        "n": wanted.samples,
        "max_tokens": wanted.max_new_tokens,
        "seed": wanted.seed % 2**53,  # the server adds the number of the sample
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
        "ignore_eos": True,
        "stop": [],
        "stop_token_ids": [] if end is None else [end],
        "logit_bias": {str(token): -100.0 for token in beyond} or None,
        "add_special_tokens": False,
        "logprobs": 0,  # of the token that was sampled, and no others
        "return_token_ids": True,
    }


def read(tree: Any, name: str, llm: FrozenLLM, wanted: Wanted) -> list[Said]:
    """The completions in an answer.

    Raises:
        Final: saying what is wrong with it.
    """
    if not isinstance(tree, dict) or not isinstance(tree.get("choices"), list):
        raise Final("its answer holds no choices")
    if tree.get("model") != name:
        raise Final(
            f"it answered with the model {tree.get('model')!r} where {name!r} was asked, so the "
            "weights are stale"
        )
    choices = tree["choices"]
    if len(choices) != wanted.samples:
        raise Final(f"it gave {len(choices)} completions where {wanted.samples} were asked")
    return [_said(choice, llm, wanted) for choice in choices]


def _said(choice: Any, llm: FrozenLLM, wanted: Wanted) -> Said:
    if not isinstance(choice, dict):
        raise Final(f"a choice in its answer is a {type(choice).__name__}")
    ids = _listed(int, choice.get("token_ids"))
    if ids is None:
        raise Final(
            "its answer holds no token_ids but text alone; the server has to know return_token_ids "
            "(vLLM 0.10.2 or newer)"
        )
    if choice.get("prompt_token_ids") not in (None, list(wanted.prompt)):
        raise Final(f"it read other tokens than the {len(wanted.prompt)} of the prompt")
    _check_tokens(ids, llm, wanted)
    told = choice.get("logprobs")
    logprobs = _listed(int | float, told.get("token_logprobs") if isinstance(told, dict) else None)
    if logprobs is None or len(logprobs) != len(ids):
        raise Final(f"its answer does not hold a log-probability for each of {len(ids)} tokens")
    if not all(math.isfinite(value) for value in logprobs):
        raise Final("a log-probability in its answer is not finite")
    return Said(ids=tuple(ids), logprobs=tuple(map(float, logprobs)))


def _check_tokens(ids: Sequence[int], llm: FrozenLLM, wanted: Wanted) -> None:
    size, end, most = len(llm.tokenizer), llm.tokenizer.eos_token_id, wanted.max_new_tokens
    wrong = next((token for token in ids if not 0 <= token < size), None)
    if wrong is not None:
        raise Final(f"it gave the token id {wrong}, and the vocabulary has {size}")
    if not 1 <= len(ids) <= most:
        raise Final(f"it gave a completion of {len(ids)} tokens where 1 to {most} were asked")
    if end is not None and end in ids[:-1]:
        raise Final(f"a completion goes on after its end-of-text token {end}")
    if len(ids) < most and ids[-1] != end:
        raise Final(
            f"a completion ends after {len(ids)} of {most} tokens without the end-of-text token "
            f"{end}: the server adds stop tokens or limits of its own; start it with "
            "--generation-config vllm and a larger --max-model-len"
        )


def _listed(kind: Any, values: Any) -> list[Any] | None:
    """A list of such numbers, or None."""
    if isinstance(values, list) and all(
        isinstance(value, kind) and not isinstance(value, bool) for value in values
    ):
        return values
    return None
