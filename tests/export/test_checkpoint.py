"""Random-weight checkpoints, and opening diffusers folders: what is read, and what is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from magicface_rt.errors import CheckpointError, OptionError, OutputError
from magicface_rt.export.architectures import ARCHITECTURES, architecture
from magicface_rt.export.checkpoint import Checkpoint
from magicface_rt.export.random_weights import write_checkpoint, write_tokenizer
from magicface_rt.export.tokenizer import build_tokenizer_json, clip_vocabulary
from magicface_rt.tokenizer import Tokenizer as PromptTokenizer

PROMPTS = (
    "",
    "a man with a hat wearing sunglasses",
    "A photo of  Ünïcode\n cafe\u0301's 日本 in 1998, isn't it?",
    "wow!! <|endoftext|> 👩🏽‍🚀 x_y-z",
)
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("tiny", tmp_path_factory.mktemp("checkpoints") / "tiny", seed=3)


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def bytes_by_name(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def encode(checkpoint: Checkpoint, *prompts: str) -> torch.Tensor:
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
    rows = [tokenizer.encode(prompt).ids for prompt in prompts]
    return torch.tensor([ids + [checkpoint.pad_token_id] * (checkpoint.max_length - len(ids)) for ids in rows])


def test_same_seed_gives_same_bytes_whatever_the_threads_and_random_state(tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    torch.set_num_threads(2)
    before = torch.get_rng_state()
    again = write_checkpoint("tiny", tmp_path / "again", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert bytes_by_name(again) == bytes_by_name(tiny)


def test_another_seed_gives_another_model(tiny: Path, tmp_path: Path) -> None:
    other = write_checkpoint("tiny", tmp_path / "other", seed=4)
    assert Checkpoint.open(other).content_hash() != Checkpoint.open(tiny).content_hash()


def test_float16_checkpoint_is_the_same_model(tiny: Path, tmp_path: Path) -> None:
    half = Checkpoint.open(write_checkpoint("tiny", tmp_path / "half", seed=3, dtype="float16"))
    whole = Checkpoint.open(tiny)
    for load in (Checkpoint.load_unet, Checkpoint.load_vae, Checkpoint.load_text_encoder):
        stored, expected = load(half).state_dict(), load(whole).state_dict()
        assert all(torch.equal(stored[name], expected[name]) for name in expected)


def test_readme_says_that_the_weights_are_random(tiny: Path) -> None:
    text = (tiny / "README.md").read_text()
    assert "RANDOM" in text
    assert "no likeness" in text


def test_existing_output_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        write_checkpoint("tiny", tmp_path / "out", seed=0)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("full disk")

    monkeypatch.setattr("magicface_rt.export.random_weights._fit_noise_predictor", fail)
    with pytest.raises(RuntimeError, match="full disk"):
        write_checkpoint("tiny", tmp_path / "out", seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sd3", {"seed": 0}, "expected one of tiny, sd15, sd21-base"),
        ("tiny", {"seed": -1}, "seed"),
        ("tiny", {"seed": 0, "dtype": "int8"}, "dtype"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        write_checkpoint(name, tmp_path / "out", **options)  # type: ignore[arg-type]


@torch.no_grad()
def test_latents_stay_bounded_and_text_matters(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    unet, schedule = checkpoint.load_unet(), checkpoint.schedule
    text = checkpoint.load_text_encoder()(encode(checkpoint, "", "a man with a hat")).last_hidden_state
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    steps = 10
    for timestep, (c0, c1) in zip(schedule.timesteps(steps), schedule.step_coefficients(steps).tolist(), strict=True):
        plain, prompted = unet(latents.repeat(2, 1, 1, 1), int(timestep), text).sample
        assert (prompted - plain).norm() > 0.003 * plain.norm()
        latents = c0 * latents + c1 * (plain + 7.5 * (prompted - plain))
    assert 0.5 < latents.pow(2).mean().sqrt() < 10


@torch.no_grad()
def test_attention_is_peaked_and_regions_form(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    unet = checkpoint.load_unet()
    text = checkpoint.load_text_encoder()(encode(checkpoint, "a man with a hat")).last_hidden_state
    layer = unet.up_blocks[2].attentions[1].transformer_blocks[0]
    rows: dict[str, torch.Tensor] = {}
    layer.attn1.register_forward_pre_hook(lambda _module, inputs: rows.update(own=inputs[0]))
    layer.attn2.register_forward_pre_hook(lambda _module, inputs: rows.update(cross=inputs[0]))
    unet(torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)), 501, text)

    def attention(module: torch.nn.Module, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        heads = module.heads
        q, k = (x[0].unflatten(-1, (heads, -1)).transpose(0, 1) for x in (module.to_q(queries), module.to_k(keys)))
        return (q @ k.transpose(1, 2) * module.scale).softmax(-1).mean(0)  # (n, keys)

    own = attention(layer.attn1, rows["own"], rows["own"])
    cross = attention(layer.attn2, rows["cross"], text)
    entropy = -(own * own.log()).sum(-1).mean() / torch.tensor(256.0).log()
    assert entropy < 0.95
    labels = (own @ cross / (own @ cross).mean(0)).argmax(-1).reshape(16, 16)
    assert len(labels.unique()) >= 5
    shuffled = labels.flatten()[torch.randperm(256, generator=torch.Generator().manual_seed(0))].reshape(16, 16)
    agreement, chance = ((x[1:] == x[:-1]).float().mean() for x in (labels, shuffled))
    assert agreement > chance


def test_folder_loads_as_diffusers_loads_it(tiny: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny, local_files_only=True)
    checkpoint = Checkpoint.open(tiny)
    for ours, theirs in (
        (checkpoint.load_unet(), pipeline.unet),
        (checkpoint.load_vae(), pipeline.vae),
        (checkpoint.load_text_encoder(), pipeline.text_encoder),
    ):
        expected = theirs.state_dict()
        assert ours.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
        assert not ours.training
    ids = pipeline.tokenizer(list(PROMPTS), padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(encode(checkpoint, *PROMPTS), ids)
    with torch.no_grad():
        assert torch.equal(checkpoint.load_text_encoder()(ids)[0], pipeline.text_encoder(ids)[0])


def test_folder_describes_itself(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    assert checkpoint.architecture["name"] == "tiny"
    assert checkpoint.architecture["heads"] == [4, 4, 4, 4]
    assert checkpoint.text_width == 32
    assert checkpoint.vae_scaling_factor == 0.18215
    assert (checkpoint.pad_token_id, checkpoint.max_length) == (49407, 77)
    assert checkpoint.schedule.steps_offset == 1


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("offset", [0, 1, 7, None])
def test_timesteps_are_those_of_the_pipeline_whatever_offset_the_checkpoint_has(
    folder: Path, offset: int | None
) -> None:
    """Schedulers whose default it is write 0, and the pipeline makes it 1 when it is built."""
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    config.pop("steps_offset")
    file.write_text(json.dumps(config if offset is None else {**config, "steps_offset": offset}))
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    theirs = StableDiffusionPipeline.from_pretrained(folder, scheduler=scheduler, local_files_only=True).scheduler
    theirs.set_timesteps(50)
    ours = Checkpoint.open(folder).schedule.timesteps(50).tolist()
    assert ours == theirs.timesteps.tolist()
    assert (ours[0], ours[-1]) == (981, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_components_load_in_the_dtype_asked_for(tiny: Path, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint.open(tiny)
    for model in (checkpoint.load_unet(dtype), checkpoint.load_vae(dtype), checkpoint.load_text_encoder(dtype)):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_tokenizer_encodes_as_transformers_does(tmp_path: Path, name: str) -> None:
    write_tokenizer(architecture(name), tmp_path / "tokenizer")
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    vocabulary, merges = clip_vocabulary()
    plain = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=architecture(name).pad_token)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    for prompt in PROMPTS:
        assert ours.encode(prompt).ids == theirs(prompt).input_ids == plain(prompt).input_ids
    assert theirs.pad_token_id == vocabulary[architecture(name).pad_token]


def test_vocabulary_is_clips() -> None:
    vocabulary, merges = clip_vocabulary()
    assert (len(vocabulary), len(merges)) == (49408, 48894)
    known = {"!": 0, "!</w>": 256, "a</w>": 320, "man</w>": 786, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    assert {token: vocabulary[token] for token in known} == known


def test_tokenizer_is_built_where_only_vocabulary_and_merges_exist(folder: Path) -> None:
    shipped = Checkpoint.open(folder).tokenizer_json
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert Checkpoint.open(folder).tokenizer_json == shipped == build_tokenizer_json(*clip_vocabulary())


START_AND_END = {
    str(number): {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "special": True}
    for number, text in ((49406, "<|startoftext|>"), (49407, "<|endoftext|>"))
}
"""As transformers writes them into every tokenizer_config.json."""
CAT_TOY = {"content": "<cat-toy>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
ADDED_PROMPTS = ("a <cat-toy> on a beach", "<Cat-Toy>s, Wort<cat-toy>_1 wort", "two <cat-toy>  <cat-toy>")


def inverted(folder: Path, added: object, decoder: object = None, *, tokens: int = 49411) -> Path:
    """A checkpoint whose tokenizer was given tokens, as it was saved before there was a tokenizer.json."""
    (folder / "tokenizer" / "tokenizer.json").unlink()
    if added is not None:
        (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps(added))
    if decoder is not None:
        edit(folder / "tokenizer" / "tokenizer_config.json", added_tokens_decoder=decoder)
    edit(folder / "text_encoder" / "config.json", vocab_size=tokens)
    return folder


@pytest.mark.parametrize(
    ("added", "decoder"),
    [
        ({"<cat-toy>": 49408}, None),
        ({"Wort": 49410, "<cat-toy>": 49408, "<cat-toy>_1": 49409}, None),
        (None, {**START_AND_END, "49408": CAT_TOY}),
        ({"<cat-toy>": 49408}, {**START_AND_END, "49408": {**CAT_TOY, "normalized": False, "special": True}}),
        (None, {**START_AND_END, "49408": {**CAT_TOY, "lstrip": True, "rstrip": True}}),
        (None, {**START_AND_END, "49408": {**CAT_TOY, "single_word": True}, "320": {"content": "a</w>"}}),
    ],
)
def test_added_tokens_are_read_as_transformers_reads_them(folder: Path, added: object, decoder: object) -> None:
    checkpoint = Checkpoint.open(inverted(folder, added, decoder))
    theirs = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    ours = Tokenizer.from_str(checkpoint.tokenizer_json)
    for prompt in (*PROMPTS, *ADDED_PROMPTS):
        assert ours.encode(prompt).ids == theirs(prompt).input_ids, prompt
    assert ours.encode("a <cat-toy> on a beach").ids == [49406, 320, 49408, 525, 320, 2117, 49407]
    assert checkpoint.tokens == 49408 + max(len(added or {}), 1)  # type: ignore[arg-type]


def test_added_tokens_that_are_named_as_special_are_found_as_they_are_written(folder: Path) -> None:
    inverted(folder, {"<cat-toy>": 49408})
    edit(folder / "tokenizer" / "special_tokens_map.json", additional_special_tokens=[{"content": "<cat-toy>"}])
    ours = Tokenizer.from_str(Checkpoint.open(folder).tokenizer_json)
    assert ours.token_to_id("<cat-toy>") in ours.encode("a <cat-toy>").ids
    assert ours.token_to_id("<cat-toy>") not in ours.encode("a <Cat-Toy>").ids


def test_an_added_token_is_a_word_of_a_prompt(folder: Path) -> None:
    prompt = "a photo of two <cat-toy> on <Cat-Toy>"
    stripping = {**START_AND_END, "49408": {**CAT_TOY, "lstrip": True, "rstrip": True}}
    for decoder in (None, stripping):
        checkpoint = Checkpoint.open(inverted(folder, {"<cat-toy>": 49408}, decoder))
        (folder / "tokenizer" / "tokenizer.json").write_text(checkpoint.tokenizer_json)
        tokenizer = PromptTokenizer.from_file(folder / "tokenizer" / "tokenizer.json", pad_token_id=49407)
        assert tokenizer.find_word(prompt, "<cat-toy>") == (5,)
        assert tokenizer.find_word(prompt, "two <cat-toy> on") == (4, 5, 6)
        assert tokenizer.find_words(prompt, ["on", "cat", "toy", "photo"]) == [(6,), None, None, (2,)]
        assert [piece.strip() for piece in tokenizer.tokens(prompt)[4:8]] == ["two", "<cat-toy>", "on", "<Cat-Toy>"]
        assert tokenizer.find_words("<cat-toy>s", ["<cat-toy>"]) == [None]


def test_start_and_end_among_the_added_tokens_change_nothing(folder: Path) -> None:
    shipped = Checkpoint.open(folder).tokenizer_json
    inverted(folder, {"<|startoftext|>": 49406, "<|endoftext|>": 49407}, START_AND_END)
    assert Checkpoint.open(folder).tokenizer_json == shipped


def test_a_padding_token_can_be_an_added_one(folder: Path) -> None:
    inverted(folder, {"<cat-toy>": 49408, "[PAD]": 49409})
    edit(folder / "tokenizer" / "special_tokens_map.json", pad_token="[PAD]")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.pad_token_id == 49409
    assert Tokenizer.from_str(checkpoint.tokenizer_json).token_to_id("<cat-toy>") == 49408


@pytest.mark.parametrize(
    ("added", "decoder", "message"),
    [
        (
            {"<cat-toy>": 49409},
            None,
            r"added_tokens.json gives '<cat-toy>' the number 49409, and it can only get 49408",
        ),
        ({"<cat-toy>": 5}, None, r"'<cat-toy>' the number 5, which '&' has in vocab.json"),
        ({"cat</w>": 49408}, None, r"'cat</w>' the number 49408, and vocab.json 2368"),
        ({"a b": 49408, "c d": 49408}, None, r"'a b' the number 49408, and .*'c d' the number 49408"),
        (
            {"<cat-toy>": 49408},
            {"49409": CAT_TOY},
            r"tokenizer_config.json gives .* 49409, and added_tokens.json .* 49408",
        ),
        ({"<cat-toy>": -1}, None, r"added_tokens.json: it gives '<cat-toy>' the number -1"),
        ({"<cat-toy>": "49408"}, None, r"the number '49408'"),
        ({"": 49408}, None, r"it gives '' the number"),
        ({"\ud800": 49408}, None, r"expected a text and a whole number"),
        ({f"<{n}>": 49408 + n for n in range(10_001)}, None, r"add 10001 tokens; expected at most 10000"),
        ([], None, r"added_tokens.json: expected a JSON object"),
        (None, [CAT_TOY], r"tokenizer_config.json: added_tokens_decoder is a list of 1"),
        (None, {"x": CAT_TOY}, r"a token of number 'x'"),
        (None, {"49408": "<cat-toy>"}, r"has '<cat-toy>' as token 49408"),
        (None, {"49408": {**CAT_TOY, "special": 1}}, r"flags that are true or false"),
        ({f"<{n}>": 49408 + n for n in range(4)}, None, r"a token of number 49411, and vocab_size .* is 49411"),
    ],
)
def test_added_tokens_that_cannot_be_are_refused_by_name(
    folder: Path, added: object, decoder: object, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(inverted(folder, added, decoder))


def test_added_tokens_that_an_older_tokenizer_json_lacks_are_refused(folder: Path) -> None:
    (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<cat-toy>": 49408}))
    edit(folder / "text_encoder" / "config.json", vocab_size=49409)
    with pytest.raises(CheckpointError, match=r"'<cat-toy>' the number 49408, and tokenizer.json lacks it; remove"):
        Checkpoint.open(folder)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert Checkpoint.open(folder).tokens == 49409


def test_padding_token_of_stable_diffusion_2_is_the_exclamation_mark(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    edit(folder / "tokenizer" / "special_tokens_map.json", pad_token={"content": "!", "special": True})
    assert Checkpoint.open(folder).pad_token_id == 0


def test_fp16_variant_is_taken_where_only_it_exists(folder: Path) -> None:
    weights = folder / UNET
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert Checkpoint.open(folder).load_unet().conv_in.weight.shape == (16, 4, 3, 3)


def test_shards_are_read_by_their_index(folder: Path) -> None:
    weights = folder / UNET
    expected = load_file(weights)
    weights.unlink()
    names = sorted(expected)
    shards = {"a-00001-of-00002.safetensors": names[::2], "a-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: expected[name] for name in members}, weights.with_name(shard))
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    weights.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    loaded = Checkpoint.open(folder).load_unet().state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_names_of_old_diffusers_and_transformers_are_understood(folder: Path, tiny: Path) -> None:
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in load_file(vae).items():
        for new_part, old_part in old.items():
            name = name.replace(f".{new_part}.", f".{old_part}.")
        state[name] = tensor
    assert any(".proj_attn." in name for name in state)
    save_file(state, vae)
    text = folder / "text_encoder" / "model.safetensors"
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file({**load_file(text), **positions}, text)
    for load in (Checkpoint.load_vae, Checkpoint.load_text_encoder):
        stored, expected = load(Checkpoint.open(folder)).state_dict(), load(Checkpoint.open(tiny)).state_dict()
        assert stored.keys() == expected.keys()
        assert all(torch.equal(stored[name], expected[name]) for name in expected)


def only_pickles(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def truncated(folder: Path) -> None:
    content = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(content[: len(content) // 2])


def shard_outside(folder: Path) -> None:
    (folder / UNET).unlink()
    index = {"weight_map": {"conv_in.weight": "../elsewhere.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "only pickles": (only_pickles, r"only as pickles \(diffusion_pytorch_model.bin\)"),
    "no weights": (lambda f: (f / UNET).unlink(), "no weights"),
    "truncated": (truncated, "truncated"),
    "empty file": (lambda f: (f / UNET).write_bytes(b""), "not a complete safetensors file"),
    "shard outside": (shard_outside, "not a plain file name"),
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "component 'vae' is missing"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "component 'scheduler' is missing"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "component 'tokenizer' is missing"),
    "no config": (lambda f: (f / "unet" / "config.json").unlink(), r"config\.json: .*does not exist"),
    "broken config": (lambda f: (f / "unet" / "config.json").write_text("{"), "cannot be read as JSON"),
    "broken tokenizer": (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "v-prediction": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", prediction_type="v_prediction"),
        "v_prediction",
    ),
    "inpainting": (lambda f: edit(f / "unet" / "config.json", in_channels=9), "inpainting"),
    "xl": (lambda f: edit(f / "unet" / "config.json", addition_embed_type="text_time"), "Stable Diffusion XL"),
    "takes the guidance scale": (
        lambda f: edit(f / "unet" / "config.json", time_cond_proj_dim=256),
        "time_cond_proj_dim is 256: it was distilled .* give the checkpoint that it was distilled from",
    ),
    "takes classes": (lambda f: edit(f / "unet" / "config.json", num_class_embeds=10), "num_class_embeds is 10"),
    "takes images": (
        lambda f: edit(f / "unet" / "config.json", encoder_hid_dim_type="ip_image_proj"),
        "encoder_hid_dim_type is 'ip_image_proj'",
    ),
    "another layout": (
        lambda f: edit(f / "unet" / "config.json", down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3),
        "down_block_types",
    ),
    "more layers": (lambda f: edit(f / "unet" / "config.json", layers_per_block=3), "layers_per_block"),
    "another vae": (lambda f: edit(f / "vae" / "config.json", _class_name="AutoencoderTiny"), "AutoencoderTiny"),
    "another text width": (lambda f: edit(f / "text_encoder" / "config.json", hidden_size=64), "width is 64"),
}


@pytest.mark.parametrize("case", list(SPOILED))
def test_spoiled_folder_is_refused_when_opened(folder: Path, case: str) -> None:
    spoil, message = SPOILED[case]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_weights_that_do_not_fit_their_config_are_refused_by_name(folder: Path) -> None:
    state = load_file(folder / UNET)
    weight = state.pop("conv_in.weight")
    save_file(state, folder / UNET)
    with pytest.raises(CheckpointError, match=r"unet lack conv_in\.weight"):
        Checkpoint.open(folder).load_unet()
    save_file({**state, "conv_in.weight": weight, "extra": weight.clone()}, folder / UNET)
    with pytest.raises(CheckpointError, match="unknown extra"):
        Checkpoint.open(folder).load_unet()
    save_file({**state, "conv_in.weight": weight[:, :3].contiguous()}, folder / UNET)
    with pytest.raises(CheckpointError, match=r"conv_in\.weight has shape \[16, 3, 3, 3\]"):
        Checkpoint.open(folder).load_unet()


@pytest.mark.parametrize(
    ("name", "message"),
    [("model.ckpt", "pickle"), ("model.bin", "pickle"), ("model.pt", "pickle"), ("model.txt", "model.txt")],
)
def test_other_files_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path / name)


class Runs:
    """Pickled, it makes a file when it is read."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.ran,)


@pytest.mark.parametrize("place", ["a file", "a folder"])
def test_a_pickle_that_is_named_safetensors_is_refused_and_not_run(folder: Path, tmp_path: Path, place: str) -> None:
    path, ran = (tmp_path / "model.safetensors" if place == "a file" else folder / UNET), tmp_path / "ran"
    content = pickle.dumps({"conv_in.weight": Runs(ran)})
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"safetensors"):
        Checkpoint.open(path if place == "a file" else folder).load_unet()
    assert not ran.exists()
    pickle.loads(content)
    assert ran.exists(), "it is no pickle that runs"


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing there"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="not a diffusers folder"):
        Checkpoint.open(tmp_path)


def test_content_hash_covers_every_weight_file_and_nothing_else(folder: Path) -> None:
    before = Checkpoint.open(folder).content_hash()
    (folder / "README.md").write_text("another")
    assert Checkpoint.open(folder).content_hash() == before
    state = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    state["post_quant_conv.bias"] += 1
    save_file(state, folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert Checkpoint.open(folder).content_hash() != before


def replaced(file: Path) -> None:
    """As a download or a synchronisation does."""
    shutil.copyfile(file, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def written_to(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\0\0\0\0")


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("change", [replaced, written_to, cut_short, Path.unlink], ids=lambda change: change.__name__)
def test_a_weight_file_that_changes_after_it_was_opened_is_named(folder: Path, change: Callable[[Path], None]) -> None:
    opened = Checkpoint.open(folder)
    opened.check_unchanged()
    change(folder / UNET)
    said = rf"{UNET} was (replaced or written to|removed) since the checkpoint was opened"
    for call in (opened.check_unchanged, opened.load_unet, opened.load_vae):
        with pytest.raises(CheckpointError, match=said):
            call()


def test_a_link_to_weights_that_is_switched_is_a_change(folder: Path, tmp_path: Path) -> None:
    """Caches of model hubs consist of such links."""
    for name in ("one", "two"):
        shutil.copyfile(folder / UNET, tmp_path / name)
    (folder / UNET).unlink()
    (folder / UNET).symlink_to(tmp_path / "one")
    opened = Checkpoint.open(folder)
    opened.load_unet()
    (folder / UNET).unlink()
    (folder / UNET).symlink_to(tmp_path / "two")
    with pytest.raises(CheckpointError, match=rf"{UNET} was replaced"):
        opened.load_unet()


@pytest.mark.full
@pytest.mark.parametrize("name", ["sd15", "sd21-base"])
@torch.no_grad()
def test_full_size_checkpoint_is_written_and_loads(tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(name, tmp_path / name, seed=0, dtype="float16"))
    assert checkpoint.architecture["name"] == name
    text = checkpoint.load_text_encoder()(encode(checkpoint, "", "a man")).last_hidden_state
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    predicted = checkpoint.load_unet()(noise, 981, text).sample
    assert (predicted - noise).norm() < noise.norm()
