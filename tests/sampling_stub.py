"""A stand-in for a vLLM server around a tiny model: the part of its protocol that we use.

As with the real one, what a request does not say comes from defaults of the model, here wrong ones
on purpose; adapters are read from a folder when they are loaded, and listed by name.
"""

import copy
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import PreTrainedModel

DEFAULTS = {"temperature": 0.2, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.5}
END = 0


class SamplingStub:
    """Serves `base` on a port of loopback.

    `fault` is one of: nothing; `down`, `unloaded`, `refuses_adapters`, `slow`, `garbage_first`;
    `stale` (old weights under the new name), `other_name`, `beyond`, `few`, `text_only`,
    `short`, `other_prompt`, `no_logprobs`.
    """

    def __init__(self, base: PreTrainedModel, fault: str = "") -> None:
        self.base, self.fault = base, fault
        self.adapters: dict[str, Any] = {}
        self.loaded: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.room = 256
        self.stale: Any = None
        self.on_load: Any = None
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                self._answer(json.loads(self.rfile.read(length)))

            def _answer(self, body: dict[str, Any]) -> None:
                stub.keys.append(self.headers.get("authorization"))
                code, said = stub.answer(self.path, body)
                data = (said if isinstance(said, str) else json.dumps(said)).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if self.fault == "down":
            return 503, "starting"
        with self._lock:
            match path:
                case "/v1/models":
                    base = {"id": "base", "max_model_len": self.room}
                    return 200, {"data": [base, *({"id": name} for name in self.adapters)]}
                case "/v1/load_lora_adapter":
                    return self._load(body["lora_name"], body["lora_path"])
                case "/v1/unload_lora_adapter":
                    if self.adapters.pop(body["lora_name"], None) is None:
                        return 404, _error("cannot be found")
                    return 200, "Success"
                case "/v1/completions":
                    self.asked.append(body)
                    return self._complete(body)
        return 404, {"detail": "Not Found"}

    def _load(self, name: str, path: str) -> tuple[int, Any]:
        if self.fault == "refuses_adapters":
            return 404, {"detail": "Not Found"}
        if name in self.adapters:
            return 400, _error("has already been loaded")
        if not Path(path).is_dir():
            return 500, _error(f"no adapter in {path}")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(self.base), path)
        self.adapters[name] = model.eval()
        self.loaded.append(name)
        if self.on_load is not None:
            self.on_load(self)
        return 200, "Success"

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["model"]
        if self.fault == "unloaded" or name not in self.adapters:
            return 404, _error(f"The model `{name}` does not exist.")
        if self.fault == "garbage_first" and len(self.asked) == 1:
            return 200, "<html>"
        if self.fault == "slow":
            time.sleep(1.0)
        model = self.stale if self.fault == "stale" else self.adapters[name]
        said = _sample(model, body, body["n"] - (self.fault == "few"))
        choices = [self._choice(index, body, *one) for index, one in enumerate(said)]
        named = f"{name}-before" if self.fault == "other_name" else name
        return 200, {"model": named, "choices": choices}

    def _choice(
        self, index: int, body: dict[str, Any], ids: list[int], logs: list[float]
    ) -> dict[str, Any]:
        prompt = body["prompt"]
        if self.fault == "beyond":
            ids = [*ids[:-1], 257]
        if self.fault == "short":
            ids, logs = [5], [-5.0]
        choice = {
            "index": index,
            "text": "",
            "token_ids": ids if body.get("return_token_ids") else None,
            "prompt_token_ids": prompt[1:] if self.fault == "other_prompt" else prompt,
            "logprobs": {"token_logprobs": logs},
        }
        if self.fault == "text_only":
            del choice["token_ids"]
        if self.fault == "no_logprobs":
            choice["logprobs"] = None
        return choice


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}


@torch.no_grad()
def _sample(model: Any, body: dict[str, Any], count: int) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities, with everything a request may ask for."""
    generators = [torch.Generator().manual_seed(body["seed"] + row) for row in range(count)]
    ends = set(body.get("stop_token_ids") or []) | (set() if body.get("ignore_eos") else {END})
    said: list[tuple[list[int], list[float]]] = [([], []) for _ in range(count)]
    whole = torch.tensor([body["prompt"]] * count)
    for _ in range(body["max_tokens"]):
        logits_BV = model(whole).logits[:, -1].float()
        tokens = []
        for row, (ids, logs) in enumerate(said):
            probs_V = _shaped(logits_BV[row].clone(), body, whole[row].tolist())
            tokens.append(int(torch.multinomial(probs_V, 1, generator=generators[row])))
            if not ids or ids[-1] not in ends:
                ids.append(tokens[-1])
                logs.append(float(logits_BV[row].log_softmax(-1)[tokens[-1]]))
        whole = torch.cat([whole, torch.tensor(tokens)[:, None]], 1)
    return said


def _shaped(logits_V: torch.Tensor, body: dict[str, Any], before: list[int]) -> torch.Tensor:
    said = DEFAULTS | {key: body[key] for key in DEFAULTS if body.get(key) is not None}
    for token, bias in (body.get("logit_bias") or {}).items():
        logits_V[int(token)] += bias
    seen = logits_V[before]
    logits_V[before] = torch.where(
        seen > 0, seen / said["repetition_penalty"], seen * said["repetition_penalty"]
    )
    probs_V = (logits_V / said["temperature"]).softmax(-1)
    ranked = probs_V.sort(descending=True)
    kept = ranked.values.cumsum(-1) - ranked.values < said["top_p"]
    if said["top_k"] > 0:
        kept[int(said["top_k"]) :] = False
    return torch.zeros_like(probs_V).scatter_(0, ranked.indices, ranked.values * kept)
