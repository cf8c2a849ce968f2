"""Single-file checkpoints: the names of the original code, written here by the inverse of diffusers' tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import load_file, save_file

from magicface_rt.errors import CheckpointError
from magicface_rt.export.architectures import ARCHITECTURES
from magicface_rt.export.checkpoint import Checkpoint
from magicface_rt.export.random_weights import write_checkpoint
from magicface_rt.export.single_file import SingleFileCheckpoint

TINY = ARCHITECTURES["tiny"]
State = dict[str, torch.Tensor]
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def replaced(name: str, parts: dict[str, str]) -> str:
    for new, old in parts.items():
        name = name.replace(f"{new}.", f"{old}.")
    return name


def ldm_unet_name(name: str) -> str:
    """What the original code calls a tensor of diffusers' U-Net with two layers per block."""
    table = DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"]
    if name in table:
        return str(table[name])
    block, rest = name.split(".", 1)
    if block == "mid_block":
        kind, index, rest = rest.split(".", 2)
        place = f"middle_block.{2 * int(index) if kind == 'resnets' else 1}"
    else:
        number, kind, index, rest = rest.split(".", 3)
        i, j = int(number), int(index)
        if block == "down_blocks":
            if kind == "downsamplers":
                return f"input_blocks.{3 * i + 3}.0.op.{rest.removeprefix('conv.')}"
            place = f"input_blocks.{3 * i + j + 1}.{1 if kind == 'attentions' else 0}"
        else:
            if kind == "upsamplers":
                return f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}.{rest}"
            place = f"output_blocks.{3 * i + j}.{1 if kind == 'attentions' else 0}"
    return f"{place}.{replaced(rest, UNET_RESNET) if kind == 'resnets' else rest}"


def ldm_vae_name(name: str) -> str:
    table = DIFFUSERS_TO_LDM_MAPPING["vae"]
    if name in table:
        return str(table[name])
    side, block, rest = name.split(".", 2)
    rest = rest.replace("conv_shortcut", "nin_shortcut")
    if block == "mid_block":
        kind, index, rest = rest.split(".", 2)
        if kind == "attentions":
            return f"{side}.mid.attn_1.{replaced(rest, VAE_ATTENTION)}"
        return f"{side}.mid.block_{int(index) + 1}.{rest}"
    number, kind, index, rest = rest.split(".", 3)
    if block == "down_blocks":
        place = f"{side}.down.{number}"
        return f"{place}.downsample.{rest}" if kind == "downsamplers" else f"{place}.block.{index}.{rest}"
    place = f"{side}.up.{3 - int(number)}"
    return f"{place}.upsample.{rest}" if kind == "upsamplers" else f"{place}.block.{index}.{rest}"


def single_file_state(folder: Path) -> State:
    """The tensors of a diffusers folder by the names of the original code, with what such files hold besides."""
    state: State = {
        "alphas_cumprod": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.5),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    for name, tensor in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        state[f"model.diffusion_model.{ldm_unet_name(name)}"] = tensor
    for name, tensor in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        projection = ".attentions." in name and tensor.ndim == 2  # a 1 x 1 convolution in the original
        state[f"first_stage_model.{ldm_vae_name(name)}"] = tensor[:, :, None, None] if projection else tensor
    for name, tensor in load_file(folder / "text_encoder" / "model.safetensors").items():
        state[f"cond_stage_model.transformer.{name}"] = tensor
    return state


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("tiny", tmp_path_factory.mktemp("single") / "tiny", seed=5)


@pytest.fixture(scope="module")
def state(tiny: Path) -> State:
    return single_file_state(tiny)


def assert_same_models(ours: Checkpoint, expected: Checkpoint) -> None:
    for load in (Checkpoint.load_unet, Checkpoint.load_vae, Checkpoint.load_text_encoder):
        converted, original = load(ours).state_dict(), load(expected).state_dict()
        assert converted.keys() == original.keys()
        assert all(torch.equal(converted[name], original[name]) for name in original)


def test_converted_weights_equal_the_folder_they_came_from(tiny: Path, state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "tiny.safetensors")
    single = SingleFileCheckpoint(tmp_path / "tiny.safetensors", expected=TINY)
    folder = Checkpoint.open(tiny)
    assert_same_models(single, folder)
    assert single.tokenizer_json == folder.tokenizer_json
    assert (single.pad_token_id, single.max_length) == (folder.pad_token_id, folder.max_length)
    assert single.schedule == folder.schedule
    assert single.vae_scaling_factor == folder.vae_scaling_factor
    assert single.architecture == folder.architecture


def test_a_file_that_is_replaced_after_it_was_opened_is_refused(state: State, tmp_path: Path) -> None:
    file, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    save_file(state, file)
    save_file(state, other)
    opened = SingleFileCheckpoint(file, expected=TINY)
    opened.check_unchanged()
    other.replace(file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was replaced"):
        opened.load_vae()


def test_content_hash_follows_the_content_not_the_name(state: State, tmp_path: Path) -> None:
    hashes = []
    for name, change in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        file = tmp_path / f"{name}.safetensors"
        save_file({**state, "alphas_cumprod": torch.full((1000,), change)}, file)
        hashes.append(SingleFileCheckpoint(file, expected=TINY).content_hash())
    assert hashes[0] == hashes[1] != hashes[2]


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
ATTENTION = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn1.to_q.weight"
ONE = torch.zeros(1)
SPOILED = {
    "xl": ({"conditioner.embedders.1.model.ln_final.weight": ONE}, (), "Stable Diffusion XL"),
    "sd2": ({"cond_stage_model.model.ln_final.weight": ONE}, (), "Stable Diffusion 2"),
    "lora": ({"lora_unet_down.weight": ONE}, (), "LoRA"),
    "v-prediction": ({"v_pred": ONE}, (), "v-prediction"),
    "inpainting": ({CONV_IN: torch.zeros(16, 9, 3, 3)}, (), "inpainting"),
    "takes the guidance scale": (
        {"model.diffusion_model.time_embedding.cond_proj.weight": torch.zeros(16, 256)},
        (),
        "distilled to take the guidance scale",
    ),
    "missing attention": ({}, (ATTENTION,), "15 self-attentions"),
    "no unet": ({}, ("model.diffusion_model.",), "'unet' is missing"),
    "no vae": ({}, ("first_stage_model.",), "'vae' is missing"),
    "no text encoder": ({}, ("cond_stage_model.",), "'text_encoder' is missing"),
}


@pytest.mark.parametrize("case", list(SPOILED))
def test_other_files_are_refused_by_what_they_are(state: State, tmp_path: Path, case: str) -> None:
    added, removed, message = SPOILED[case]
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(removed)} if removed else state
    save_file({**kept, **added}, tmp_path / "spoiled.safetensors")
    with pytest.raises(CheckpointError, match=message):
        SingleFileCheckpoint(tmp_path / "spoiled.safetensors", expected=TINY)


def test_prediction_type_in_the_metadata_is_read(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "v.safetensors", metadata={"modelspec.prediction_type": "v"})
    with pytest.raises(CheckpointError, match="v-prediction"):
        SingleFileCheckpoint(tmp_path / "v.safetensors", expected=TINY)


def test_another_text_width_is_refused(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "tiny.safetensors")
    with pytest.raises(CheckpointError, match="text of width 32"):
        Checkpoint.open(tmp_path / "tiny.safetensors")


def test_missing_tensor_is_named_when_its_component_is_loaded(state: State, tmp_path: Path) -> None:
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("output_blocks.11.0.in_layers.0.bias")}
    save_file(kept, tmp_path / "hole.safetensors")
    with pytest.raises(CheckpointError, match=r"unet lack up_blocks\.3\.resnets\.2\.norm1\.bias"):
        SingleFileCheckpoint(tmp_path / "hole.safetensors", expected=TINY).load_unet()


@pytest.mark.parametrize("size", [0, 4, 100, 100_000])
def test_truncated_file_is_refused(state: State, tmp_path: Path, size: int) -> None:
    save_file(state, tmp_path / "whole.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:size])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.open(cut)


@pytest.mark.full
def test_full_size_single_file_converts(tmp_path: Path) -> None:
    folder = write_checkpoint("sd15", tmp_path / "sd15", seed=0, dtype="float16")
    save_file(single_file_state(folder), tmp_path / "sd15.safetensors")
    assert_same_models(Checkpoint.open(tmp_path / "sd15.safetensors"), Checkpoint.open(folder))
