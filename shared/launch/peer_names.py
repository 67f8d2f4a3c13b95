"""What SAELens, sparsify, dictionary_learning and TransformerLens call our keys and sites, so as to suggest ours."""

import re

# Theirs to ours; what a stage does not have is not suggested there.
KEYS = {
    "act": "sae.activation",
    "activation_fn": "sae.activation",
    "architecture": "sae.activation",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "buffer_size": "stream.mix_contexts",
    "checkpoint_path": "out_dir",
    "context_size": "packing.seq_len",
    "ctx_len": "packing.seq_len",
    "d_hidden": "sae.d_latent",
    "d_sae": "sae.d_latent",
    "dataset": "corpus.path",
    "dataset_path": "corpus.path",
    "dead_feature_threshold": "sae.dead_after_tokens",
    "dead_feature_window": "sae.dead_after_tokens",
    "dict_size": "sae.d_latent",
    "dictionary_size": "sae.d_latent",
    "expansion_factor": "sae.expansion",
    "grad_acc_steps": "optim.micro_batch",
    "hook_layer": "hook",
    "hook_name": "hook",
    "hookpoint": "hook",
    "hookpoints": "hook",
    "l0_coefficient": "sae.penalty_weight",
    "l1_coefficient": "sae.penalty_weight",
    "l1_penalty": "sae.penalty_weight",
    "layer": "hook",
    "learning_rate": "optim.lr",
    "lr_decay_steps": "schedule.decay",
    "lr_warm_up_steps": "schedule.warmup",
    "lr_warmup_steps": "schedule.warmup",
    "micro_acc_steps": "optim.micro_batch",
    "model_name": "model.path",
    "n_tokens": "schedule.tokens",
    "normalize_activations": "sae.normalisation",
    "normalize_decoder": "sae.unit_norm_decoder",
    "num_latents": "sae.d_latent",
    "num_tokens": "schedule.tokens",
    "optimizer": "optim.kind",
    "run_name": "name",
    "save_dir": "out_dir",
    "sparsity_penalty": "sae.penalty_weight",
    "submodule_name": "hook",
    "train_batch_size_tokens": "stream.batch_size",
    "training_tokens": "schedule.tokens",
    "wandb_project": "logger.project",
    "warmup_steps": "schedule.warmup",
}
SITES = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "ln1.hook_normalized": "attn_in",
    "ln2.hook_normalized": "mlp_in",
    "self_attn": "attn_out",
    "mlp": "mlp_out",
    "": "resid_post",  # a decoder layer's own output
}
LAYER = re.compile(r"(?:model\.)?(?:blocks|layers|h)\.(\d+)\.?(.*)")


def site_of(name: str) -> str | None:
    """Our name of a site in theirs: ``layers.2.resid_post`` for ``blocks.2.hook_resid_post``; None for others."""
    found = LAYER.fullmatch(name)
    site = SITES.get(found[2]) if found else None
    return None if found is None or site is None else f"layers.{found[1]}.{site}"
