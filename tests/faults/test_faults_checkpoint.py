"""Checkpoints: configs that no network can be built of, weights that are no numbers, texts that are no text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_outline import (
    INDEX,
    SHARDS,
    TEXTS,
    TINY,
    UNET,
    VOCABULARY,
    opened,
    outline,
    outline_in_shards,
    outline_with_added_tokens,
    outline_with_vocabulary,
)
from corruptions import (
    DAMAGES,
    NAMES,
    NO_NAMES,
    PLACES,
    as_json,
    edits_of,
    packed,
    places,
    texts_of,
    trees_of,
    unpacked,
    with_key_twice,
)
from hypothesis import strategies as st
from outcomes import inputs, judged, loop
from safetensors.torch import load_file, save_file
from single_files import BY_NAME, tiny_layout

from magicface_rt.errors import CheckpointError
from magicface_rt.export.checkpoint import Checkpoint
from magicface_rt.export.single_file import SingleFileCheckpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return outline(tmp_path / "checkpoint")


def test_a_sound_outline_opens(folder: Path) -> None:
    assert opened(folder) is not None


@inputs
def test_any_other_value(inputs: int, folder: Path) -> None:
    def check(one: tuple[str, bytes]) -> None:
        name, content = one
        (folder / name).write_bytes(content)
        try:
            opened(folder)
        finally:
            (folder / name).write_text(json.dumps(TEXTS[name]))

    sound = json.loads(json.dumps(TEXTS))
    loop(
        inputs,
        st.sampled_from(sorted(TEXTS)).flatmap(lambda name: st.tuples(st.just(name), texts_of(sound[name]))),
        check,
    )


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*TEXTS, UNET, "tokenizer/tokenizer.json"])
def test_a_damaged_file(name: str, damage: str, folder: Path) -> None:
    path = folder / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert opened(folder) is None


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [*TEXTS, UNET, "tokenizer/tokenizer.json", "unet", "tokenizer"])
def test_something_else_in_the_place_of_a_file(name: str, place: str, folder: Path) -> None:
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_bytes(b"")
    PLACES[place](path)
    found = opened(folder)
    optional = name in ("tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json")
    assert optional or found is None


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_folder_of_any_name(name: str, folder: Path) -> None:
    found = opened(folder.rename(folder.parent / name))
    # The safetensors library takes no path that is not UTF-8.
    assert (found is not None) == name.isprintable() or name in ("a\nb", "\u202eright to left")


@pytest.mark.parametrize("name", NO_NAMES, ids=range(len(NO_NAMES)))
@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_a_name_that_nothing_can_have(name: str, suffix: str) -> None:
    path = Path(f"{name}{suffix}")
    assert judged("checkpoint folder", lambda: Checkpoint.open(path), names=path) is None


SPOILED: dict[str, tuple[str, Any, str]] = {
    "a deep config": ("unet/config.json", "[" * 100_000, "nested too deeply"),
    "channels that are a list": ("unet/config.json", {"in_channels": [4]}, "takes .* channels"),
    "blocks that are a number": ("vae/config.json", {"block_out_channels": 4}, "block_out_channels of vae"),
    "blocks that are null": ("unet/config.json", {"block_out_channels": None}, "lacks block_out_channels"),
    "a width that is text": ("unet/config.json", {"cross_attention_dim": "wide"}, "cross_attention_dim of unet is"),
    "a side that is a list": ("unet/config.json", {"sample_size": [32, 32]}, "sample_size of unet"),
    "a billion layers": ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers of text_encoder"),
    "a billion layers of the VAE": ("vae/config.json", {"layers_per_block": 10**9}, "layers_per_block of vae"),
    "a billion layers of attention": (
        "unet/config.json",
        {"reverse_transformer_layers_per_block": [10**9] * 4},
        "reverse_transformer_layers_per_block",
    ),
    "words beyond counting": ("text_encoder/config.json", {"vocab_size": 2**62}, "vocab_size of text_encoder"),
    "no words": ("text_encoder/config.json", {"vocab_size": None}, "lacks vocab_size"),
    "a scaling factor of text": ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor of vae"),
    "a scaling factor of 0": ("vae/config.json", {"scaling_factor": 0}, "scaling_factor of vae"),
    "fewer words than tokens": ("text_encoder/config.json", {"vocab_size": 5}, "vocab_size .* is 5; expected"),
    "fewer places than a prompt has": (
        "text_encoder/config.json",
        {"max_position_embeddings": 10},
        "prompts have 77 tokens, and max_position_embeddings .* is 10",
    ),
    "places that are null": (
        "text_encoder/config.json",
        {"max_position_embeddings": None},
        "max_position_embeddings .* is None; expected at least 77",
    ),
    "a block less": ("unet/config.json", {"block_out_channels": [16]}, "block_out_channels of the U-Net has 1 numbers"),
    "heads of two blocks": ("unet/config.json", {"attention_head_dim": [2, 2]}, "attention_head_dim .* has 2 numbers"),
    "a padding token without text": ("tokenizer/special_tokens_map.json", {"pad_token": {"content": 5}}, "pad_token"),
    "a padding token that UTF-8 has not": (
        "tokenizer/special_tokens_map.json",
        {"pad_token": "\ud800"},
        r"its padding token '\\ud800' is not in its vocabulary",
    ),
    "a length that is null": ("tokenizer/tokenizer_config.json", {"model_max_length": None}, "model_max_length"),
    "a length that is text": ("tokenizer/tokenizer_config.json", {"model_max_length": "77"}, "model_max_length"),
    "a length that the graphs do not take": (
        "tokenizer/tokenizer_config.json",
        {"model_max_length": 76},
        "model_max_length is 76, expected a number from 77",
    ),
    "a length below 0": ("tokenizer/tokenizer_config.json", {"model_max_length": -1}, "model_max_length"),
    "no UTF-8": ("tokenizer/tokenizer.json", b"\xff\xfe", r"tokenizer\.json: cannot be read as UTF-8"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_text_of_another_form(case: str, folder: Path) -> None:
    name, change, said = SPOILED[case]
    content = json.dumps({**TEXTS[name], **change}) if isinstance(change, dict) else change
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(folder)
    assert opened(folder) is None


def test_a_length_without_limit_is_that_of_the_text_encoder(folder: Path) -> None:
    """What transformers writes where there is none."""
    (folder / "tokenizer/tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert Checkpoint.open(folder).max_length == 77


@pytest.mark.parametrize("key", ["in_channels", "sample_size"])
def test_a_key_of_a_config_that_stands_twice(key: str, folder: Path) -> None:
    (folder / "unet/config.json").write_text(with_key_twice(json.dumps(TINY.unet), key, "9"))
    with pytest.raises(CheckpointError, match=f"'{key}' stands twice"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        [],
        "x",
        {"a": 5},
        {"a": []},
        {"a": ".."},
        {"a": ""},
        {"a": "/etc/passwd"},
        {"a": "../unet/x"},
        {"a": "x" * 9000},
    ],
)
def test_an_index_of_shards_that_is_none(weight_map: Any, folder: Path) -> None:
    (folder / UNET).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="index"):
        Checkpoint.open(folder)
    assert opened(folder) is None


@pytest.mark.parametrize("merges", [b"\xff", b"a b c\n", b"one\n", b"x y\n", b"\0\n"])
def test_merges_that_are_none(merges: bytes, folder: Path) -> None:
    (folder / "tokenizer/tokenizer.json").unlink()
    (folder / "tokenizer/merges.txt").write_bytes(merges)
    (folder / "tokenizer/vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2}))
    assert opened(folder) is None


@pytest.mark.parametrize("number", [2**32 - 2, 2**31, 1_000_000, -1, True, 1.0, "1"])
def test_a_vocabulary_with_a_number_that_no_token_has(number: Any, vocabulary: Path) -> None:
    """Of one near 2^32 the tokenizers library asked for so much memory that the process was ended."""
    (vocabulary / "tokenizer/vocab.json").write_text(json.dumps({**VOCABULARY, "<|endoftext|>": number}))
    with pytest.raises(
        CheckpointError, match=r"'<\|endoftext\|>' the number .* expected a whole number from 0 to 999999"
    ):
        Checkpoint.open(vocabulary)


@pytest.mark.parametrize("vocabulary", [{}, {"a": "b"}, {"a": -1}, {"a": 2**70}, {"<|endoftext|>": 1}, {"a": None}])
def test_a_vocabulary_that_is_none(vocabulary: Any, folder: Path) -> None:
    (folder / "tokenizer/tokenizer.json").unlink()
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    assert opened(folder) is None


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return outline_in_shards(tmp_path / "checkpoint")


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    return outline_with_vocabulary(tmp_path / "checkpoint")


def test_a_sound_index_and_a_sound_vocabulary(shards: Path) -> None:
    assert opened(shards) is not None


def test_a_sound_vocabulary(vocabulary: Path) -> None:
    assert opened(vocabulary) is not None


@inputs
def test_any_edit_of_an_index(inputs: int, shards: Path) -> None:
    def check(content: bytes) -> None:
        (shards / INDEX).write_bytes(content)
        opened(shards)

    loop(inputs, edits_of(json.dumps(SHARDS).encode()) | texts_of(SHARDS), check)


@inputs
@pytest.mark.parametrize("name", ["merges.txt", "vocab.json"])
def test_any_edit_of_a_vocabulary(name: str, inputs: int, vocabulary: Path) -> None:
    path = vocabulary / "tokenizer" / name
    contents = edits_of(path.read_bytes())

    def check(content: bytes) -> None:
        path.write_bytes(content)
        opened(vocabulary)

    loop(inputs, contents if name == "merges.txt" else contents | texts_of(VOCABULARY), check)


@inputs
@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
def test_any_edit_of_added_tokens(name: str, inputs: int, tmp_path: Path) -> None:
    checkpoint = outline_with_added_tokens(tmp_path / "checkpoint")
    assert opened(checkpoint) is not None
    path = checkpoint / "tokenizer" / name
    sound = path.read_bytes()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        opened(checkpoint)

    loop(inputs, edits_of(sound) | texts_of(json.loads(sound)), check)


# ------------------------------------------------------------------------------------------------------------ weights


@pytest.fixture
def whole(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "whole"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("component", "file"),
    [
        ("unet", UNET),
        ("vae", "vae/diffusion_pytorch_model.safetensors"),
        ("text_encoder", "text_encoder/model.safetensors"),
    ],
)
def test_weights_that_are_no_numbers(component: str, file: str, value: float, whole: Path) -> None:
    state = load_file(whole / file)
    name = sorted(state)[3]
    state[name].view(-1)[0] = value
    save_file(state, whole / file)
    with pytest.raises(CheckpointError, match=rf"{component} .* holds NaN or infinity"):
        getattr(Checkpoint.open(whole), f"load_{component}")()


def test_weights_that_the_dtype_cannot_hold(whole: Path) -> None:
    state = load_file(whole / UNET)
    state["conv_in.weight"].view(-1)[0] = 1e6
    save_file(state, whole / UNET)
    Checkpoint.open(whole).load_unet()
    with pytest.raises(CheckpointError, match=r"unet conv_in\.weight has values beyond the range of torch.float16"):
        Checkpoint.open(whole).load_unet(torch.float16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_weights_of_whole_numbers(dtype: Any, whole: Path) -> None:
    """Quantised, with scales that nobody here knows of."""
    state = load_file(whole / UNET)
    state["conv_in.weight"] = state["conv_in.weight"].to(dtype)
    save_file(state, whole / UNET)
    with pytest.raises(CheckpointError, match=r"unet conv_in\.weight is torch\..*expected floating-point"):
        Checkpoint.open(whole).load_unet()


@pytest.mark.parametrize(
    ("component", "change"),
    [
        ("unet", {"norm_num_groups": 0}),
        ("unet", {"norm_num_groups": 7}),
        ("unet", {"act_fn": "none"}),
        ("unet", {"attention_head_dim": 7}),
        ("unet", {"block_out_channels": [16]}),
        ("unet", {"conv_in_kernel": -3}),
        ("unet", {"time_embedding_type": "x"}),
        ("vae", {"down_block_types": ["x"] * 4}),
        ("vae", {"norm_num_groups": "x"}),
        ("vae", {"latent_channels": 2**62}),
        ("text_encoder", {"hidden_act": "none"}),
        ("text_encoder", {"num_attention_heads": 7}),
        ("text_encoder", {"intermediate_size": 2**62}),
        ("text_encoder", {"max_position_embeddings": 60_000}),
    ],
)
def test_a_config_of_which_no_network_can_be_built(component: str, change: dict[str, Any], whole: Path) -> None:
    path = whole / component / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    def load() -> object:
        return getattr(Checkpoint.open(whole), f"load_{component}")()

    assert judged("checkpoint folder, loaded", load, names=whole) is None


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_single_file_without_most_of_its_tensors(component: str, tmp_path: Path) -> None:
    """The converters are another project's, and are given what they do not expect."""
    path = tmp_path / "hole.safetensors"
    path.write_bytes(tiny_layout())
    checkpoint = SingleFileCheckpoint(path, expected=TINY)
    load = getattr(checkpoint, f"load_{component}")
    assert judged("single-file checkpoint, loaded", load, names=path) is None


HEADERS: dict[str, Any] = {
    "a terabyte": {"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}},
    "more than there are bytes": {"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 4]}},
    "offsets that go back": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    "two in one place": {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    },
    "a shape below 0": {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "a dtype of its own": {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
    "a dtype that torch may lack": {"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}},
    "metadata that is no text": {"__metadata__": {"a": 5}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    "a key twice": '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    '"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}',
    "a deep one": "[" * 10_000,
    "many dimensions": {"a": {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]}},
    "a NUL in a name": {"a\0b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_of_safetensors_that_lies(case: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(packed(HEADERS[case], bytes(4)))
    for name in ("weights", "single-file checkpoint"):
        found = judged(name, lambda name=name: BY_NAME[name].read(path), names=path)  # type: ignore[misc]
        assert found is None or case in (
            "a NUL in a name",
            "a key twice",
            "many dimensions",
            "a dtype that torch may lack",
        )


@inputs
def test_any_other_value_of_a_safetensors_header(inputs: int, tmp_path: Path) -> None:
    header, body = unpacked(tiny_layout())
    path = tmp_path / "weights.safetensors"
    where = [at for at in places(header) if "output_blocks.3." in at[0] or "input_blocks.0." in at[0]]

    def check(text: str) -> None:
        path.write_bytes(packed(text, body))
        for name in ("weights", "single-file checkpoint"):
            judged(f"{name}, edited", lambda name=name: BY_NAME[name].read(path), names=path)  # type: ignore[misc]

    loop(inputs, trees_of(header, where).map(as_json), check)
