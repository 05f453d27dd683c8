"""How the next token is chosen from its logits."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.bridge.errors import BridgeError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """The most likely token, or one drawn by its probability.

    The filters are transformers' own, in its order: repetition penalty, temperature, top-k, top-p.

    Args:
        temperature: logits are divided by it before a token is drawn; 0 takes the most likely token.
        top_k: draw from so many of the most likely tokens.
        top_p: draw from the fewest of the most likely tokens that have this probability together.
        repetition_penalty: logits of tokens that are there already are divided by it where positive, multiplied where
            negative (arXiv:1909.05858); 1 changes nothing.
        seed: of the draws; the same on every rank.

    Raises:
        BridgeError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = {
            "temperature": self.temperature < 0,
            "top_k": self.top_k is not None and self.top_k < 1,
            "top_p": self.top_p is not None and not 0 < self.top_p <= 1,
            "repetition_penalty": self.repetition_penalty <= 0,
        }
        for name in (name for name, is_wrong in wrong.items() if is_wrong):
            raise BridgeError(f"{name}={getattr(self, name)} is out of range: {_RANGES[name]}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise BridgeError("top_k and top_p are for tokens that are drawn; set a temperature, e.g. 1.0")

    def filters(self) -> Any:
        """transformers' processors of logits that these settings come to."""
        from transformers.generation import logits_process as found

        chosen = []
        if self.repetition_penalty != 1:
            chosen.append(found.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature not in (0, 1):
            chosen.append(found.TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            chosen.append(found.TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            chosen.append(found.TopPLogitsWarper(self.top_p))
        return found.LogitsProcessorList(chosen)


_RANGES = {
    "temperature": "0 takes the most likely token, 1 draws by the model's own probabilities",
    "top_k": "it is a number of tokens, at least 1",
    "top_p": "it is a probability above 0 and up to 1",
    "repetition_penalty": "it is above 0, and 1 changes nothing",
}


class Chooser:
    """Chooses token after token; every rank that holds the same logits chooses the same.

    Args:
        choice: the settings.
        device: where the logits are.
    """

    def __init__(self, choice: Choice, device: Any) -> None:
        import torch

        self._filters = choice.filters()
        self._draws = choice.temperature > 0
        self._generator = torch.Generator(device).manual_seed(choice.seed)

    def __call__(self, tokens: "Tensor", logits: "Tensor") -> "Tensor":
        """The next token of every row.

        Args:
            tokens: what is there, [batch, sequence].
            logits: of the last position, [batch, vocabulary], float32.

        Returns:
            [batch]
        """
        import torch

        scores = self._filters(tokens, logits)
        if not self._draws:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=self._generator)[:, 0]
