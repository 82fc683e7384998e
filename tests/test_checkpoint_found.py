"""Checkpoints as people have them: each loads with the right weights, or one line says why not."""

import json
import struct
import time
import zipfile

import pytest
import torch

from fgrlhf.checkpoint import load_adapted, load_model, load_tokenizer, save_model
from fgrlhf.data.fields import UserError
from fgrlhf.engine import lora
from fgrlhf.generate import Config, continue_batch, generate
from fgrlhf.layouts.safetensors import SafeTensors
from fgrlhf.layouts.stored import LONGEST, check_finite
from fgrlhf.reward import RewardModel, save_reward
from fgrlhf.tokenizer import train
from tests.test_checkpoint import same, variant, write_llama2c

V = 272                         # pieces of the tokenizer; the models here have V + 5 rows


@pytest.fixture
def tokenizer(tmp_path):
    return train(["hello world, hello there"] * 3, V, tmp_path / "some" / "tokenizer.model")


def refuse(call, *parts: str) -> None:
    """Checks that `call` raises a UserError of one line with each of `parts`, in 5 CPU seconds."""
    started = time.process_time()
    with pytest.raises(UserError) as error:
        call()
    assert time.process_time() - started < 5
    message = str(error.value)
    assert all(part in message for part in parts) and "\n" not in message, message
    assert len(message) < 700


def change_json(path, change: dict) -> None:
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


# ----- rows beyond the tokenizer ------------------------------------------------------------------

@pytest.mark.parametrize("layout", ["meta", "hf"])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_beyond_the_tokenizer_are_never_scored_and_are_saved_again(
        layout, tied, tmp_path, tokenizer, capsys):
    full = variant(vocab_size=V + 5, tie_embeddings=tied)
    save_model(full, tmp_path / "m", layout, tokenizer)
    model = load_model(tmp_path / "m")
    assert "5 rows of the embedding lie beyond the 272 pieces" in capsys.readouterr().err
    assert model.config.vocab_size == V == len(model.head)
    ids = torch.tensor([[1, 7, 271, 4]])
    torch.testing.assert_close(model(ids), full(ids)[..., :V])
    for other in ("meta", "hf"):
        save_model(model, tmp_path / other, other)              # without tokenizer: every row
        assert same(load_model(tmp_path / other), full)


def test_a_row_beyond_the_tokenizer_is_not_sampled(tmp_path, tokenizer):
    """The last row has by far the largest logit of every token."""
    model = variant(vocab_size=V + 5)
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.weight[0] = 1
        model.output.weight[:, 0] = 0
        model.output.weight[-2], model.output.weight[-1] = 9, -9
    save_model(model, tmp_path / "m", tokenizer=tokenizer)
    assert {int(i) for i in model(torch.tensor([[1, 5, 9]])).argmax(-1).flatten()} <= {V + 3, V + 4}
    loaded = load_model(tmp_path / "m")
    for temperature in (0, 1.0, 100.0):
        steps = continue_batch(loaded, [[1]] * 4, (), 40, temperature)
        assert max(id for step in steps for id in step) < V


def test_rows_beyond_the_tokenizer_stay_with_adapters_and_reward_models(tmp_path, tokenizer):
    full = variant(vocab_size=V + 5)
    save_model(full, tmp_path / "m", tokenizer=tokenizer)
    save_model(load_adapted(tmp_path / "m", rank=2), tmp_path / "a", tokenizer=tokenizer)
    assert lora.is_folder(tmp_path / "a")
    save_model(load_model(tmp_path / "a"), tmp_path / "merged")
    assert same(load_model(tmp_path / "merged"), full)          # new adapters change nothing
    save_reward(RewardModel(load_model(tmp_path / "m"), "token"), tmp_path / "r", tokenizer)
    assert load_model(tmp_path / "r", reward=True).added_rows["output.weight"].shape == (5, 32)


def test_a_description_on_meta_says_nothing(tmp_path, tokenizer, capsys):
    save_model(variant(vocab_size=V + 5), tmp_path / "m", tokenizer=tokenizer)
    assert load_model(tmp_path / "m", device="meta").config.vocab_size == V
    assert capsys.readouterr().err == ""


# ----- tokenizers ---------------------------------------------------------------------------------

def test_the_tokenizer_may_be_one_folder_up(tmp_path, tokenizer):
    save_model(variant(), tmp_path / "llama" / "7B")
    (tmp_path / "llama" / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    assert load_tokenizer(tmp_path / "llama" / "7B").sha256 == tokenizer.sha256
    other = tmp_path / "llama" / "7B" / "tokenizer.model"
    train(["abc"] * 3, 263, other)                              # its own comes first
    assert load_tokenizer(tmp_path / "llama" / "7B").vocab_size == 263


@pytest.mark.parametrize("name", ["tokenizer.bin", "tok512.bin"])
def test_a_tokenizer_in_another_format_is_named(name, tmp_path):
    write_llama2c(tmp_path / "stories.bin", variant(norm_eps=1e-5, rope_theta=10000.0))
    (tmp_path / name).write_bytes(b"{}")
    assert load_model(tmp_path).config.vocab_size == V          # not taken for a second model
    refuse(lambda: load_tokenizer(tmp_path), "tokenizer.model: expected a sentencepiece model",
           f"got only {name}")


@pytest.mark.parametrize("stored, adds", [({}, True), ({"add_bos_token": True}, True),
                                          ({"add_bos_token": None}, True),
                                          ({"add_bos_token": False}, False)])
def test_add_bos_token_is_honoured_and_saved_again(stored, adds, tmp_path, tokenizer):
    save_model(variant(), tmp_path / "m", "meta", tokenizer)
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(stored))
    found = load_tokenizer(tmp_path / "m")
    ids = tokenizer.encode("hello")
    assert found.encode("hello", bos=True, eos=True) == [1] * adds + ids + [2]
    assert (found.sha256 == tokenizer.sha256) is adds
    for layout in ("meta", "hf"):
        save_model(variant(), tmp_path / layout, layout, found)
        assert load_tokenizer(tmp_path / layout).adds_bos is adds


def test_a_bad_add_bos_token_and_a_prompt_without_tokens_are_refused(tmp_path, tokenizer):
    save_model(variant(), tmp_path, tokenizer=tokenizer)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"add_bos_token": "no"}')
    refuse(lambda: load_tokenizer(tmp_path), "add_bos_token: expected true or false, got")
    settings.write_text('{"add_bos_token": false}')
    refuse(lambda: generate(Config(model=str(tmp_path))), "--prompt: expected a text")


@pytest.mark.parametrize("rank", [-1, 0, 10**9, 2.0])
def test_a_rank_that_no_adapter_has_is_refused(rank, tmp_path, tokenizer):
    save_model(variant(), tmp_path / "m", tokenizer=tokenizer)
    save_model(load_adapted(tmp_path / "m", rank=2), tmp_path / "a", tokenizer=tokenizer)
    change_json(tmp_path / "a" / "adapters.json", {"rank": rank})
    refuse(lambda: load_model(tmp_path / "a"), "rank", "expected")


# ----- files that are something else --------------------------------------------------------------

KINDS = [(b"", "an empty file"),
         (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 13476939516\n",
          "a Git LFS pointer, which only names the file; run `git lfs pull` in its folder"),
         (b"<!DOCTYPE html><html>404</html>", "a web page"), (b"\n <html lang=en>", "a web page"),
         (b"GGUF\x03\0\0\0", "a GGUF file of llama.cpp; name the file itself")]


@pytest.mark.parametrize("content, kind", KINDS)
@pytest.mark.parametrize("layout, name", [
    ("meta", "consolidated.00.pth"), ("hf", "model.safetensors"), ("meta", "tokenizer.model"),
    ("hf", "config.json"), ("meta", "params.json")])
def test_a_file_that_is_something_else_is_named(content, kind, layout, name, tmp_path, tokenizer):
    save_model(variant(), tmp_path / "m", layout, tokenizer)
    (tmp_path / "m" / name).write_bytes(content)
    refuse(lambda: load_model(tmp_path / "m"), f"{name}: expected ", f"got {kind}")


def test_a_tiktoken_vocabulary_without_some_bytes_is_refused(tmp_path, tokenizer):
    save_model(variant(), tmp_path, tokenizer=tokenizer)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    for load in (load_model, load_tokenizer):
        refuse(lambda: load(tmp_path), "tokenizer.model: expected a token for each of the 256")


# ----- settings -----------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    {"vocab_size": "absent"}, {"vocab_size": -1}, {"max_batch_size": 32},
    {"model_parallel_size": 2, "flash_attn": True, "dropout": 0.1},
    {"use_scaled_rope": False, "quantization_args": None, "lora_args": {}}])
def test_keys_of_params_json_that_change_nothing(change, tmp_path):
    save_model(variant(), tmp_path)
    change_json(tmp_path / "params.json", change)
    assert same(load_model(tmp_path), variant())


@pytest.mark.parametrize("change", [
    {"architectures": ["LLaMAForCausalLM"]}, {"architectures": None}, {"rope_scaling": {}},
    {"rope_scaling": {"rope_type": "default"}}, {"rope_scaling": {"type": "default"}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"head_dim": None},
    {"attention_bias": None}, {"partial_rotary_factor": None}])
def test_keys_of_config_json_that_change_nothing(change, tmp_path):
    save_model(variant(), tmp_path, "hf")
    change_json(tmp_path / "config.json", change)
    assert same(load_model(tmp_path), variant())


HUGE = [10**7, 10**400, 1e400, -1, 0, float("nan"), 1e308, "x" * 10**5, [[]] * 999, True, {}]


@pytest.mark.parametrize("value", HUGE, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("layout, name", [
    ("meta", "n_layers"), ("meta", "dim"), ("meta", "n_heads"), ("meta", "multiple_of"),
    ("meta", "ffn_dim_multiplier"), ("meta", "norm_eps"), ("hf", "num_hidden_layers"),
    ("hf", "hidden_size"), ("hf", "intermediate_size"), ("hf", "vocab_size"),
    ("hf", "rms_norm_eps"), ("hf", "num_key_value_heads")])
def test_sizes_that_no_model_has_are_refused_before_memory_is_taken(value, layout, name, tmp_path):
    save_model(variant(), tmp_path, layout)
    file = "params.json" if layout == "meta" else "config.json"
    change_json(tmp_path / file, {name: value})
    if (name, value) in (("ffn_dim_multiplier", 0), ("multiple_of", 10**7),
                         ("intermediate_size", 10**7), ("vocab_size", 10**7)):
        refuse(lambda: load_model(tmp_path), str(tmp_path))     # a size, but not of these weights
    else:
        refuse(lambda: load_model(tmp_path), file)


@pytest.mark.parametrize("sizes", [(2**31 - 1,) * 7, (32, 48, 10**7, 4, 4, 272, 64),
                                   (32, 48, 2, 0, 0, 272, 64), (-1,) * 7])
def test_sizes_of_a_llama2c_file(sizes, tmp_path):
    (tmp_path / "x.bin").write_bytes(struct.pack("<7i", *sizes) + bytes(99))
    refuse(lambda: load_model(tmp_path / "x.bin"), "x.bin: read as llama2.c's: ")


@pytest.mark.parametrize("layout, name", [("meta", "params.json"), ("hf", "config.json")])
def test_a_key_that_occurs_twice_is_refused(layout, name, tmp_path):
    save_model(variant(), tmp_path, layout)
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text.replace("{", '{"vocab_size": 9, ', 1))
    refuse(lambda: load_model(tmp_path), f"{name}: ", "vocab_size")


def test_a_header_beyond_the_limit_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 2**33))
        file.truncate(2**34)                                    # sparse: no disk is used
    refuse(lambda: SafeTensors(path), f"expected a header of at most {LONGEST} bytes")


# ----- torch files --------------------------------------------------------------------------------

def test_the_format_before_torch_1_6_is_read(tmp_path):
    model = variant(tie_embeddings=True)
    for layout, file in (("meta", "consolidated.00.pth"), ("hf", "pytorch_model.bin")):
        folder = tmp_path / layout
        save_model(model, folder, layout)
        tensors = {n: p.detach() for n, p in model.named_parameters()}
        if layout == "hf":
            tensors = dict(SafeTensors(folder / "model.safetensors"))
            (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / file, _use_new_zipfile_serialization=False)
        assert same(load_model(folder), model)


def test_compressed_members_are_refused(tmp_path):
    save_model(variant(), tmp_path)
    path = tmp_path / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    refuse(lambda: load_model(tmp_path), "consolidated.00.pth: member ", "got compressed ones")


class Bytes:
    """Pickles as a call of bytearray, which weights_only=True allows and which takes 10 GB."""

    def __reduce__(self):
        return bytearray, (10**10,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("make", [
    lambda: torch.zeros(1).expand(32), lambda: torch.zeros(1).expand(10**6, 10**6), Bytes,
    lambda: torch.eye(32).to_sparse(), lambda: torch.eye(32).to_sparse_csr(),
    lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    lambda: torch.quantize_per_tensor(torch.zeros(4), 1.0, 0, torch.qint8)],
    ids=["expanded", "expanded-wide", "bytes", "sparse", "csr", "nested", "quantised"])
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_dense_are_refused(make, zipped, tmp_path):
    save_model(variant(), tmp_path)
    tensors = {name: p.detach() for name, p in variant().named_parameters()}
    torch.save(tensors | {"norm.weight": make()}, tmp_path / "consolidated.00.pth",
               _use_new_zipfile_serialization=zipped)
    refuse(lambda: load_model(tmp_path), "consolidated.00.pth: ")


# ----- numbers that are not finite ----------------------------------------------------------------

@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", ["meta", "hf", "llama2c", "adapters"])
def test_a_tensor_that_is_not_finite_is_named(value, layout, tmp_path, tokenizer):
    model = variant(norm_eps=1e-5, rope_theta=10000.0)
    name = "layers.1.feed_forward.w2.weight"
    if layout == "adapters":
        save_model(model, tmp_path / "base", tokenizer=tokenizer)
        model, name = load_adapted(tmp_path / "base", rank=2), "layers.1.feed_forward.w2.lora_b"
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] = value
    if layout == "llama2c":
        write_llama2c(tmp_path / "m.bin", model)
        path = tmp_path / "m.bin"
    else:
        path = tmp_path / "m"
        save_model(model, path, "hf" if layout == "hf" else "meta", tokenizer)
    shown = "model.layers.1.mlp.down_proj.weight" if layout == "hf" else name
    refuse(lambda: load_model(path), f"tensor {shown}: expected finite numbers, got 1 of ")


def test_a_dtype_that_cannot_hold_the_weights_is_refused(tmp_path):
    model = variant()
    with torch.no_grad():
        model.norm.weight[3] = 1e6
    save_model(model, tmp_path)
    assert same(load_model(tmp_path), model)
    refuse(lambda: load_model(tmp_path, dtype=torch.float16),
           "tensor norm.weight: expected finite numbers, got 1 of 32", "in torch.float16")


def test_finite_numbers_whose_sum_overflows_are_accepted():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        largest = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
        check_finite(largest, "x")
        check_finite(torch.cat([largest, -largest]), "x")
        bad = torch.cat([largest, torch.tensor([float("inf"), float("-inf")], dtype=dtype)])
        refuse(lambda: check_finite(bad, "x"), "got 2 of 66")
