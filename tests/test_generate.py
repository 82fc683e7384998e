"""Generation: llama2.c's golden text, batches against single texts, ends of texts, the command."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fgrlhf.checkpoint import load_model, load_tokenizer, save_model
from fgrlhf.data.fields import UserError
from fgrlhf.engine.config import parse, run
from fgrlhf.engine.encoding import Encoding, write_encoding
from fgrlhf.generate import Config, continue_batch, generate, next_token
from fgrlhf.model import LLaMAConfig, build
from fgrlhf.tokenizer import train

ROOT = Path(__file__).resolve().parent.parent
SMALL = LLaMAConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=272, ffn_dim=48,
                    max_seq_len=32, tie_embeddings=True)


def added(model, prompts, stop_ids=(), count=10, **options) -> list[list[int]]:
    steps = list(continue_batch(model, prompts, stop_ids, count, **options))
    return [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build(SMALL)
    for p in model.parameters():                        # far from ties, far from one repeated token
        p.data.mul_(5 if p.dim() == 2 else 1)
    return model.double()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = train(["hello world, hello there"] * 3, 272, path / "t.model")
    save_model(copy.deepcopy(model).float(), path / "m", tokenizer=tokenizer)
    return path / "m"


@pytest.mark.parametrize("name", ["", "stories260K.bin"])
def test_generate_prints_llama2cs_golden_text(name, data_dir):
    folder = data_dir / "stories260K"
    done = subprocess.run(
        [sys.executable, "-m", "fgrlhf.generate", "--model", str(folder / name),
         "--max-new-tokens", "200", "--temperature", "0"],
        cwd=ROOT, capture_output=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.stdout == (folder / "greedy_200.txt").read_bytes()


def test_continue_batch_equals_the_slow_loop(model):
    prompt, expected = [5, 9, 200], []
    for _ in range(10):
        logits = model(torch.tensor([prompt + expected]))[0, -1]
        expected.append(int(logits.argmax()))
    assert added(model, [prompt], temperature=0.0) == [expected]


def test_continue_batch_gives_each_prompt_what_it_gets_by_itself(model):
    prompts = [[5], [9, 200, 3, 77, 5, 6], [9, 8], [1, 2, 3]]
    alone = [added(model, [prompt], temperature=0.0)[0] for prompt in prompts]
    assert added(model, prompts, temperature=0.0) == alone
    stop = alone[1][4]
    alone = [row[:row.index(stop)] if stop in row else row for row in alone]
    assert added(model, prompts, (stop,), temperature=0.0) == alone
    assert len(alone[1]) <= 4


def test_continue_batch_ends_at_the_contexts_end(model):
    rows = added(model, [[7] * 30, [7] * 3, [7] * 32], count=100, temperature=0.0)
    assert [len(row) for row in rows] == [2, 29, 0]             # the context is 32
    assert rows[1] == added(model, [[7] * 3], count=100, temperature=0.0)[0]


def test_continue_batch_repeats_with_a_seed(model):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return added(model, [[3], [4]], temperature=1.5, generator=generator)
    assert draw(1) == draw(1) != draw(2)


def test_next_token_samples_the_softmax_at_the_temperature():
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    uniform = (torch.arange(20000) + 0.5) / 20000                       # evenly spaced
    tokens = next_token(logits.expand(20000, 4), 0.7, 1.0, uniform.double())
    expected = torch.softmax(logits.double() / 0.7, 0)
    assert (torch.bincount(tokens, minlength=4) / 20000 - expected).abs().max() < 1e-4


@pytest.mark.parametrize("top_p, kept", [(0.01, {2}), (0.49, {2}), (0.51, {2, 0}), (0.79, {2, 0}),
                                         (0.81, {2, 0, 3}), (0.97, {0, 1, 2, 3}),
                                         (1.0, {0, 1, 2, 3})])
def test_next_token_keeps_the_fewest_tokens_that_sum_to_top_p(top_p, kept):
    logits = torch.tensor([0.3, 0.05, 0.5, 0.15]).log()
    uniform = (torch.arange(1000) + 0.5).double() / 1000
    assert set(next_token(logits.expand(1000, 4), 1.0, top_p, uniform).tolist()) == kept


def test_next_token_takes_the_argmax_at_temperature_0():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert next_token(logits, 0.0, 0.5, torch.tensor([0.99])).tolist() == [1]


def printed(capsysbinary, *flags: str) -> bytes:
    generate(parse(Config, argv=list(flags)))
    return capsysbinary.readouterr().out


def test_generate_prints_only_prompt_and_continuation(folder, capsysbinary):
    text = "hello 😀\n  there▁"
    flags = ("--model", str(folder), "--prompt", text, "--seed", "3", "--top-p", "0.9")
    first = printed(capsysbinary, *flags, "--max-new-tokens", "5")
    assert first.startswith(text.encode()) and first.endswith(b"\n")
    assert first == printed(capsysbinary, *flags, "--max-new-tokens", "5")
    assert printed(capsysbinary, *flags, "--max-new-tokens", "0") == text.encode() + b"\n"


def test_generate_continues_each_line_of_a_file(folder, tmp_path, capsysbinary):
    (tmp_path / "prompts.txt").write_bytes("hello\r\n\nthere 😀\nwor".encode())
    flags = ("--model", str(folder), "--temperature", "0", "--max-new-tokens", "4")
    alone = [printed(capsysbinary, *flags, "--prompt", p) for p in ("hello", "there 😀", "wor")]
    for batch in ("1", "2", "3"):
        assert printed(capsysbinary, *flags, "--prompts-file", str(tmp_path / "prompts.txt"),
                       "--batch", batch) == b"".join(alone)


def test_generate_says_how_many_texts_are_cut(folder, model, tmp_path, capsysbinary, monkeypatch):
    """The context is 32; a text that ends by itself is not cut."""
    tokenizer = load_tokenizer(folder)
    (tmp_path / "prompts.txt").write_text("hello\nthere")
    flags = ("--model", str(folder), "--temperature", "0", "--prompts-file",
             str(tmp_path / "prompts.txt"), "--max-new-tokens")
    ends = lambda count: (generate(parse(Config, argv=[*flags, count])),
                          capsysbinary.readouterr().err.decode().split(" s", 1)[1])[1]
    for count in ("4", "100"):
        assert ends(count) == ", 2 cut at --max-new-tokens or at the end of the context\n"
    prompts = [tokenizer.encode(text, bos=True) for text in ("hello", "there")]
    one, other = added(load_model(folder), prompts, count=9, temperature=0.0)
    tokenizer.eos_id = next(id for id in one if id not in other)
    monkeypatch.setattr("fgrlhf.generate.load_tokenizer", lambda path: tokenizer)
    assert ends("9") == ", 1 cut at --max-new-tokens or at the end of the context\n"
    (tmp_path / "prompts.txt").write_text("hello")
    assert ends("9") == "\n"


def test_generate_takes_a_dtype_and_by_default_that_of_the_checkpoint(model, folder, tmp_path,
                                                                      capsysbinary):
    flags = ("--temperature", "0", "--max-new-tokens", "9", "--prompt", "hello")
    save_model(copy.deepcopy(model).bfloat16(), tmp_path / "half", tokenizer=load_tokenizer(folder))
    half = printed(capsysbinary, "--model", str(tmp_path / "half"), *flags)
    assert half == printed(capsysbinary, "--model", str(folder), "--dtype", "bfloat16", *flags)
    assert len(half) > len("hello\n")


# ----- templates ----------------------------------------------------------------------------------

def test_generate_with_a_template_prints_the_answer_only(folder, tmp_path, capsysbinary):
    flags = ("--model", str(folder), "--temperature", "0", "--max-new-tokens", "6")
    whole = printed(capsysbinary, *flags, "--prompt", "hello ->")
    answer = printed(capsysbinary, *flags, "--prompt", "hello", "--template", "plain")
    assert len(answer) > 1 and whole.removeprefix(b"hello ->").strip() == answer.strip()
    (tmp_path / "mine.txt").write_text("{prompt} ->\n")
    (tmp_path / "prompts.txt").write_text("hello\nthere")
    lines = printed(capsysbinary, *flags, "--prompts-file", str(tmp_path / "prompts.txt"),
                    "--template", str(tmp_path / "mine.txt"))
    assert lines == answer + printed(capsysbinary, *flags, "--prompt", "there", "--template",
                                     "plain")


def test_generate_stops_at_the_templates_end_of_a_turn(folder, tmp_path, capsysbinary, monkeypatch):
    tokenizer = load_tokenizer(folder)
    ids = added(load_model(folder), [tokenizer.encode("hello ->", bos=True)], count=9,
                temperature=0.0)[0]
    end = next(k for k in range(1, 9) if ids[k] not in ids[:k])
    tokenizer.control = {"<|im_end|>": ids[end]}
    monkeypatch.setattr("fgrlhf.generate.load_tokenizer", lambda path: tokenizer)
    (tmp_path / "mine.txt").write_text("{prompt} ->{response}<|im_end|>")
    flags = ("--model", str(folder), "--temperature", "0", "--max-new-tokens", "9")
    out = printed(capsysbinary, *flags, "--prompt", "hello", "--template",
                  str(tmp_path / "mine.txt"))
    assert out == "".join([*tokenizer.stream(ids[:end]), "\n"]).encode()


def test_generate_says_which_template_fits_and_auto_takes_it(folder, tmp_path, capsysbinary,
                                                             monkeypatch):
    def output(*flags):
        generate(parse(Config, argv=["--model", str(tmp_path / "m"), "--temperature", "0",
                                     "--max-new-tokens", "5", "--prompt", "hello", *flags]))
        out, err = capsysbinary.readouterr()
        return out, err.decode().splitlines()[:-1]                  # the last line is the time
    shutil.copytree(folder, tmp_path / "m")
    raw, answer = output()[0], output("--template", "plain")[0]
    with pytest.raises(UserError, match="--template auto: expected a model with a known template"):
        output("--template", "auto")
    write_encoding(tmp_path / "m", Encoding("plain"))
    assert output("--template", "auto") == (answer, [])
    assert output() == (raw, ["this model was trained with --template plain; the prompt is "
                              "continued as it is"])
    other = ["this model was trained with --template plain, got another; --template auto takes "
             "that of the training"]
    assert output("--template", "plain") == (answer, [])
    assert output("--template", "llama-2")[1] == other
    (tmp_path / "m/encoding.json").unlink()
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{{ 1/0 }}[INST] {{ x }} [/INST]"
    monkeypatch.setattr("fgrlhf.generate.load_tokenizer", lambda path: tokenizer)
    line = "this model has a chat template: --template llama-2 fits it"
    assert output() == (raw, [line])
    assert output("--template", "auto") == (output("--template", "llama-2")[0], [line])
    assert output("--template", "plain") == (answer, [])


@pytest.mark.parametrize("flags, message", [
    (("--prompt", "hello", "--template", "chat"), "expected one of alpaca"),
    (("--prompt", "hello", "--template", "chatml"), "without <|im_start|>, <|im_end|>"),
    (("--temperature", "-1"), "--temperature: expected a number of at least 0"),
    (("--temperature", "nan"), "--temperature: expected a number"),
    (("--temperature", "inf"), "--temperature: expected a number"),
    (("--top-p", "0"), "--top-p 0.0: expected a number above 0 and at most 1"),
    (("--max-new-tokens", "-1"), "--max-new-tokens: expected a number of at least 0"),
    (("--batch", "0"), "--batch: expected a number of at least 1"),
    (("--prompt", "hello " * 40), "expected at most 32 tokens, the model's context, got"),
    (("--prompts-file", "nowhere.txt"), "nowhere.txt"),
])
def test_generate_refuses_in_one_line(flags, message, folder, capsysbinary):
    with pytest.raises(SystemExit) as stopped:
        run(lambda: generate(parse(Config, argv=["--model", str(folder), *flags])))
    out, err = capsysbinary.readouterr()
    assert stopped.value.code == 2 and out == b""
    assert message in err.decode() and err.count(b"\n") == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_next_token_stops_at_logits_that_are_not_finite(value, temperature):
    """A float16 checkpoint can overflow although each of its weights is finite."""
    logits = torch.tensor([[0.0, 1.0], [value, 0.0]], dtype=torch.float16)
    with pytest.raises(FloatingPointError, match="got others in torch.float16 at temperature"):
        next_token(logits, temperature, 1.0, torch.zeros(2, dtype=torch.float64))


def test_next_token_stops_at_a_temperature_that_overflows():
    with pytest.raises(FloatingPointError, match="at temperature 1e-40; try"):
        next_token(torch.tensor([[0.0, 1.0]]), 1e-40, 1.0, torch.zeros(1, dtype=torch.float64))


def test_stories260k_continues_alike_from_our_own_folders(data_dir, tmp_path):
    model = load_model(data_dir / "stories260K")
    expected = added(model, [[1]], count=64, temperature=0.0)
    for layout in ("meta", "hf"):
        save_model(model, tmp_path / layout, layout)
        assert added(load_model(tmp_path / layout), [[1]], count=64, temperature=0.0) == expected
