"""The layer shapes that the benchmarks measure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Shape:
    """One LoRA layer and one batch: M tokens, N output features, K input features, rank R."""

    M: int
    N: int
    K: int
    R: int

    def __post_init__(self) -> None:
        if min(self.M, self.N, self.K, self.R) < 1:
            raise ValueError(f"M, N, K and R must be at least 1, got {self}")

    def __str__(self) -> str:
        return f"M{self.M}-N{self.N}-K{self.K}-R{self.R}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """The shape written "M,N,K,R"; ValueError for anything else."""
        try:
            M, N, K, R = (int(part) for part in text.split(","))
        except ValueError:
            raise ValueError(f"expected a shape as M,N,K,R (four integers), got {text!r}") from None
        return cls(M, N, K, R)


@dataclass(frozen=True)
class GroupShape:
    """Layers that share an input: M tokens, output features ``widths``, K input features, each of rank R."""

    M: int
    widths: tuple[int, ...]
    K: int
    R: int

    def __post_init__(self) -> None:
        if min(self.M, *self.widths, self.K, self.R) < 1 or len(self.widths) < 2:
            raise ValueError(f"M, widths, K and R must be at least 1, of two or more layers, got {self}")

    @property
    def N(self) -> int:
        """Total output features of all layers."""
        return sum(self.widths)

    def __str__(self) -> str:
        return f"M{self.M}-N{'+'.join(map(str, self.widths))}-K{self.K}-R{self.R}"

    @classmethod
    def parse(cls, text: str) -> GroupShape:
        """The group written "M,N+N+N,K,R"; ValueError for anything else."""
        try:
            M, widths, K, R = text.split(",")
            numbers = int(M), tuple(int(width) for width in widths.split("+")), int(K), int(R)
        except ValueError:
            raise ValueError(f"expected a group as M,N+N+N,K,R (integers), got {text!r}") from None
        return cls(*numbers)


@dataclass(frozen=True)
class ModelShape:
    """A decoder layer of Llama 3's proportions on ``batch`` sequences; each linear layer has rank R.

    The rows of its results have the tokens as M, the sequence length as N and the hidden size as K.
    """

    batch: int
    sequence: int
    hidden: int
    R: int

    def __post_init__(self) -> None:
        if min(self.batch, self.sequence, self.hidden, self.R) < 1 or self.hidden % self.heads:
            raise ValueError(
                f"batch, sequence, hidden size (a multiple of 4 heads) and R must be at least 1, got {self}"
            )

    @property
    def M(self) -> int:
        return self.batch * self.sequence

    @property
    def N(self) -> int:
        return self.sequence

    @property
    def K(self) -> int:
        return self.hidden

    @property
    def heads(self) -> int:
        """Heads of 128 features as in the 8B model, of fewer in small ones; four times the kv_heads."""
        return max(4, self.hidden // 128)

    @property
    def kv_heads(self) -> int:
        return self.heads // 4

    @property
    def intermediate(self) -> int:
        """3.5 times the hidden size: 14336 in the 8B model."""
        return self.hidden * 7 // 2

    def __str__(self) -> str:
        return f"{self.batch}x{self.sequence}-K{self.hidden}-R{self.R}"

    @classmethod
    def parse(cls, text: str) -> ModelShape:
        """The layer written "BATCHxSEQUENCE,K,R"; ValueError for anything else."""
        try:
            tokens, hidden, R = text.split(",")
            batch, sequence = tokens.split("x")
            numbers = int(batch), int(sequence), int(hidden), int(R)
        except ValueError:
            raise ValueError(
                f"expected a decoder layer as BATCHxSEQUENCE,K,R (integers), got {text!r}"
            ) from None
        return cls(*numbers)


AnyShape = Shape | GroupShape | ModelShape


def parse(text: str) -> AnyShape:
    """The shape that ``text`` describes: M,N,K,R or M,N+N+N,K,R or BATCHxSEQUENCE,K,R."""
    kind = ModelShape if "x" in text else GroupShape if "+" in text else Shape
    return kind.parse(text)


# (N, K) of the linear layers of 7B to 70B models: attention output, grouped key/value, MLP up, MLP down.
LLM_FEATURES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (8192, 8192))
LLM_RANKS = (8, 16, 64, 128)
TRAINING_TOKENS = (512, 4096, 8192)
DECODE_TOKENS = (1, 16)

CPU_TOKENS = (1, 64, 512, 2048)
CPU_FEATURES = (384, 768, 1024)
CPU_RANKS = (8, 64)


def llm_shapes(tokens=TRAINING_TOKENS, features=LLM_FEATURES, ranks=LLM_RANKS) -> list[Shape]:
    """Every combination, each in the given order: ranks vary slowest, then tokens, then (N, K)."""
    return [Shape(M, N, K, R) for R, M, (N, K) in product(ranks, tokens, features)]


# Most informative first, so that a run that has to stop early has measured what matters most.
TRAINING_SHAPES = llm_shapes(tokens=(8192, 4096, 512), ranks=(16, 64, 128, 8))
DECODE_SHAPES = llm_shapes(tokens=DECODE_TOKENS, ranks=(16, 8, 64, 128))

# Square layers of small encoders, quick enough for two CPU cores.
CPU_SHAPES = [Shape(M, K, K, R) for K, M, R in product(CPU_FEATURES, CPU_TOKENS, CPU_RANKS)]

# For a dry run of the GPU script on a CPU; odd sizes on purpose.
TINY_SHAPES = [Shape(33, 40, 48, 4), Shape(5, 24, 17, 3)]

# As (widths, K): q/k/v of Llama 3 8B, its gate/up, and q/k/v of the 70B model.
LLM_GROUPS = (((4096, 1024, 1024), 4096), ((14336, 14336), 4096), ((8192, 1024, 1024), 8192))
GROUP_SHAPES = [
    GroupShape(M, widths, K, R)
    for R, M, (widths, K) in product((16, 64, 128), (8192, 4096, 512, *DECODE_TOKENS), LLM_GROUPS)
]

# q/k/v of a small encoder and of a small decoder with grouped heads, and gate/up.
CPU_GROUPS = (((768, 768, 768), 768), ((1024, 256, 256), 1024), ((1536, 1536), 512))
CPU_GROUP_SHAPES = [
    GroupShape(M, widths, K, R) for M, R, (widths, K) in product((1, 64, 512), (8, 64), CPU_GROUPS)
]
TINY_GROUP_SHAPES = [GroupShape(33, (40, 24, 16), 48, 4), GroupShape(16, (24, 9), 17, 3)]

# One layer of Llama 3 8B; the most informative first, as above.
MODEL_SHAPES = [ModelShape(b, s, 4096, 16) for b, s in ((2, 4096), (1, 4096), (4, 2048), (8, 512))]
CPU_MODEL_SHAPES = [ModelShape(b, s, 384, 16) for b, s in ((4, 128), (1, 64))]
TINY_MODEL_SHAPES = [ModelShape(2, 24, 32, 4)]
