"""Rows become tokens and masks; what is held out and what a step sees depends on no state."""

import csv
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from constrained_ft import sources as sources_module
from constrained_ft.config import DataConfig, PromptsConfig
from constrained_ft.corpus import Corpus, CorpusStats, load_corpus
from constrained_ft.encoding import Row, pad_id
from constrained_ft.errors import ConfigError, DataError, ModelError
from constrained_ft.prompts import Prompt, Prompts, load_prompts, read_prompts
from constrained_ft.sources import check_sources
from constrained_ft.tiny import byte_tokenizer

EOS = 0
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def character_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One token a character, with <s> in front of every text and </s> as its end."""
    symbols = ["<s>", "</s>", *map(chr, range(32, 127)), "\n"]
    backend = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options
    )


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def corpus_of(
    tmp_path: Path, rows: list[Any], tokenizer: PreTrainedTokenizerBase | None = None, **keys: Any
) -> Corpus:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DataConfig(path=path, **({"max_length": 64, "validation_share": 0.0} | keys))
    return load_corpus(config, tokenizer or byte_tokenizer())


def said(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """All of a row, and the part of it that is trained."""
    trained = [i for i, is_trained in zip(row.token_ids, row.trained, strict=True) if is_trained]
    return str(tokenizer.decode(row.token_ids)), str(tokenizer.decode(trained))


# Masks --------------------------------------------------------------------------------------------


def test_text_is_trained_but_for_its_first_token_and_its_end_is_trained(tmp_path: Path) -> None:
    (row,) = corpus_of(tmp_path, [{"text": "abc"}]).training
    tokenizer = byte_tokenizer()
    assert row.token_ids == (*tokenizer("abc")["input_ids"], EOS)
    # Padding, beginning and end share the id 0 in this tokenizer; the end is trained all the same.
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    assert row.trained == (False, True, True, True)
    assert (row.group, row.prompted) == ("corpus", False)


def test_the_end_is_not_written_twice(tmp_path: Path) -> None:
    (row,) = corpus_of(tmp_path, [{"text": "abc<|endoftext|>"}]).training
    assert said(row, byte_tokenizer()) == ("abc<|endoftext|>", "bc<|endoftext|>")


def test_only_the_completion_is_trained(tmp_path: Path) -> None:
    (row,) = corpus_of(tmp_path, [{"prompt": "2+2=", "completion": " four"}]).training
    assert said(row, byte_tokenizer()) == ("2+2= four<|endoftext|>", " four<|endoftext|>")
    assert row.prompted


def test_only_what_the_assistant_says_is_trained(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "ciao"},
    ]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    (row,) = corpus_of(tmp_path, [{"messages": messages}], tokenizer, max_length=200).training
    # One token a byte, so that the mask can be written by hand beside the text.
    pieces = [
        ("<system>be kind\n<user>hi\n<assistant>", False),
        ("yo", True),
        ("<|endoftext|>", True),
        ("\n<user>bye\n<assistant>", False),
        ("ciao", True),
        ("<|endoftext|>", True),
    ]
    lengths = [1 if text == "<|endoftext|>" else len(text) for text, _ in pieces]
    expected = [t for (_, t), n in zip(pieces, lengths, strict=True) for _ in range(n)]
    assert said(row, byte_tokenizer())[0] == "".join(text for text, _ in pieces)
    assert list(row.trained) == expected
    assert row.prompted


def test_a_chat_that_ends_with_a_question_trains_the_answers_before_it(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "bye"},
    ]
    (row,) = corpus_of(tmp_path, [{"messages": messages}]).training
    assert said(row, byte_tokenizer())[1] == "yo<|endoftext|>"


def test_the_end_is_trained_where_the_template_does_not_write_it(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (row,) = corpus_of(tmp_path, [{"messages": messages}], tokenizer).training
    assert said(row, tokenizer)[1].endswith("yo<|endoftext|>")


def test_chat_rows_that_cannot_be_trained_are_refused(tmp_path: Path) -> None:
    user = {"role": "user", "content": "hi"}
    answer = {"role": "assistant", "content": "yo"}
    with pytest.raises(DataError, match=r"row 1 of .*no message has the role `assistant`"):
        corpus_of(tmp_path, [{"messages": [user]}])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(DataError, match="rewrites earlier turns"):
        corpus_of(tmp_path, [{"messages": [user, answer, user, answer]}], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        corpus_of(tmp_path, [{"messages": [user, answer]}], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        corpus_of(tmp_path, [{"messages": [user, answer]}], tokenizer)


def test_a_beginning_token_comes_once_and_is_not_trained(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    rows = [{"text": "abc"}, {"prompt": "ab", "completion": "cd"}]
    text, completion = corpus_of(tmp_path, rows, tokenizer).training
    assert tokenizer.convert_ids_to_tokens(text.token_ids) == ["<s>", "a", "b", "c", "</s>"]
    assert text.trained == (False, True, True, True, True)
    assert completion.trained == (False, False, False, True, True, True)
    with pytest.raises(DataError, match="begins with '<s>', which the tokenizer adds itself"):
        corpus_of(tmp_path, [{"text": "<s>abc"}], tokenizer)


def test_a_tokenizer_that_puts_a_space_before_every_text_does_not_split_words(
    tmp_path: Path,
) -> None:
    symbols = ["</s>", "▁", *map(chr, range(97, 123))]
    backend = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    row, other = corpus_of(
        tmp_path,
        [{"prompt": "ab", "completion": "cd ef"}, {"prompt": "ab ", "completion": "cd"}],
        tokenizer,
    ).training
    assert tokenizer.convert_ids_to_tokens(row.token_ids) == [*"▁abcd▁ef", "</s>"]
    assert row.trained == (False, False, False, True, True, True, True, True, True)
    assert tokenizer.convert_ids_to_tokens(other.token_ids) == [*"▁ab▁cd", "</s>"]


def test_no_token_straddles_the_border_of_prompt_and_completion(tmp_path: Path) -> None:
    symbols = ["</s>", "a", "b", "ab"]
    backend = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    (row,) = corpus_of(tmp_path, [{"prompt": "aba", "completion": "bab"}], tokenizer).training
    # Together the text is ab ab ab; the sampler is given the prompt's own tokens, ab a.
    assert tokenizer.convert_ids_to_tokens(row.token_ids) == ["ab", "a", "b", "ab", "</s>"]
    assert row.trained == (False, False, True, True, True)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 60), max_length=st.integers(4, 20), beginning=st.sampled_from([0, 1]))
def test_a_long_text_is_split_without_losing_or_doubling_a_token(
    tmp_path_factory: pytest.TempPathFactory, length: int, max_length: int, beginning: int
) -> None:
    tokenizer = character_tokenizer() if beginning else byte_tokenizer()
    text = "".join(random.Random(length).choices("abcdefgh", k=length))
    folder = tmp_path_factory.mktemp("split")
    corpus = corpus_of(folder, [{"text": text}], tokenizer, max_length=max_length)
    bare = [row.token_ids[1:] if beginning else row.token_ids for row in corpus.training]
    whole = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert [token for row in bare for token in row] == whole
    for row in corpus.training:
        assert 2 <= len(row.token_ids) <= max_length
        assert row.trained == (False, *[True] * (len(row.token_ids) - 1))
        if beginning:
            assert row.token_ids[0] == tokenizer.bos_token_id
    assert corpus.stats.split_documents == (len(corpus.training) > 1)
    assert corpus.stats.truncated_rows == 0
    assert corpus.stats.longest == len(whole) + beginning


def test_a_long_completion_is_cut_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "abcd", "completion": "efghijkl"}, {"prompt": "a", "completion": "b"}]
    corpus = corpus_of(tmp_path, rows, max_length=8)
    assert said(corpus.training[0], byte_tokenizer()) == ("abcdefgh", "efgh")
    assert (corpus.stats.truncated_rows, corpus.stats.longest) == (1, 13)
    with pytest.raises(DataError, match=r"row 1 of .*no token is left to train.*max_length=4"):
        corpus_of(tmp_path, rows, max_length=4)


def test_the_numbers_of_a_corpus_are_those_counted_by_hand(tmp_path: Path) -> None:
    rows = [
        {"text": "abc"},  # 4 tokens with its end, 3 of them trained
        {"text": "abcdefghi", "group": "long"},  # 10 tokens in two rows, 8 trained
        {"prompt": "ab", "completion": "c", "group": "long"},  # 4 tokens, 2 trained
    ]
    stats = corpus_of(tmp_path, rows, max_length=8).stats
    counts = {"truncated_rows": 0, "validation_rows": 0}
    short = CorpusStats(rows=1, tokens=4, trained_tokens=3, longest=4, split_documents=0, **counts)
    long = CorpusStats(
        rows=3, tokens=14, trained_tokens=10, longest=10, split_documents=1, **counts
    )
    assert stats.by_group == {"corpus": short, "long": long}
    assert (stats.rows, stats.tokens, stats.trained_tokens, stats.longest) == (4, 18, 13, 10)


def test_a_tokenizer_without_padding_still_has_an_id_to_fill_with() -> None:
    assert pad_id(byte_tokenizer()) == EOS
    tokenizer = character_tokenizer()
    assert tokenizer.pad_token_id is None
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a padding nor an end-of-text token"):
        pad_id(tokenizer)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-text token"):
        corpus_of(tmp_path, [{"text": "abc"}], tokenizer)


# Files --------------------------------------------------------------------------------------------

# Texts that a reader is tempted to turn into something else.
TEXTS = ["plain", "NA", "null", "007", "1e5", "2020-01-01", 'a "b", c', "two\nlines", "naïve “x”"]


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["n", "text"])
        writer.writerows(enumerate(TEXTS))


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"n": range(len(TEXTS)), "text": TEXTS}), path)


def write_rows(path: Path) -> None:
    write_jsonl(path, [{"n": n, "text": text} for n, text in enumerate(TEXTS)])


def write_array(path: Path) -> None:
    path.write_text(json.dumps([{"text": text} for text in TEXTS]))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", write_rows),
        ("rows.json", write_array),
        ("rows.csv", write_csv),
        ("rows.parquet", write_parquet),
    ],
)
def test_every_format_gives_the_same_texts(
    tmp_path: Path,
    name: str,
    write: Callable[[Path], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / name)
    config = DataConfig(path=str(tmp_path / name), max_length=64, validation_share=0)
    tokenizer = byte_tokenizer()
    rows = load_corpus(config, tokenizer).training
    texts = [tokenizer.decode(row.token_ids, skip_special_tokens=True) for row in rows]
    assert texts == TEXTS
    assert capfd.readouterr() == ("", "")


def test_each_line_of_a_text_file_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("first line\n\n  \nNA\nlast", encoding="utf-8")
    config = DataConfig(path=str(tmp_path / "rows.txt"), max_length=64, validation_share=0)
    tokenizer = byte_tokenizer()
    rows = load_corpus(config, tokenizer).training
    texts = [tokenizer.decode(row.token_ids, skip_special_tokens=True) for row in rows]
    assert texts == ["first line", "NA", "last"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a.jsonl is empty"),
        ("a.jsonl", "\n\n", r"a.jsonl has no rows"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', r"row 2 of .*a.jsonl is not JSON"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', r"row 2 of .*a.jsonl is not a JSON object"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', r"row 2 of .*a.jsonl has no text"),
        ("a.jsonl", '{"text": "a"}\n{"text": " "}\n', r"row 2 of .*a.jsonl is empty"),
        ("a.jsonl", '{"text": "a"}\n{"text": 5}\n', r"row 2 .*`text` is int, but must be a string"),
        ("a.jsonl", '{"body": "a"}\n', r"row 1 .*it has body. If the text has another name"),
        ("a.jsonl", '{"text": "a", "group": 3}\n', r"row 1 .*`group` is int"),
        ("a.jsonl", '{"prompt": "a"}\n', r"row 1 of .*a.jsonl has no text"),
        ("a.jsonl", '{"prompt": [{"role": "user"}], "completion": "a"}\n', r"`prompt` is list"),
        ("a.jsonl", '{"messages": "hi"}\n', r"row 1 .*`messages` is str, but must be a list"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', r"messages\[1\].content` is NoneType"),
        ("a.csv", "text\n", r"a.csv has no rows"),
        ("a.csv", "text,n\na,b,c\n", r"a.csv: rows have more fields than the header"),
        ("a.parquet", "not parquet", r"cannot read .*a.parquet as parquet"),
        ("a.xyz", "a", r"does not follow from the ending '.xyz'"),
        ("a.txt", "\n \n", r"a.txt has no rows with text"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name_and_row(
    tmp_path: Path, name: str, content: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    config = DataConfig(path=str(tmp_path / name), max_length=64, validation_share=0)
    with pytest.raises(DataError, match=message) as caught:
        load_corpus(config, byte_tokenizer())
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_is_seen_before_anything_is_loaded(tmp_path: Path) -> None:
    prompts = prompts_config(path=write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}]))
    missing = str(tmp_path / "no.jsonl")
    shared = {"max_length": 64, "validation_share": 0}
    with pytest.raises(DataError, match=r"^data.path: there is no file .*no\.jsonl"):
        check_sources(DataConfig(path=missing, **shared), prompts)
    sources = {"one": {"path": missing}}
    with pytest.raises(DataError, match=r"^data.sources.one.path: there is no file"):
        check_sources(DataConfig(sources=sources, **shared), prompts)
    there = DataConfig(path=write_jsonl(tmp_path / "d.jsonl", [{"text": "a"}]), **shared)
    check_sources(there, prompts)
    with pytest.raises(DataError, match=r"^prompts.path: there is no file"):
        check_sources(there, prompts_config(path=missing))


def test_sources_are_cut_repeated_and_named(tmp_path: Path) -> None:
    news = write_jsonl(tmp_path / "a.jsonl", [{"body": f"news {i}"} for i in range(6)])
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    config = DataConfig(
        sources={
            "news": {"path": news, "text_column": "body", "first_row": 1, "last_row": 4},
            "lines": {"path": str(tmp_path / "*.txt"), "repeat": 3},
        },
        max_length=64,
        validation_share=0,
    )
    tokenizer = byte_tokenizer()
    corpus = load_corpus(config, tokenizer)
    texts = Counter(
        tokenizer.decode(r.token_ids, skip_special_tokens=True) for r in corpus.training
    )
    assert texts == {"news 1": 1, "news 2": 1, "news 3": 1, "one": 3, "two": 3}
    assert {row.group for row in corpus.training} == {"news", "lines"}
    assert (corpus.stats.rows, corpus.stats.by_group["lines"].rows) == (5, 2)


def test_empty_rows_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": ""}, {"text": " \n"}, {"text": "b"}]
    assert corpus_of(tmp_path, rows, skip_empty=True).stats.rows == 2


def test_texts_that_are_prompts_are_left_out_of_the_corpus(tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "d.jsonl", [{"text": f" text {i}\n"} for i in range(6)])
    (tmp_path / "p.txt").write_text("text 1\ntext 4\ntext 9\n")
    sources = {"a": {"path": texts, "exclude": str(tmp_path / "p.txt")}}
    config = DataConfig(sources=sources, max_length=64, validation_share=0)
    tokenizer = byte_tokenizer()
    rows = load_corpus(config, tokenizer).training
    kept = [tokenizer.decode(row.token_ids, skip_special_tokens=True).strip() for row in rows]
    assert kept == ["text 0", "text 2", "text 3", "text 5"]
    missing = {"a": sources["a"] | {"exclude": str(tmp_path / "no.txt")}}
    wrong = DataConfig(sources=missing, max_length=64, validation_share=0)
    with pytest.raises(DataError, match=r"^data.sources.a.exclude: there is no file"):
        check_sources(wrong, prompts_config(path=str(tmp_path / "p.txt")))


def test_a_column_may_lie_inside_another(tmp_path: Path) -> None:
    rows = [{"prompt": {"text": f"prompt {i}", "toxicity": 0.1}} for i in range(8)]
    config = prompts_config(path=write_jsonl(tmp_path / "p.jsonl", rows), text_column="prompt.text")
    prompts = load_prompts(config, byte_tokenizer(), UNUSED, 256)
    texts = {prompt.text for prompt in prompts.training + prompts.held_out}
    assert texts == {f"prompt {i}" for i in range(8)}


def test_a_hub_dataset_is_read_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "hub_failure", lambda *_: None)
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "test.jsonl", [{"text": "abc"}])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    config = DataConfig(name=str(tmp_path / "set"), split="test", max_length=64, validation_share=0)
    tokenizer = byte_tokenizer()
    (row,) = load_corpus(config, tokenizer).training
    assert said(row, tokenizer)[0] == "abc<|endoftext|>"
    wrong = config.model_copy(update={"split": "dev"})
    with pytest.raises(DataError, match="cannot read the split 'dev' of the dataset"):
        load_corpus(wrong, tokenizer)


def test_a_hub_that_cannot_be_reached_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "hub_failure", lambda *_: ConnectionError("no route"))
    config = DataConfig(name="some/set", max_length=64, validation_share=0)
    with pytest.raises(DataError, match=r"some/set from the hub: ConnectionError: no route"):
        load_corpus(config, byte_tokenizer())


# Splits and order ---------------------------------------------------------------------------------


def test_what_is_held_out_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = [{"text": f"text number {i}"} for i in range(300)] + [{"text": "text number 7"}]
    one = corpus_of(tmp_path, rows, validation_share=0.2)
    random.Random(0).shuffle(rows)
    other = corpus_of(tmp_path, rows, validation_share=0.2)
    held = {row.token_ids for row in one.validation}
    assert held == {row.token_ids for row in other.validation}
    assert held.isdisjoint(row.token_ids for row in one.training)
    assert 35 <= one.stats.validation_rows <= 85
    # A part of the rows is split as it was among all of them.
    some = corpus_of(tmp_path, rows[:150], validation_share=0.2)
    assert {row.token_ids for row in some.validation} <= held


def test_all_rows_of_a_long_text_are_on_one_side(tmp_path: Path) -> None:
    rows = [{"text": chr(97 + i) * 40} for i in range(20)]
    corpus = corpus_of(tmp_path, rows, validation_share=0.5, max_length=8)
    sides = [{row.token_ids[0] for row in side} for side in (corpus.training, corpus.validation)]
    assert sides[0].isdisjoint(sides[1])
    assert all(sides)


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_small_group_still_has_rows_on_both_sides(tmp_path: Path, share: float) -> None:
    rows = [{"text": t, "group": g} for g in ("x", "y") for t in (f"{g}1", f"{g}2", f"{g}3")]
    corpus = corpus_of(tmp_path, rows, validation_share=share)
    for side in (corpus.training, corpus.validation):
        assert {row.group for row in side} == {"x", "y"}


def test_a_corpus_of_one_text_held_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row is left for training"):
        corpus_of(tmp_path, [{"text": "a"}], validation_share=0.999)


def numbered_corpus(size: int) -> Corpus:
    rows = tuple(
        Row(token_ids=(i, i), trained=(False, True), group="g", prompted=False) for i in range(size)
    )
    counts = dict.fromkeys(("rows", "tokens", "trained_tokens", "longest"), 0)
    more = dict.fromkeys(("truncated_rows", "split_documents", "validation_rows"), 0)
    return Corpus(training=rows, validation=(), stats=CorpusStats(**counts, **more))


@given(size=st.integers(1, 30), batch=st.integers(1, 12), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_batches_take_every_row_once_before_any_comes_up_again(
    size: int, batch: int, seed: int
) -> None:
    corpus = numbered_corpus(size)
    steps = -(-3 * size // batch)
    stream = [row.token_ids[0] for step in range(steps) for row in corpus.batch(step, batch, seed)]
    for start in range(0, 3 * size, size):
        assert sorted(stream[start : start + size]) == list(range(size))
    # No state: steps in any order, and half as many rows twice as often, are the same rows.
    assert [r.token_ids[0] for r in corpus.batch(1, batch, seed)] == stream[batch : 2 * batch] or (
        steps == 1
    )
    halves = corpus.batch(0, batch, seed) + corpus.batch(1, batch, seed)
    assert halves == corpus.batch(0, 2 * batch, seed)


def test_another_seed_and_another_pass_have_another_order() -> None:
    corpus = numbered_corpus(50)
    first = corpus.batch(0, 50, 0)
    assert first != corpus.batch(1, 50, 0)
    assert first != corpus.batch(0, 50, 1)
    assert first == corpus.batch(0, 50, 0)


def numbered_prompts(size: int) -> Prompts:
    prompts = tuple(Prompt(id=str(i), text=str(i), group="g", token_ids=(i,)) for i in range(size))
    return Prompts(training=prompts, held_out=())


@given(size=st.integers(1, 40), share=st.floats(0.01, 1.0), seed=st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_iterations_take_every_prompt_once_before_any_comes_up_again(
    size: int, share: float, seed: int
) -> None:
    prompts = numbered_prompts(size)
    count = max(1, round(size * share))
    iterations = -(-4 * size // count)
    stream: list[int] = []
    for iteration in range(1, iterations + 1):
        chosen = [int(p.id) for p in prompts.of_iteration(iteration, count, seed)]
        assert len(set(chosen)) == count
        stream += chosen
    for start in range(0, 4 * size, size):
        assert sorted(stream[start : start + size]) == list(range(size))


# Prompts ------------------------------------------------------------------------------------------

UNUSED = DataConfig(path="unused", max_length=64, validation_share=0)


def prompts_config(**keys: Any) -> PromptsConfig:
    shape = {"prompts_per_iteration": 1, "samples_per_prompt": 2, "max_new_tokens": 8}
    return PromptsConfig(**(shape | {"held_out_share": 0.3} | keys))


def test_prompts_are_distinct_and_on_one_side(tmp_path: Path) -> None:
    for name, lines in (("a", range(40)), ("b", range(20, 60))):
        (tmp_path / f"{name}.txt").write_text("".join(f"prompt {i}\n" for i in lines))
    sources = {name: {"path": str(tmp_path / f"{name}.txt")} for name in ("a", "b")}
    prompts = load_prompts(prompts_config(sources=sources), byte_tokenizer(), UNUSED, 256)
    everything = prompts.training + prompts.held_out
    assert sorted(p.text for p in everything) == sorted(f"prompt {i}" for i in range(60))
    # A prompt of both files belongs to the first.
    assert Counter(p.group for p in everything) == {"a": 40, "b": 20}
    assert {p.group for p in prompts.held_out} == {"a", "b"}
    assert len({p.id for p in everything}) == 60
    for prompt in everything:
        assert list(prompt.token_ids) == byte_tokenizer()(prompt.text)["input_ids"]
    # The other way round, the same texts are held out.
    turned = dict(reversed(sources.items()))
    again = load_prompts(prompts_config(sources=turned), byte_tokenizer(), UNUSED, 256)
    assert {p.text for p in again.held_out} == {p.text for p in prompts.held_out}


def test_a_prompt_begins_like_a_text_and_does_not_end(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("abc\n")
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    (prompt,) = read_prompts(str(tmp_path / "p.txt"), tokenizer).held_out
    assert tokenizer.convert_ids_to_tokens(prompt.token_ids) == ["<s>", "a", "b", "c"]


def test_a_prompt_that_does_not_fit_is_named_with_its_length(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("short\na long prompt\nmore\n")
    config = prompts_config(path=str(tmp_path / "p.txt"), max_new_tokens=8)
    load_prompts(config, byte_tokenizer(), UNUSED, 21)
    load_prompts(config, byte_tokenizer(), UNUSED, None)
    with pytest.raises(DataError, match=r"'a long prompt' .*has 13 tokens.*needs 21.*is 20"):
        load_prompts(config, byte_tokenizer(), UNUSED, 20)


def test_too_few_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(10)))
    config = prompts_config(path=str(tmp_path / "p.txt"), prompts_per_iteration=10)
    with pytest.raises(ConfigError, match=r"prompts_per_iteration=10, but there are only \d"):
        load_prompts(config, byte_tokenizer(), UNUSED, 256)
    (tmp_path / "p.txt").write_text("same\nsame\n")
    with pytest.raises(DataError, match="1 different prompts cannot be split"):
        load_prompts(prompts_config(path=str(tmp_path / "p.txt")), byte_tokenizer(), UNUSED, 256)


def test_prompts_are_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\nb\n")
    sources = {"a": {"path": str(tmp_path / "p.txt"), "repeat": 2}}
    with pytest.raises(ConfigError, match="`repeat` of a is for the corpus"):
        load_prompts(prompts_config(sources=sources), byte_tokenizer(), UNUSED, 256)


def test_prompts_of_the_corpus_come_from_its_training_part(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "ciao"},
    ]
    rows: list[Any] = [{"text": f"{i} two  three\nfour five"} for i in range(30)]
    rows += [{"prompt": f"question {i}?", "completion": " yes"} for i in range(30)]
    rows += [{"messages": chat}]
    keys = {"max_length": 128, "validation_share": 0.3}
    data = DataConfig(path=write_jsonl(tmp_path / "d.jsonl", rows), **keys)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    config = prompts_config(from_corpus=True, opening_words=4)
    prompts = load_prompts(config, tokenizer, data, 256)
    texts = {p.text for p in prompts.training + prompts.held_out}
    rendered = "<user>hi\n<assistant>yo<|endoftext|>\n<user>bye\n<assistant>"
    corpus = load_corpus(data, tokenizer)
    decoded = [str(tokenizer.decode(row.token_ids)) for row in corpus.training]
    expected = {" ".join(t.split()[:4]) for t in decoded if "two" in t}
    expected |= {t.split("?")[0] + "?" for t in decoded if "question" in t}
    expected |= {rendered} if any("ciao" in t for t in decoded) else set()
    assert texts == expected
    assert 35 < len(texts) < 55


def test_prompt_files_are_lines_or_rows(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\none\n")
    tokenizer = byte_tokenizer()
    lines = read_prompts(str(tmp_path / "p.txt"), tokenizer).held_out
    assert [(p.text, p.group) for p in lines] == [("one", "file"), ("two", "file")]
    rows = [{"prompt": "one"}, {"prompt": "two", "group": "mine"}]
    read = read_prompts(write_jsonl(tmp_path / "p.jsonl", rows), tokenizer, group="given").held_out
    assert [(p.text, p.group) for p in read] == [("one", "given"), ("two", "mine")]
    assert [p.id for p in read] == [p.id for p in lines]
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "one"}, {"question": "two"}])
    with pytest.raises(DataError, match=r"row 2 of .*has no prompt: it needs `prompt`"):
        read_prompts(bad, tokenizer)
    with pytest.raises(DataError, match="there is no file"):
        read_prompts(str(tmp_path / "nowhere.txt"), tokenizer)


def test_columns_go_with_their_prompt(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    rows = [
        {"prompt": "one", "answer": 1, "meta": {"level": "easy"}},
        {"prompt": "two", "answer": 2, "meta": {"level": "hard"}},
        {"prompt": "one", "answer": 3, "meta": {"level": "hard"}},
    ]
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    found = read_prompts(file, tokenizer, columns=["answer", "meta.level"])
    assert [prompt.text for prompt in found.held_out] == ["one", "two"]
    assert dict(found.columns["one"]) == {"answer": 1, "meta.level": "easy"}
    assert dict(found.columns["two"]) == {"answer": 2, "meta.level": "hard"}
    with pytest.raises(
        DataError, match=r"row 1 of .*p\.jsonl has no `reply`, which `columns` asks"
    ):
        read_prompts(file, tokenizer, columns=["reply"])
