"""Old and crooked files: the model answers as if they were straight, or one line says what is wrong with which."""

import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import make_config, random_model, save

import specchat as public

DEMO = Path(public.__file__).parent / "demo" / "draft"
PLAN = ("--device", "cpu", "--vram", "1GiB", "--ctx", "256", "--draft", "none", "--dtype", "fp32")
ASKED = ("Tell me a story about a fox.", *PLAN, "--max-tokens", "12", "--temperature", "0", "--no-save", "-q")
LOUD = ASKED[:-1]
EXCEPTIONS = {name for home in (builtins, torch) for name in dir(home) if name.endswith("Error")} | {"StopIteration"}
BOM = b"\xef\xbb\xbf"
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\nTEXT<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = CHAT.replace("TEXT", "{{ m.content }}")
IN_PARTS = CHAT.replace("TEXT", "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}")


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def answer(specchat, folder):
    """Return the answer of the straight model; asked once, because nothing changes it."""
    if not _ANSWER:
        result = specchat("run", str(DEMO), *ASKED)
        assert result.code == 0 and result.out.strip() and not result.err
        _ANSWER.append(result.out)
    return _ANSWER[0]


_ANSWER = []


def change(file, *, without=(), **values):
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({k: v for k, v in before.items() if k not in without} | values))


def answered(result, text, *words):
    """Check for the straight model's answer, with the words on stderr or with nothing."""
    assert (result.code, result.out) == (0, text), result.err
    err = " ".join(result.err.split())
    assert all(word in err for word in words), err
    assert words or not err, err


def refused(result, code, *words):
    err = " ".join(result.err.split())
    assert result.code == code, err
    assert result.out == "" and err.startswith("error: ")
    assert all(word in err for word in words), err
    for name in ("internal error", "Traceback", *EXCEPTIONS):
        assert name not in err, err


# --- config.json -------------------------------------------------------------------------------------------------

HARMLESS = {
    "dtype auto": {"torch_dtype": "auto"},
    "dtype of torch": {"torch_dtype": "torch.float32"},
    "new dtype": {"torch_dtype": None, "dtype": "torch.bfloat16"},
    "both dtypes": {"dtype": "float32"},
    "pad outside": {"pad_token_id": 4096},
    "pad below": {"pad_token_id": -4097},
    "pad -1": {"pad_token_id": -1},
    "null rope": {"rope_theta": 10000, "rope_scaling": None, "rope_parameters": None},
    "nulls": dict.fromkeys(["head_dim", "bos_token_id", "pad_token_id", "sliding_window", "quantization_config"]),
    "labels": {"num_labels": 10**12, "id2label": {"x": 1}},
    "several stops": {"eos_token_id": [3, 2]},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_values_change_nothing(specchat, folder, answer, name):
    change(folder / "config.json", **HARMLESS[name])
    answered(specchat("run", str(folder), *ASKED), answer)


REFUSED = {
    "dtype": ({"torch_dtype": "float99"}, 3, 'torch_dtype is "float99", which is not a dtype of torch'),
    "dtype of another type": ({"dtype": 16}, 3, "dtype is 16"),
    "rope": (
        {"rope_scaling": {"type": "spiral", "factor": 2.0}},
        2,
        'has rotary positions of the type "spiral", which transformers does not know',
    ),
    "rope theta": ({"rope_theta": None}, 2, "has rotary positions with rope_theta null, which is not a number"),
    "activation": ({"hidden_act": "sinlu"}, 2, 'has the hidden_act "sinlu", which transformers does not know'),
    "null size": ({"hidden_size": None}, 3, "hidden_size is null, which transformers does not accept"),
    "text size": ({"vocab_size": "4096"}, 3, 'vocab_size is "4096", which transformers does not accept'),
    "layers": ({"num_hidden_layers": 10**9}, 3, "num_hidden_layers is 1000000000, but must be at most 16,384"),
    "no layers": ({"num_hidden_layers": -1}, 3, "num_hidden_layers is -1, but must be at least 1"),
    "no tokens": ({"vocab_size": 0}, 3, "vocab_size is 0, but must be at least 1"),
    "type": ({"model_type": None}, 3, "names no model_type"),
    "unknown type": ({"model_type": "lama"}, 2, "model type 'lama' is not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_values_are_named(specchat, folder, name):
    values, code, words = REFUSED[name]
    change(folder / "config.json", **values)
    refused(specchat("run", str(folder), *ASKED), code, words)
    refused(specchat("run", str(folder), *PLAN, "--plan"), code, words)


def test_values_that_only_fail_in_passes_are_named(specchat, tmp_path):
    """The check's tiny model has one group of experts, so it cannot see that there is none."""
    source = save(random_model(make_config("deepseek_v3")), tmp_path / "model")
    change(source.path / "config.json", n_group=-1)
    result = specchat("run", str(source.path), "w5 w6", "--base", *ASKED[1:])
    refused(result, 2, f"{source.path} has a config.json with which its modules cannot compute")


@pytest.mark.parametrize("levels", [90, 100_000])
def test_deep_nesting_is_named(specchat, folder, levels):
    (folder / "config.json").write_text('{"model_type": "llama", "rope_scaling": ' + "[" * levels + "]" * levels + "}")
    refused(specchat("run", str(folder), *ASKED), 3, "config.json is nested too deeply")


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_old_rope_settings_mean_the_same(specchat, folder, answer, key):
    """A factor of 8 changes the text; the old key must not lose it."""
    change(folder / "config.json", rope_scaling={key: "linear", "factor": 8.0})
    result = specchat("run", str(folder), *ASKED)
    assert result.code == 0 and result.out != answer
    _SCALED.append(result.out)
    assert len(set(_SCALED)) == 1


_SCALED = []


# --- generation_config.json --------------------------------------------------------------------------------------

IGNORED = {
    "text": {"temperature": "0.7"},
    "negative": {"temperature": -1},
    "minus one": {"top_k": -1},
    "too large": {"top_p": 1.5},
    "zero": {"top_p": 0},
    "fraction": {"top_k": 0.5},
    "list": {"min_p": [0.1]},
    "boolean": {"repetition_penalty": True},
    "huge": {"repetition_penalty": 10**400},
    "infinite": {"temperature": float("inf")},
    "number": {"do_sample": 1},
    "stop": {"eos_token_id": "3"},
    "negative stop": {"eos_token_id": -1},
}


@pytest.mark.parametrize("name", IGNORED)
def test_impossible_defaults_are_ignored_with_a_warning(specchat, folder, answer, name):
    change(folder / "generation_config.json", **IGNORED[name])
    ((key, value),) = IGNORED[name].items()
    shown = json.dumps(value)[:60]
    answered(specchat("run", str(folder), *LOUD), answer, f"generation_config.json: {key} is {shown}", "ignored")


@pytest.mark.parametrize("text", ["[]", "3", "{", "", '{"a": 1, "a": 2}', "[" * 5000])
def test_defaults_that_are_no_object_are_ignored_with_a_warning(specchat, folder, answer, text):
    (folder / "generation_config.json").write_text(text)
    answered(specchat("run", str(folder), *LOUD), answer, "generation_config.json is n", "ignored")


def test_whole_numbers_and_nulls_are_fine(specchat, folder, answer):
    values = {"temperature": 1, "top_k": 50.0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "eos_token_id": None}
    change(folder / "generation_config.json", **values)
    answered(specchat("run", str(folder), *ASKED), answer)
    change(folder / "generation_config.json", **dict.fromkeys((*values, "do_sample")))
    answered(specchat("run", str(folder), *ASKED), answer)


# --- templates ---------------------------------------------------------------------------------------------------


def set_template(folder, template):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    change(folder / "tokenizer_config.json", chat_template=template)


SAME = {
    "text": PLAIN,
    "list": [{"name": "default", "template": PLAIN}, {"name": "rag", "template": "{{ 1 / 0 }}"}],
    "parts": IN_PARTS,
}


@pytest.mark.parametrize("name", SAME)
def test_templates_that_render_the_same(specchat, folder, answer, name):
    set_template(folder, SAME[name])
    answered(specchat("run", str(folder), *ASKED), answer)


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
@pytest.mark.parametrize("begin", [b"", BOM], ids=["", "BOM"])
def test_templates_in_files_of_their_own(specchat, folder, answer, name, begin):
    set_template(folder, None)
    content = PLAIN if name.endswith("jinja") else json.dumps({"chat_template": PLAIN})
    (folder / name).write_bytes(begin + content.encode())
    answered(specchat("run", str(folder), *ASKED), answer)


FAILING = {
    "no default": ([{"name": "rag", "template": PLAIN}, {"name": "tool_use", "template": PLAIN}], "(rag, tool_use)"),
    "division": ("{{ 1 / 0 }}", "the model's chat template fails on this chat: division by zero"),
    "type": ("{{ messages + 1 }}", "the model's chat template fails on this chat:"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without end"),
    "syntax": ("{% for %}", "the model's chat template rejects this chat:"),
    "raise": ("{{ raise_exception('no system prompts') }}", "rejects this chat: no system prompts"),
    "undefined": ("{{ messages[7].content }}", "rejects this chat:"),
    "nothing": ("{# nothing #}", "the model's chat template renders nothing for this chat"),
    "surrogates": ("\ud800", "text that is not UTF-8"),
    "loop": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "it takes more than"),
    "length": ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "it renders more than 4,194,"),
    "source": ("{# " + "x" * 1_000_000 + " #}", "longer than 1,000,000 characters"),
}


@pytest.mark.parametrize("name", FAILING)
def test_templates_that_fail(specchat, folder, name, monkeypatch):
    monkeypatch.setattr("specchat.models.hf.chat_template._RENDER_S", 0.5)
    template, words = FAILING[name]
    set_template(folder, template)
    code = 3 if name == "source" else 2
    refused(specchat("run", str(folder), *ASKED), code, words)
    assert specchat("run", str(folder), *ASKED, "--base").code == (3 if name == "source" else 0)


@pytest.mark.parametrize("template", [3, [], [PLAIN], [{"name": ["x"], "template": PLAIN}], [{"name": "default"}]])
def test_templates_that_are_none(specchat, folder, template):
    set_template(folder, template)
    refused(specchat("run", str(folder), *ASKED), 3, "tokenizer_config.json: chat_template is")


# --- tokenizers --------------------------------------------------------------------------------------------------


def change_tokenizer(folder, changing):
    values = json.loads((folder / "tokenizer.json").read_text())
    changing(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))


NEWER = {
    "field": lambda values: values.update(future={"a": 1}),
    "version": lambda values: values.update(version="2.0"),
    "component": lambda values: values["pre_tokenizer"].update(type="Quantum"),
    "model": lambda values: values["model"].update(type="SuperBPE"),
    "part": lambda values: values.pop("model"),
}


@pytest.mark.parametrize("name", NEWER)
def test_a_newer_tokenizer_is_named(specchat, folder, name):
    change_tokenizer(folder, NEWER[name])
    result = specchat("run", str(folder), *ASKED)
    refused(result, 2, "tokenizer.json is not a tokenizer that tokenizers", "reads: ")
    assert specchat("run", str(folder), *ASKED, "--plan").err == result.err
    assert name != "field" or "it has 'future'" in result.err


FAILING_TOKENIZERS = {
    "no unknown token": lambda values: values.update(
        model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<none>"}, pre_tokenizer=None
    ),
    "panic": lambda values: values.update(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(o*)*(x*)*(o+)+$"},
            "behavior": "Isolated",
            "invert": False,
        }
    ),
}


@pytest.mark.parametrize("name", FAILING_TOKENIZERS)
def test_tokenizers_that_fail_on_a_text(specchat, folder, name):
    change_tokenizer(folder, FAILING_TOKENIZERS[name])
    result = specchat("run", str(folder), "o" * 60 + "c", *ASKED[1:])
    result.err = result.err[result.err.index("error: ") :]  # Rust says on its own that it panicked
    refused(result, 3, "the model's tokenizer fails on this text: ")


def test_a_tokenizer_that_does_not_end(specchat, folder, monkeypatch):
    """A blow-up by steps: each rule makes the text ten times as long, and the time limit is that of a moment."""
    monkeypatch.setattr("specchat.models.hf.tokenizer._ENCODE_S", 0.1)
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    change_tokenizer(folder, lambda values: values.update(normalizer={"type": "Sequence", "normalizers": [step] * 6}))
    refused(specchat("run", str(folder), "a", *ASKED[1:]), 3, "the model's tokenizer does not end on this text")


def test_a_tokenizer_of_another_package(specchat, folder, monkeypatch):
    monkeypatch.setattr("specchat.models.hf.tokenizer_files.find_spec", lambda _: None)
    (folder / "tokenizer.json").unlink()
    for more in ((), ("--plan",)):
        result = specchat("run", str(folder), *ASKED, *more)
        refused(result, 3, "has no tokenizer (tokenizer.json)", "hint: copy tokenizer.json")
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    refused(specchat("run", str(folder), *ASKED), 2, "only as tokenizer.model, which needs the package sentencepiece")
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\n")
    refused(specchat("run", str(folder), *ASKED), 2, "needs the package tiktoken", "hint: run pip install tiktoken")


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("tokenizer_config.json", {"eos_token": 3}, "eos_token is 3, not a token"),
        ("tokenizer_config.json", {"bos_token": {"text": "x"}}, 'bos_token is {"text": "x"}, not a token'),
        ("tokenizer_config.json", {"extra_special_tokens": "x"}, 'extra_special_tokens is "x", not a list of tokens'),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "not an object of tokens by number"),
        ("special_tokens_map.json", {"pad_token": [1]}, "pad_token is [1], not a token"),
    ],
)
def test_impossible_tokens_are_named(specchat, folder, file, values, words):
    if file == "tokenizer_config.json":
        (folder / "special_tokens_map.json").unlink()  # its tokens come first, as in transformers
    change(folder / file, **values)
    refused(specchat("run", str(folder), *ASKED), 3, words)


def test_tokens_beyond_the_embeddings_are_never_read(specchat, folder, answer):
    def add(values):
        values["added_tokens"].append({**values["added_tokens"][0], "id": 4096, "content": "<new>"})

    change_tokenizer(folder, add)
    answered(specchat("run", str(folder), *ASKED), answer)
    result = specchat("run", str(folder), "What is <new>?", *ASKED[1:])
    refused(result, 3, "the prompt has token 4096, but", "has only 4,096 embeddings")


# --- weights -----------------------------------------------------------------------------------------------------


def split(folder, *, also_in_second=()):
    """Split the weights into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    keys = sorted(tensors)
    parts = [keys[: len(keys) // 2], [*keys[len(keys) // 2 :], *also_in_second]]
    for name, part in zip(names, parts, strict=True):
        save_file({key: tensors[key] for key in part}, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part if key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def test_shards(specchat, folder, answer):
    names = split(folder)
    answered(specchat("run", str(folder), *ASKED), answer)
    (folder / names[1]).unlink()
    refused(specchat("run", str(folder), *ASKED), 3, f"{names[1]} is missing", "hint: download the missing shards")


def test_one_tensor_in_two_shards(specchat, folder):
    split(folder, also_in_second=["model.embed_tokens.weight"])
    refused(specchat("run", str(folder), *ASKED), 3, "is in model-00001-of-00002.safetensors and in")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "x/y.safetensors", "..", 3, None, ["a"]])
def test_an_index_that_leaves_its_folder(specchat, folder, name):
    split(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change(index, weight_map=weight_map | {"model.norm.weight": name})
    refused(specchat("run", str(folder), *ASKED), 3, 'puts "model.norm.weight" into', "which is not a shard")


PREFIXES = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled layers": lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
    "parallel": lambda key: f"module.{key}",
    "both": lambda key: f"module._orig_mod.{key}",
    "cut out": lambda key: f"language_model.{key}",
    "all": lambda key: f"module.language_model._orig_mod.{key}",
}


@pytest.mark.parametrize("name", PREFIXES)
def test_prefixes_of_keys_are_dropped(specchat, folder, answer, name):
    tensors = {PREFIXES[name](key): tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    answered(specchat("run", str(folder), *ASKED), answer)


def test_a_prefix_that_hides_a_second_model(specchat, folder):
    tensors = load_file(folder / "model.safetensors")
    twice = {f"module.{key}": tensor for key, tensor in tensors.items()}
    twice |= {f"module._orig_mod.{key}": tensor.clone() for key, tensor in tensors.items()}
    save_file(twice, folder / "model.safetensors", metadata={"format": "pt"})
    refused(specchat("run", str(folder), *ASKED), 3, "has two tensors for 'model.")


def test_keys_of_another_model(specchat, folder):
    tensors = {f"encoder.{key}": tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(specchat("run", str(folder), *ASKED), 3, "tensor 'model.layers.0.", "is missing from")


# --- byte-order marks --------------------------------------------------------------------------------------------


def test_byte_order_marks_in_files(specchat, folder, answer):
    split(folder)
    for file in folder.glob("*.json"):
        file.write_bytes(BOM + file.read_bytes())
    answered(specchat("run", str(folder), *ASKED), answer)


def test_byte_order_marks_in_texts(specchat, folder, answer, tmp_path):
    answered(specchat("run", str(folder), *ASKED[1:], stdin=BOM + ASKED[0].encode()), answer)
    (tmp_path / "system.txt").write_bytes(BOM + b"Be brief.")
    marked, plain = (
        specchat("run", str(folder), *ASKED, "--system", text) for text in (f"@{tmp_path}/system.txt", "Be brief.")
    )
    answered(marked, plain.out)
