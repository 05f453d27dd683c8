"""`docs/mimo-parity.md`, written from what was measured."""

from collections.abc import Mapping

from mimo_parity.cases import BF16, FP32
from mimo_parity.measured import MICROBATCHES, SAMPLES, STEPS
from mimo_parity.placed import Distance

_HEAD = f"""\
# MIMO parity

Made by `just mimo-parity`; not written by hand. A tiny random LLaVA (CLIP tower, MLP, Llama), or another model where a
line names one, is loaded from its Hugging Face folder at every placement and trained in float32 for {STEPS} steps of
{MICROBATCHES} micro-batches of {SAMPLES} samples, most of them with 0 to 2 images in a sample. The reference is
transformers' own model in a plain loop with `torch.optim.AdamW`. Each figure is the largest difference from it on any
rank: of the logits before the first step and the losses (absolute), of the gradient norms, the gradients of the first
step and the weights after the last one (all relative), the last two compared by transformers' names after an export. An
export right after the import gives every weight back bit for bit at every placement. Every run of the tests measures
some of the lines; it allows {FP32.loss:.0e} for losses and norms, {FP32.logits:.0e} for the rest.

`TP2`, `PP2`, `DP2`, `CP2` are sizes of tensor, pipeline, data and context parallelism, `SP` is sequence parallelism.
`1 + PP2` is an encoder on one rank and a language model on two others. `distributed` is the distributed optimizer with
overlapped gradient reduction; its gradients are sharded and not compared one by one. `settings by module` are another
learning rate and weight decay for the tower and for the projector, AdamW's parameter groups in the reference. The
`mixture of experts` is Mixtral's, `EP2` spreads it over two ranks, and its balancing loss is off, which transformers'
LLaVA lacks.

With `adapters` both modules have LoRA, with `DoRA` they have that: on attention and MLP of the language model, with a
pair of matrices for each of q, k and v, and on attention, MLP and projector of the encoder, by other ranks and alphas.
With `adapters on the encoder` the language model is frozen. The reference is Hugging Face peft on transformers' model,
from the folder that this side wrote; gradients are those of the adapters by the names of peft's files, weights those of
the merged model.

`packed` samples are of several documents each, with 0 to 2 images in a document; transformers' model is run on every
document by itself. Where ranks share sequences, their lengths are multiples of twice the number of these ranks.

A `ViT` is Megatron-Core's, which the encoder's tensor-parallel ranks divide; `of SigLIP`, where LLaVA takes the last
layer of that tower. Other towers are transformers' own modules, whole on every rank. Weights that no feature depends on
are left alone in a `ViT`, as torch leaves them; elsewhere they decay in the reference too, as in Megatron-Core.

In `bf16` both sides compute in bfloat16 and keep master weights in float32. They differ by rounding: {BF16.logits:.0e}
is allowed for logits and gradients, {BF16.loss:.0e} for losses, {BF16.norm:.0e} for norms, {BF16.weight:.0e} for
weights.
"""


def page(results: Mapping[str, Distance], versions: str) -> str:
    """The page's text: a line for every placement."""
    lines = [_HEAD, "| mode | placement | logits | loss | norm | gradients | weights |", "|---" * 7 + "|"]
    for name, each in results.items():
        mode, _, placement = name.partition(": ")
        gradient = f"{each.gradient:.0e}" if each.gradient else ""
        assert not each.changed, name
        figures = f"{each.logits:.0e} | {each.loss:.0e} | {each.norm:.0e} | {gradient} | {each.weight:.0e}"
        lines.append(f"| {mode} | {placement} | {figures} |")
    return "\n".join([*lines, "", f"Measured with {versions}."]) + "\n"
