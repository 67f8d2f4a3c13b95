"""Sounds and images: read exactly, refused by name, and harvested as a plain loop with the model's processor would."""

import copy
import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import granary
from shared.basics.errors import GranaryError
from shared.lm import capture
from shared.lm.modulepoint import ModulePoint
from shared.lm.recorded import without_next_token
from shared.store import Store
from stage_harvest.config import AudioCorpus
from stage_harvest.corpus.media import read_wav

RATE = 16_000
SIZE = {"height": 16, "width": 16}
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def vit() -> tuple[Any, Any]:
    return ViTForImageClassification(ViTConfig(**TOWER)), ViTImageProcessorPil(size=SIZE)


def clip() -> tuple[Any, Any]:
    text = {key: value for key, value in TOWER.items() if "_size" not in key or key.startswith(("hidden", "inter"))}
    config = CLIPConfig(text_config={**text, "vocab_size": 20}, vision_config=TOWER, projection_dim=8)
    return CLIPModel(config), CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIZE)


def whisper() -> tuple[Any, Any]:
    config = WhisperConfig(
        vocab_size=40, d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=50, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config), WhisperFeatureExtractor(feature_size=8, chunk_length=1)


def wav2vec2() -> tuple[Any, Any]:
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(40, 8), conv_kernel=(80, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, vocab_size=12, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Wav2Vec2ForCTC(config), Wav2Vec2FeatureExtractor()


MODELS: dict[str, tuple[Any, str]] = {
    "vit": (vit, "layers.1"), "clip": (clip, "encoder.layers.0"), "whisper": (whisper, "layers.1"),
    "wav2vec2": (wav2vec2, "encoder.layers.0"),
}  # fmt: skip


def wav(samples: np.ndarray, width: int = 2, channels: int = 1, rate: int = RATE) -> bytes:
    """A WAV file of whole numbers of so many bytes."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        if width == 1:
            file.writeframes((samples + 128).astype(np.uint8).tobytes())
        else:
            parts = samples.astype("<i4").view(np.uint8).reshape(-1, 4)
            file.writeframes(parts[:, :width].tobytes())
    return stream.getvalue()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_a_sound_is_what_was_written(width: int) -> None:
    most = 2 ** (8 * width - 1)
    samples = np.random.default_rng(0).integers(-most, most, 64)
    found = read_wav(wav(samples, width), "it")
    np.testing.assert_allclose(found.samples, samples / most, rtol=1e-6, atol=1e-7)
    stereo = read_wav(wav(samples, width, channels=2, rate=8000), "it")
    np.testing.assert_allclose(stereo.samples, samples.reshape(-1, 2).mean(1) / most, rtol=1e-6, atol=1e-7)
    assert (found.rate, stereo.rate) == (RATE, 8000)
    whole = wav(samples, width)
    torn = (whole[:20], whole[:44], whole.replace(b"WAVE", b"EVAW"), whole[:20] + b"\3" + whole[21:])
    for broken in (b"", b"RIFF", *torn):
        with pytest.raises(GranaryError, match=r"it is no WAV file|it holds no sound"):
            read_wav(broken, "it")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, one of sounds, and a column of each."""
    folder, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(1)
    columns: dict[str, list[Any]] = {"image": [], "audio": []}
    for name in ("images", "audio"):
        (folder / name).mkdir()
    for number in range(5):
        image = Image.fromarray(rng.integers(0, 255, (20 + number, 30, 3), np.uint8))
        image.save(folder / f"images/{number}.png")
        columns["image"].append({"bytes": (folder / f"images/{number}.png").read_bytes(), "path": "x.png"})
        sound = wav(rng.integers(-9000, 9000, 3000 + 2000 * number))
        (folder / f"audio/{number}.wav").write_bytes(sound)
        samples = read_wav(sound, "").samples
        value = {"bytes": sound, "path": None} if number % 2 else {"array": samples.tolist(), "sampling_rate": RATE}
        columns["audio"].append({"bytes": None, "path": None, "array": None, "sampling_rate": None} | value)
    for name, column in columns.items():
        pyarrow.parquet.write_table(pyarrow.table({name: [*column, None]}), folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def composed() -> Any:
    """A configuration that each harvest changes a copy of."""
    small = {"packing.seq_len": 16, "store.dtype": "float32", "store.shard_contexts": 2, "store.heldout_fraction": 0}
    return granary.configure("harvest", corpus="images", **{"corpus.files": "?"}, **small)


def harvest(composed: Any, folder: Path, name: str, files: Path, column: str | None = None) -> Store:
    cfg = copy.deepcopy(composed)
    if name not in ("vit", "clip"):
        cfg.corpus = AudioCorpus(files="?", column=None, contexts=None, shuffle=False, shuffle_window=1)
    cfg.run_dir, cfg.store.url, cfg.spool_dir = str(folder / "run"), str(folder / f"store-{files.name}"), str(folder)
    cfg.model.path, cfg.hooks.modules = str(folder / name), MODELS[name][1]
    cfg.corpus.files, cfg.corpus.column = str(files), column
    return granary.harvest(cfg)


def saved(folder: Path, name: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, processor = MODELS[name][0]()
    model.save_pretrained(folder / name)
    processor.save_pretrained(folder / name)
    return model.eval(), processor


@pytest.mark.parametrize(
    "name", ["vit", "whisper", *(pytest.param(name, marks=pytest.mark.slow) for name in ("clip", "wav2vec2"))]
)
def test_a_store_holds_what_a_plain_loop_gives(composed: Any, corpora: Path, tmp_path: Path, name: str) -> None:
    model, processor = saved(tmp_path, name)
    is_image = name in ("vit", "clip")
    folder, column = corpora / ("images" if is_image else "audio"), "image" if is_image else "audio"
    plain = {"vit": lambda: model.vit, "clip": lambda: model.vision_model, "whisper": lambda: model.model.encoder,
             "wav2vec2": lambda: model.wav2vec2}[name]()  # fmt: skip
    point, wanted, real = ModulePoint.parse(MODELS[name][1]), [], []
    for file in sorted(folder.iterdir()):
        if is_image:
            inputs = processor(images=[Image.open(file)], return_tensors="pt")
        else:
            sound = read_wav(file.read_bytes(), "")
            inputs = processor(sound.samples, sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad(), capture(plain, [point]) as captured:
            plain(**inputs)
        wanted.append(captured[point][0])
        rows = len(wanted[-1])
        seconds = 1.0 if name != "whisper" else len(sound.samples) / RATE
        real.append(np.arange(rows) < np.ceil(seconds * rows))
    total = sum(map(len, wanted))
    for files, named in ((folder, None), (corpora / f"{column}.parquet", column)):
        store = harvest(composed, tmp_path, name, files, named)
        contexts = range(store.num_contexts)
        found = torch.cat([store.read_context(point.site, context) for context in contexts])
        torch.testing.assert_close(found[:total], torch.cat(wanted), rtol=1e-4, atol=1e-5)
        tokens, mask = (getattr(store, one)(contexts).reshape(-1)[:total] for one in ("tokens", "mask"))
        assert tokens.tolist() == [number for rows in wanted for number in range(len(rows))]
        assert mask.tolist() == np.concatenate(real).tolist()
        assert without_next_token(store) == f"an encoder ({name})"


def test_what_can_not_be_read_is_one_line(composed: Any, corpora: Path, tmp_path: Path) -> None:
    saved(tmp_path, "vit")
    saved(tmp_path, "whisper")
    (tmp_path / "slow.wav").write_bytes(wav(np.zeros(100), rate=8000))
    (tmp_path / "torn.png").write_bytes((corpora / "images/0.png").read_bytes()[:60])
    (tmp_path / "whisper/preprocessor_config.json").rename(tmp_path / "aside.json")
    with pytest.raises(GranaryError, match="whisper has no processor of audio that loads"):
        harvest(composed, tmp_path, "whisper", corpora / "audio")
    (tmp_path / "aside.json").rename(tmp_path / "whisper/preprocessor_config.json")
    with pytest.raises(GranaryError, match=r"slow\.wav has 8,000 samples per second, and the model wants 16,000"):
        harvest(composed, tmp_path, "whisper", tmp_path / "slow.wav")
    with pytest.raises(GranaryError, match=r"torn\.png is no image that can be read"):
        harvest(composed, tmp_path, "vit", tmp_path / "torn.png")
    with pytest.raises(GranaryError, match="has no column 'sound': there are audio"):
        harvest(composed, tmp_path, "whisper", corpora / "audio.parquet", "sound")
    with pytest.raises(GranaryError, match="row 1 is no WAV file"):
        harvest(composed, tmp_path, "whisper", corpora / "image.parquet", "image")
