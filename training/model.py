"""A Qwen2 in plain torch, for training: each row of a batch has a prefix and many documents.

Its weights have the same names as in transformers, so checkpoints are interchangeable.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    vocab_size: int = 20_000
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    intermediate_size: int = 704
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    epsilon: float = 1e-6

    def config(self) -> dict[str, Any]:
        """The content of config.json.

        Embeddings and output weights are not tied: in tied ones, predicting tokens would dominate
        what an embedding says about the mood.
        """
        return {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
            "vocab_size": self.vocab_size, "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers, "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads, "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_positions, "rms_norm_eps": self.epsilon,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "tie_word_embeddings": False, "attention_dropout": 0.0, "dtype": "bfloat16",
            "initializer_range": 0.02, "sliding_window": None, "use_sliding_window": False,
            "use_cache": True, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
        }  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class RMSNorm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._epsilon)
        return (wide * scale * self.weight).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        size = shape.hidden_size
        self._num_heads = shape.num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(size, size) for _ in range(3))
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, mask: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            project(x).view(B, T, self._num_heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, rotation), _rotate(k, rotation)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(B, T, C))
        return out


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (
            nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False) for _ in range(2)
        )
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.epsilon)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.epsilon)
        self.mlp = MLP(shape)
        self._dropout = dropout

    def forward(self, x: Tensor, mask: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), mask, rotation)
        x = x + F.dropout(y, self._dropout, self.training)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + F.dropout(y, self._dropout, self.training)


class Decoder(nn.Module):
    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.epsilon)


class Qwen2(nn.Module):
    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape, self._dropout = shape, dropout
        self.model = Decoder(shape, dropout)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.ndim == 2:
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * shape.num_layers) ** (0.5 * out))

    def forward(self, ids: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        """Normalised hidden states (B, T, C).

        ids, positions, documents: (B, T). Document 0 is the row's prefix, to which all documents
        attend; -1 is padding.
        """
        T = ids.shape[1]
        same = documents[:, :, None] == documents[:, None, :]
        causal = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()
        mask = ((same | (documents == 0)[:, None, :]) & causal)[:, None]
        rotation = self._rotation(positions)
        x = F.dropout(self.model.embed_tokens(ids), self._dropout, self.training)
        for layer in self.model.layers:
            x = layer(x, mask, rotation)
        out: Tensor = self.model.norm(x)
        return out

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        size = self.shape.hidden_size // self.shape.num_heads
        steps = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
        angles = positions[:, None, :, None] * self.shape.rope_theta**-steps
        return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE (arXiv 2104.09864) in Qwen's form, which rotates the two halves against each other."""
    cos, sin = rotation
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
