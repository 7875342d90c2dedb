"""The layer shapes that the benchmarks measure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Shape:
    """One LoRA layer and batch: M tokens, N output features, K input features, rank R."""

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


# (N, K) of the linear layers of 7B to 70B models: attention output, grouped key/value, MLP up, MLP down.
LLM_FEATURES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (8192, 8192))
LLM_RANKS = (8, 16, 64, 128)
TRAINING_TOKENS = (512, 4096, 8192)
DECODE_TOKENS = (1, 16)

CPU_TOKENS = (1, 64, 512, 2048)
CPU_FEATURES = (384, 768, 1024)
CPU_RANKS = (8, 64)


def llm_shapes(tokens=TRAINING_TOKENS, features=LLM_FEATURES, ranks=LLM_RANKS) -> list[Shape]:
    """Every combination, in the order of the arguments: ranks vary slowest, then tokens, then (N, K)."""
    return [Shape(M, N, K, R) for R, M, (N, K) in product(ranks, tokens, features)]


# Most telling first, so that a run which ends inside its minutes has measured what matters most.
TRAINING_SHAPES = llm_shapes(tokens=(8192, 4096, 512), ranks=(16, 64, 128, 8))
DECODE_SHAPES = llm_shapes(tokens=DECODE_TOKENS, ranks=(16, 8, 64, 128))

# Square layers of small encoders, short enough for two CPU cores.
CPU_SHAPES = [Shape(M, K, K, R) for K, M, R in product(CPU_FEATURES, CPU_TOKENS, CPU_RANKS)]

# Odd sizes on purpose: for a dry run of the GPU script on a CPU.
TINY_SHAPES = [Shape(33, 40, 48, 4), Shape(5, 24, 17, 3)]
