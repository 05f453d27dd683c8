"""What all recipes of a task share: published settings where there are any, ours with their reason elsewhere."""

from megatron.bridge.recipes.base.description import Description
from megatron.bridge.recipes.base.size import Size
from megatron.bridge.recipes.base.stated import Stated, stated

_LLAMA2 = "arXiv:2307.09288, section 2.2"
_LLAMA2_SFT = "arXiv:2307.09288, section 3.1"
_QLORA = "arXiv:2305.14314, appendix B"
# From here on models count as large.
LARGE = 30e9

_EVERY_TASK = {
    "model.params_dtype": Stated("bfloat16", "ours: what large models are trained in"),
    "train.micro_batch_size": Stated(1, "ours: the least memory"),
    "ddp.use_distributed_optimizer": Stated(True, "ours: arXiv:1910.02054 divides the optimizer's state at no cost"),
    "optimizer.use_distributed_optimizer": Stated(True, "ours: as in the section ddp"),
    "ddp.grad_reduce_in_fp32": Stated(True, "ours: sums over many ranks lose digits in bfloat16"),
}
_PRETRAIN = {
    **_EVERY_TASK,
    **stated(
        _LLAMA2,
        {
            "optimizer.adam_beta1": 0.9,
            "optimizer.adam_beta2": 0.95,
            "optimizer.weight_decay": 0.1,
            "optimizer.clip_grad": 1.0,
            "scheduler.lr_decay_style": "cosine",
        },
    ),
    "train.train_iters": Stated(10_000, "ours: a start; set it to the tokens you have"),
    "train.global_batch_size": Stated(8, "ours: for a try on one machine; `gpus=` raises it to about 4M tokens"),
    "dataset.split": Stated("99,1,0", "ours: a hundredth is kept for validation"),
}
_FINETUNE = {
    **_EVERY_TASK,
    **stated(
        _LLAMA2_SFT,
        {
            "optimizer.lr": 2e-5,
            "optimizer.weight_decay": 0.1,
            "train.global_batch_size": 64,
            "scheduler.lr_decay_style": "cosine",
        },
    ),
    **stated(_LLAMA2, {"optimizer.adam_beta1": 0.9, "optimizer.adam_beta2": 0.95, "optimizer.clip_grad": 1.0}),
    "optimizer.min_lr": Stated(0.0, "ours: the cosine ends at nothing"),
    "scheduler.lr_warmup_fraction": Stated(0.03, "ours: as much as in arXiv:2305.14314"),
    "train.train_iters": Stated(1000, "ours: a start; set it to about two passes over your rows"),
    "dataset.split": Stated("95,5,0", "ours: one row of twenty is kept for validation"),
    "model.calculate_per_token_loss": Stated(True, "ours: answers differ in length, and every token counts the same"),
}
_WITH_DROPOUT = ("lora", "dora")
_WITH_RANKS = (*_WITH_DROPOUT, "canonical_lora")
# What LoRA (arXiv:2106.09685) has otherwise than tuning of all weights.
_ADAPTED = stated(
    _QLORA,
    {
        "optimizer.adam_beta2": 0.999,
        "optimizer.clip_grad": 0.3,
        "optimizer.weight_decay": 0.0,
        "scheduler.lr_decay_style": "constant",
        "train.global_batch_size": 16,
    },
)


def pretraining(size: Size) -> Description:
    """From random weights, on text; as published where that is known."""
    length = Stated(min(8192, size.positions), "ours: as long as Llama 3 was trained on, arXiv:2407.21783, section 3.4")
    rate = 1.5e-4 if size.num_parameters >= LARGE else 3e-4
    settings = {**_PRETRAIN, "model.seq_length": length, "optimizer.lr": Stated(rate, _AS_LLAMA3), **size.pretraining}
    if "optimizer.min_lr" not in settings:
        lowest = 0.1 * settings["optimizer.lr"].value
        settings["optimizer.min_lr"] = Stated(lowest, f"ours: a tenth of optimizer.lr, as in {_LLAMA2}")
    if "scheduler.lr_warmup_iters" not in settings:
        settings.setdefault("scheduler.lr_warmup_fraction", Stated(0.01, "ours: a hundredth of the run"))
    return Description("pretrain", size.hf_config, size.home, settings)


_AS_LLAMA3 = "ours: as arXiv:2407.21783, table 3, has it for 8B and 70B"


def finetuning(size: Size) -> Description:
    """From given weights, on conversations; all weights are trained."""
    length = Stated(min(4096, size.positions), _LLAMA2_SFT)
    return Description("finetune", size.hf_config, size.home, {**_FINETUNE, "model.seq_length": length})


def adapting(size: Size, method: str = "lora") -> Description:
    """From given weights, on conversations; a PEFT method trains beside them."""
    large = size.num_parameters >= LARGE
    rate = stated(_QLORA, {"optimizer.lr": 1e-4 if large else 2e-4})
    ranks = stated(_QLORA, {"peft.dim": 64, "peft.alpha": 16}) if method in _WITH_RANKS else {}
    if method in _WITH_DROPOUT:
        ranks |= stated(_QLORA, {"peft.dropout": 0.05 if large else 0.1})
    if size.adapted_modules is not None:
        ranks["peft.target_modules"] = Stated(list(size.adapted_modules), "ours: the model's linear layers")
    chosen = {"peft": Stated(method, "ours: what the recipe is for")}
    return finetuning(size).having({**chosen, **_ADAPTED, **rate, **ranks})
