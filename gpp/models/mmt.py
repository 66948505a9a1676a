"""A multi-modal transformer: one branch of transformer layers per modality, joined by a small head.

The paper's MMT (GraphPipe §7.1 and appendix): four branches of eight layers, hidden size 1024, 16 heads,
feed-forward size 4096, sequences of 256. A plain module: nothing in it knows of pipelines.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

PADDING = 0  # a token that is none: left out of the mean over a sequence


class Attention(nn.Module):
    """Self-attention of `heads` heads over (samples, sequence, hidden)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"heads must divide the hidden size: {heads} heads, hidden size {hidden}")
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape again."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class TransformerLayer(nn.Module):
    """Attention, then a GELU network on each token; both normalise first and add to their input."""

    def __init__(self, hidden: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads)
        self.ffn_norm = nn.LayerNorm(hidden)
        self.ffn = nn.Sequential(nn.Linear(hidden, ffn), nn.GELU(), nn.Linear(ffn, hidden))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(samples, sequence, hidden) to the same."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        x = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return x


class TokenEmbedding(nn.Module):
    """Tokens (samples, sequence) to (samples, sequence, hidden): what they are, where, and in what company.

    With `trigrams` > 0 each token also looks up itself and its next two in a table of that many rows. Trigrams
    share rows by their remainder, so a prime number of rows spreads them best. Bytes tell little alone: this
    spares the layers from learning spelling first.
    """

    def __init__(self, sequence: int, hidden: int, vocabulary: int, trigrams: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.token = nn.Embedding(vocabulary, hidden)
        self.trigram = nn.Embedding(trigrams, hidden) if trigrams else None
        self.position = nn.Parameter(torch.empty(sequence, hidden))
        for table in (self.token.weight, self.position, *([self.trigram.weight] if self.trigram else [])):
            nn.init.normal_(table, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        x = self.token(tokens) + self.position
        if self.trigram is None:
            return x
        second, third = (functional.pad(tokens[:, i:], (0, i), value=PADDING) for i in (1, 2))
        number = (tokens * self.vocabulary + second) * self.vocabulary + third
        return x + self.trigram(number % self.trigram.num_embeddings)


class Branch(nn.Module):
    """One modality: tokens (samples, sequence) to the mean of their encodings, (samples, hidden)."""

    def __init__(
        self, embedding: TokenEmbedding, layers: Iterable[TransformerLayer], norm: nn.LayerNorm
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, tokens: Tensor) -> Tensor:
        """Padding is a token like others to the attention, and left out of the mean."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        present = (tokens != PADDING).to(x.dtype).unsqueeze(-1)
        total: Tensor = (self.norm(x) * present).sum(1)
        return total / present.sum(1).clamp(min=1)


class MultiModalTransformer(nn.Module):
    """Classifies functions of a program by four sequences of tokens, one per modality.

    `sequences` gives the length of each. Raises ValueError if one is missing or unknown.
    """

    modalities = ("name", "signature", "docstring", "body")

    def __init__(
        self,
        sequences: Mapping[str, int],
        *,
        layers: int,
        hidden: int,
        heads: int,
        ffn: int,
        classes: int,
        vocabulary: int = 256,
        trigrams: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if sorted(sequences) != sorted(self.modalities):
            raise ValueError(
                f"sequences must give the lengths of {', '.join(self.modalities)}; "
                f"it gives those of {', '.join(sequences) or 'none'}"
            )
        self.branches = nn.ModuleDict(
            {
                modality: Branch(
                    TokenEmbedding(sequences[modality], hidden, vocabulary, trigrams),
                    [TransformerLayer(hidden, heads, ffn, dropout) for _ in range(layers)],
                    nn.LayerNorm(hidden),
                )
                for modality in self.modalities
            }
        )
        self.head = nn.Sequential(
            nn.Linear(len(self.branches) * hidden, hidden), nn.GELU(), nn.Linear(hidden, classes)
        )

    def forward(
        self, name: Tensor, signature: Tensor, docstring: Tensor, body: Tensor, label: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross entropy and the accuracy, means over the samples.

        Each modality is an int64 tensor (samples, its sequence length), `label` one of (samples,).
        """
        sequences = (name, signature, docstring, body)
        encoded = [branch(x) for branch, x in zip(self.branches.values(), sequences, strict=True)]
        logits = self.head(torch.cat(encoded, dim=-1))
        accuracy = (logits.argmax(-1) == label).to(logits.dtype).mean()
        return functional.cross_entropy(logits, label), {"accuracy": accuracy}
