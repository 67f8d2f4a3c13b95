"""A graph's memory from shapes alone, of models that no test could load; benchmarks/trace_memory.py measures."""

from omegaconf import OmegaConf
from transformers import Gemma2Config, LlamaConfig

from shared.sae.sites import Sites
from shared.sae.variants.clt import CLTConfig
from shared.sae.variants.transcoder import TranscoderConfig
from stage_trace.config import TraceSchema
from stage_trace.plan import ModelShape, Plan, plan

WIDTH, LAYERS, LATENTS, K = 4096, 32, 131_072, 64


def llama_8b() -> ModelShape:
    return ModelShape.of(
        LlamaConfig(
            vocab_size=128_256, hidden_size=WIDTH, intermediate_size=14_336, num_hidden_layers=LAYERS,
            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
        )
    )  # fmt: skip


def planned(model: ModelShape, tokens: int, features: int = 4096, dtype: str = "bfloat16") -> Plan:
    cfg: TraceSchema = OmegaConf.structured(TraceSchema)
    cfg.max_features, cfg.batch, cfg.logits.most = features, 128, 10
    configs = [
        TranscoderConfig(
            d_in=WIDTH, d_out=WIDTH, d_latent=LATENTS, k=K, pre_bias=False,
            sites=Sites((f"layers.{layer}.mlp_in",), (f"layers.{layer}.mlp_out",)),
        )
        for layer in range(LAYERS)
    ]  # fmt: skip
    return plan(model, configs, tokens, dtype, cfg)


def test_f46_an_8b_model_is_planned_from_shapes_alone() -> None:
    model = llama_8b()
    assert model.parameters == 8_030_261_248
    short, long = planned(model, 32), planned(model, 512)
    assert short.phases["model"] == 2 * model.parameters
    assert short.latents == K * LAYERS * 32
    assert not short.is_guess
    assert short.peak < long.peak < 32e9  # a card of 32 GB, decoder rows left in their files
    assert planned(model, 512, features=64).phases["rows"] < long.phases["rows"]
    assert planned(model, 32, dtype="float32").phases["model"] == 4 * model.parameters
    # All decoders alone are 69 GB, and one encoder 2.1 GB: no phase holds more than one of them.
    assert all(size < 2 * model.parameters + 4e9 for size in short.phases.values())


def test_what_the_sweep_holds_depends_on_the_family() -> None:
    sandwich = Gemma2Config(
        num_hidden_layers=2, hidden_size=64, intermediate_size=64, num_attention_heads=4, head_dim=32, vocab_size=100
    )
    found = ModelShape.of(sandwich)
    assert (found.states, found.head_width) == (3, 32)
    assert llama_8b().states == 2


def test_latents_of_an_activation_without_k_are_a_guess() -> None:
    names = tuple(f"layers.{layer}.mlp_in" for layer in range(2))
    sites = Sites(names, tuple(name.replace("_in", "_out") for name in names))
    config = CLTConfig(
        read_widths=(8, 8), write_widths=(8, 8), d_latent=64, k=None, activation="relu", pre_bias=False, sites=sites
    )
    cfg: TraceSchema = OmegaConf.structured(TraceSchema)
    cfg.max_features, cfg.batch, cfg.logits.most = 100, 8, 2
    found = plan(llama_8b(), [config], 4, "float32", cfg)
    assert found.is_guess
    assert "for about 512 features" in found.lines()[0]
