"""A multi-modal transformer: one branch of transformer layers per modality, joined by a small head.

The paper's MMT (GraphPipe §7.1, A.2) has four branches of eight layers, hidden size 1024, 16 heads,
feed-forward size 4096 and sequences of 256; where search times are compared, two branches. A plain module:
nothing in it knows of pipelines.
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

    With `trigrams` > 0 each token is also looked up together with the next two, in a table of that many rows
    that trigrams share by remainder (a prime number spreads them best). A byte alone says little: this spares
    the layers from learning to spell.
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
        x: Tensor = self.token(tokens) + self.position
        if self.trigram is None:
            return x
        padded = functional.pad(tokens, (0, 2), value=PADDING)
        number = (tokens * self.vocabulary + padded[:, 1:-1]) * self.vocabulary + padded[:, 2:]
        result: Tensor = x + self.trigram(number % self.trigram.num_embeddings)
        return result


class Branch(nn.Module):
    """One modality: tokens (samples, sequence) to (samples, hidden), from the mean of their encodings."""

    def __init__(self, embedding: TokenEmbedding, layers: Iterable[TransformerLayer], hidden: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU())

    def forward(self, tokens: Tensor) -> Tensor:
        """Padding is a token like others to the attention, and left out of the mean."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        present = (tokens != PADDING).to(x.dtype).unsqueeze(-1)
        mean = (x * present).sum(1) / present.sum(1).clamp(min=1)
        result: Tensor = self.out(self.norm(mean))
        return result


class MultiModalTransformer(nn.Module):
    """Classifies functions of a program by up to four sequences of tokens, one per modality.

    `sequences` gives the modalities' lengths: which of name, signature, docstring and body there are, and a
    branch for each. Raises ValueError if another is named, or none.
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
        if not sequences or not set(sequences) <= set(self.modalities):
            raise ValueError(
                f"sequences must give lengths of some of {', '.join(self.modalities)}; "
                f"it names {', '.join(sequences) or 'none'}"
            )
        self.branches = nn.ModuleDict(
            {
                modality: Branch(
                    TokenEmbedding(sequences[modality], hidden, vocabulary, trigrams),
                    [TransformerLayer(hidden, heads, ffn, dropout) for _ in range(layers)],
                    hidden,
                )
                for modality in self.modalities
                if modality in sequences
            }
        )
        self.head = nn.Linear(len(self.branches) * hidden, classes)

    def forward(
        self,
        name: Tensor | None = None,
        signature: Tensor | None = None,
        docstring: Tensor | None = None,
        body: Tensor | None = None,
        *,
        label: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross entropy and the accuracy, means over the samples.

        Each modality is an int64 tensor (samples, its sequence length), `label` one of (samples,). Raises
        ValueError unless the modalities given are those that have a branch.
        """
        sequences = {"name": name, "signature": signature, "docstring": docstring, "body": body}
        given = {modality: tokens for modality, tokens in sequences.items() if tokens is not None}
        if list(given) != list(self.branches):
            raise ValueError(f"the branches are {', '.join(self.branches)}; given are {', '.join(given)}")
        encoded = [self.branches[modality](tokens) for modality, tokens in given.items()]
        logits = self.head(torch.cat(encoded, dim=-1))
        accuracy = (logits.argmax(-1) == label).to(logits.dtype).mean()
        return functional.cross_entropy(logits, label), {"accuracy": accuracy}
