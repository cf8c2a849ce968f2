from __future__ import annotations

import colorsys
import json
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from benchmarks.miniature import architecture, crew, train, training, vocabulary, wordmaps, world  # noqa: E402

NUMBERS = range(256)
TEST = architecture.SIZES["test"]


@pytest.fixture(scope="module")
def pictures() -> world.Pictures:
    return world.World(size=64).draw(NUMBERS)


def test_a_picture_is_drawn_again_from_its_number_alone(pictures: world.Pictures) -> None:
    again = world.World(size=64).draw([200, 3])
    assert torch.equal(again.images, pictures.images[[200, 3]])
    assert torch.equal(again.labels, pictures.labels[[200, 3]])
    assert again.captions == [pictures.captions[200], pictures.captions[3]]


def test_another_seed_draws_other_pictures(pictures: world.Pictures) -> None:
    other = world.World(size=64, seed=1).draw(range(8))
    assert other.captions != pictures.captions[:8]


def test_images_are_finite_and_in_range(pictures: world.Pictures) -> None:
    assert pictures.images.shape == (len(NUMBERS), 3, 64, 64)
    assert pictures.images.dtype == torch.float32
    assert pictures.images.isfinite().all()
    assert pictures.images.abs().max() <= 1


def test_every_pixel_belongs_to_exactly_one_part(pictures: world.Pictures) -> None:
    total = sum(pictures.mask(part).int() for part in world.PARTS)
    assert torch.equal(total, torch.ones_like(total))


@pytest.mark.parametrize("part", world.PARTS[1:])
def test_a_part_is_visible_exactly_where_a_word_of_the_caption_names_it(pictures: world.Pictures, part: str) -> None:
    areas = pictures.mask(part).sum((1, 2)).tolist()
    for area, word, caption in zip(areas, pictures.words(part), pictures.captions, strict=True):
        if word is None:
            assert area == 0, caption
            assert part not in caption.split(), caption
        else:
            assert area >= 3 * TEST.factor**2, f"{word}: {caption}"  # three cells of the latents
            assert caption.split().count(word) == 1


def test_captions_never_tell_a_look(pictures: world.Pictures) -> None:
    known = set(vocabulary.WORDS)
    assert not known & {*world.PATTERNS, "striped", "dotted", "red", "green", "blue"}
    for caption in pictures.captions:
        assert set(caption.split()) <= known, caption


def test_every_kind_occurs(pictures: world.Pictures) -> None:
    words = {word for caption in pictures.captions for word in caption.split()}
    assert {*world.PEOPLE, *world.HAIR, *world.HATS[1:], *world.EXPRESSIONS[1:], "glasses", "beard", "hand"} <= words
    assert pictures.people.style.unique().tolist() == list(range(len(world.STYLES)))
    assert pictures.people.looks["shirt"].pattern.unique().tolist() == list(range(len(world.PATTERNS)))


def test_both_sizes_show_the_same_picture(pictures: world.Pictures) -> None:
    large = world.World(size=128).draw(range(32))
    assert large.captions == pictures.captions[:32]
    halved = torch.nn.functional.avg_pool2d(large.images, 2)
    assert (halved - pictures.images[:32]).abs().mean() < 0.02
    cells = large.labels[:, ::2, ::2], large.labels[:, 1::2, 1::2]
    agree = (cells[0] == pictures.labels[:32]) | (cells[1] == pictures.labels[:32])
    assert agree.float().mean() > 0.98


@pytest.mark.parametrize("part", ["hat", "shirt", "hair", "hand", "face"])
def test_a_look_holds_wherever_a_plain_part_shows(pictures: world.Pictures, part: str) -> None:
    """The commonest colour of a plain part in a flat picture is its look's, left and right of the middle."""
    people = pictures.people
    look = people.looks[part]
    for row in torch.where((people.style == 0) & (look.pattern == 0))[0].tolist()[:20]:
        mask, image = pictures.mask(part)[row], (pictures.images[row] + 1) / 2
        for half in (slice(0, 32), slice(32, 64)):
            if mask[:, half].sum() > 48:
                found = image[:, :, half][:, mask[:, half]].median(1).values
                assert (found - look.first[row]).abs().max() < 0.08, (pictures.captions[row], found, look.first[row])


def test_held_out_looks_are_never_drawn_in_training() -> None:
    kept, drawn = (_look_bins(world.World(held_out=flag).people(range(4000)).looks["shirt"]) for flag in (True, False))
    assert len(kept) > 50
    assert not kept & drawn


def _look_bins(look: world.Look) -> set[tuple[int, int, int]]:
    """(pattern, first hue, second hue, or lightness where plain) in twelfths, of looks that are clear of the bins'
    edges.
    """
    bins = set()
    for kind, first, second in zip(look.pattern.tolist(), look.first.tolist(), look.second.tolist(), strict=True):
        hue, _, light = colorsys.rgb_to_hsv(*first)
        places = [12 * hue, 12 * (light if kind == 0 else colorsys.rgb_to_hsv(*second)[0])]
        if all(0.01 < place % 1 < 0.99 for place in places):
            bins.add((kind, *map(int, places)))
    return bins


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="size: 65"):
        world.World(size=65)


def test_every_word_is_one_token_and_other_text_falls_into_bytes() -> None:
    words = vocabulary.Vocabulary()
    ids = words.encode([" ".join(vocabulary.WORDS), "a häβ"])
    assert ids.shape == (2, 77)
    assert ids[0, 1 : len(vocabulary.WORDS) + 1].tolist() == [words.word(word) for word in vocabulary.WORDS]
    assert ids[0, 0] == words.start
    assert (ids[0, len(vocabulary.WORDS) + 1 :] == words.end).all()
    assert words.end not in ids[1, 1:6]


def test_word_positions_point_at_the_words_that_name_the_parts(pictures: world.Pictures) -> None:
    words = vocabulary.Vocabulary()
    ids = words.encode(pictures.captions)
    positions = wordmaps.word_positions(pictures, ids, words)
    for row, caption in enumerate(pictures.captions[:64]):
        for column, part in enumerate(world.PARTS):
            word = pictures.words(part)[row] if column else "start"
            if word is None:
                assert positions[row, column] == -1
            elif column:
                assert caption.split()[positions[row, column] - 1] == word
            else:
                assert positions[row, column] == 0


def test_maps_are_carried_along_the_self_attention_as_the_method_does() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(2, 16, 77, generator=generator).softmax(-1)
    places = torch.randn(2, 16, 16, generator=generator).softmax(-1)
    method = (places + places @ places + places @ places + places @ places) / 4 @ words
    torch.testing.assert_close(wordmaps.Layer(words, places).spread, method)
    torch.testing.assert_close(wordmaps.Layer(words, torch.eye(16).expand(2, -1, -1)).spread, words)
    alike = wordmaps.Layer(words, torch.full((2, 16, 16), 1 / 16)).spread
    torch.testing.assert_close(alike, words.mean(1, keepdim=True).expand_as(words))


def test_the_recorder_has_each_coarse_layer_and_changes_no_prediction() -> None:
    torch.manual_seed(0)
    size = architecture.SIZES["test"]
    unet = architecture.build_unet(size)
    inputs = torch.randn(2, 4, size.side, size.side), torch.tensor(5), torch.randn(2, 77, size.text_width)
    with torch.no_grad():
        plain = unet(*inputs).sample
        recorder = wordmaps.Recorder(unet, (size.side // 2) ** 2)
        torch.testing.assert_close(unet(*inputs).sample, plain, rtol=1e-4, atol=1e-5)
    layers = recorder.take()
    assert recorder.take() == []
    # 5 on the grids of S/2, 5 of S/4, 1 of S/8: those that the method segments by
    sides = [layer.words.shape[1] for layer in layers]
    assert sorted(sides) == sorted([(size.side // 2) ** 2] * 5 + [(size.side // 4) ** 2] * 5 + [(size.side // 8) ** 2])
    for layer in layers:
        n = layer.words.shape[1]
        assert layer.words.shape == (2, n, 77)
        assert layer.places.shape == (2, n, n)
        torch.testing.assert_close(layer.words.sum(2), torch.ones(2, n))
        torch.testing.assert_close(layer.places.sum(2), torch.ones(2, n))


def test_maps_that_are_the_truth_lie_inside_and_overlap_fully(pictures: world.Pictures) -> None:
    words = vocabulary.Vocabulary()
    positions = wordmaps.word_positions(pictures, words.encode(pictures.captions), words)
    shares = wordmaps.part_shares(pictures.labels, 64)  # [n,4096,parts]
    maps = torch.zeros(len(NUMBERS), 64 * 64, 77)
    for column in range(len(world.PARTS)):
        here = positions[:, column] >= 0
        maps[here, :, positions[here, column]] = shares[here, :, column]
    inside = wordmaps.inside([maps], positions, pictures.labels)
    assert torch.allclose(inside.nan_to_num(1.0), torch.ones_like(inside))
    found = wordmaps.label_map([maps], positions, 64)
    assert torch.equal(found, pictures.labels.long())
    assert wordmaps.overlap(found, pictures.labels)["hat"] == 1.0


def test_a_contest_is_lost_to_words_that_name_no_part() -> None:
    """A hat in the upper left quarter, named by the second word; the first word is an article, which no part has."""
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[:, :4, :4] = world.PARTS.index("hat")
    positions = torch.full((1, len(world.PARTS)), -1)
    positions[0, 0], positions[0, world.PARTS.index("hat")] = 0, 2
    hat = (labels == world.PARTS.index("hat")).float().flatten(1)
    maps = torch.ones(1, 64, 77)
    maps[:, :, 0], maps[:, :, 2] = 1.0 - hat, 0.1 + hat
    signal = torch.ones(1)

    def outcome() -> tuple[float, float]:
        loss = wordmaps.contest_loss([maps], positions, labels, signal, 8).item()
        found = wordmaps.label_map([maps], positions, 8)
        return loss, wordmaps.overlap(found, labels)["hat"]

    won, covered = outcome()
    assert covered == 1.0
    maps[:, :, 1] = 0.01 + hat  # looks there as well, and nowhere else
    lost, covered = outcome()
    assert covered == 0.0
    assert lost > won + 0.5
    assert wordmaps.contest_loss([maps], positions, labels, 0 * signal, 8).item() == 0.0


def _stages(*, total: int) -> tuple[training.AutoencoderStage, training.DenoiserStage]:
    plan = training.Plan(pictures=total, batch=4, rate=1e-3, warm_up=8, grounding=0.1)
    autoencoder = training.AutoencoderStage(TEST, plan, seed=0, device=torch.device("cpu"))
    vae = architecture.build_autoencoder(TEST).requires_grad_(False)
    return autoencoder, training.DenoiserStage(TEST, plan, vae, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("which", [0, 1], ids=["autoencoder", "denoiser"])
def test_a_resumed_run_is_bit_for_bit_the_run_that_was_never_stopped(tmp_path: Path, which: int) -> None:
    torch.manual_seed(7)
    straight = _stages(total=24)[which]
    losses = [straight.step()["loss"].item() for _ in range(6)]
    torch.manual_seed(7)
    first = _stages(total=24)[which]
    head = [first.step()["loss"].item() for _ in range(3)]
    first.save(tmp_path / "state")
    torch.manual_seed(7)
    second = _stages(total=24)[which]
    assert second.load(tmp_path / "state")
    tail = [second.step()["loss"].item() for _ in range(3)]
    assert losses == head + tail
    assert second.done
    for name, value in straight.average.items():
        assert torch.equal(value, second.average[name]), name
    for name, value in straight._parameters.items():
        assert torch.equal(value, second._parameters[name]), name


def test_a_run_of_another_seed_is_not_gone_on_with(tmp_path: Path) -> None:
    stage = _stages(total=24)[0]
    stage.save(tmp_path / "state")
    plan = replace(stage.plan)
    other = training.AutoencoderStage(TEST, plan, seed=1, device=torch.device("cpu"))
    with pytest.raises(SystemExit, match="seed"):
        other.load(tmp_path / "state")


def test_a_writer_killed_between_its_renames_leaves_the_former_state(tmp_path: Path) -> None:
    stage = _stages(total=24)[0]
    stage.step()
    stage.save(tmp_path / "state")
    (tmp_path / "state").rename(tmp_path / "state.old")
    again = _stages(total=24)[0]
    assert again.load(tmp_path / "state")
    assert again.seen == 4


def test_the_command_trains_both_stages_and_writes_a_folder_that_export_opens(tmp_path: Path) -> None:
    out, folder = tmp_path / "run", tmp_path / "model"
    small = ["--size", "test", "--out", str(out), "--pictures", "16", "--autoencoder-pictures", "16", "--threads", "1"]
    assert train.main([*small, "--sheet-every", "1000", "--export", str(folder)]) == 0
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    log = [json.loads(line) for line in (out / "denoiser" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["pictures"] == 16
    assert (out / "denoiser" / "sheets" / "00000016.png").is_file()
    assert (out / "denoiser" / "sheets" / "00000016-words.png").is_file()
    from diffusers import UNet2DConditionModel

    assert UNet2DConditionModel.from_pretrained(folder / "unet").config.sample_size == 16
    assert train.main([*small, "--minutes", "0"]) == 0  # nothing is left to do
    assert train.main([*small, "--minutes", "0", "--pictures", "32"]) == 3  # stopped before the end


def test_processes_together_take_the_steps_of_one_that_averages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["--size", "test", "--out", str(tmp_path), "--stage", "autoencoder", "--autoencoder-pictures", "24"]
    assert train.main([*small, "--processes", "2", "--threads", "1"]) == 0
    plan = replace(train.AUTOENCODER["test"], pictures=24)
    together = training.AutoencoderStage(TEST, plan, seed=0, device=torch.device("cpu"))
    assert together.load(tmp_path / "autoencoder" / "state")
    assert together.done
    alone = training.AutoencoderStage(TEST, plan, seed=0, device=torch.device("cpu"))
    loss_of, half = alone.loss, plan.batch // 2

    def both_halves(numbers: range, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        parts = [numbers[:half], numbers[half:]]
        losses = [loss_of(part, torch.Generator().manual_seed(2 * part[0]))[0] for part in parts]
        return torch.stack(losses).mean(), {}

    monkeypatch.setattr(alone, "loss", both_halves)
    before = {name: value.detach().clone() for name, value in alone._parameters.items()}
    while not alone.done:
        alone.step()
    for name, value in alone._parameters.items():
        torch.testing.assert_close(together._parameters[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert any(not torch.allclose(value, before[name], atol=1e-4) for name, value in alone._parameters.items())


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    assert [list(crew.Crew(rank, 2).part(range(4, 8))) for rank in (0, 1)] == [[4, 5], [6, 7]]
    with pytest.raises(ValueError, match="batch of 3 cannot be shared out among 2"):
        crew.Crew(0, 2).part(range(3))
