"""The model's definition once more, slowly: one token after the other, each through all its loops.

Position-major, where the model is loop-major, so a token's keys must already be known for every loop when later tokens
ask: a query at loop t meets the keys that token s made at loop min(t, last loop of s). Shared with the model:
the noise generator; weights are read from its modules. One sequence at a time, float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from ritornello.config import ExitRule, ModelConfig
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.ops.noise import fold, normal

KNOWN = {
    "attention": ("gqa", "mla"),
    "injection": ("lti", "linear", "add", "none"),
    "halting": ("none", "act", "gate", "state_gate", "kl", "delta", "entropy"),
    "norm": ("pre", "pre_post", "sandwich"),
    "initial_state": ("zeros", "e", "noise"),
    "state_norm": ("none", "read", "loop"),
    "activation": ("swiglu", "relu2"),
}


def skip_unknown(config: ModelConfig) -> None:
    for name, known in KNOWN.items():
        if getattr(config, name) not in known:
            pytest.skip(f"the oracle does not define {name} = {getattr(config, name)!r} yet")


@dataclass
class Token:
    """entries[layer][loop]: the keys and values (per head) it left there."""

    position: int
    document: int
    chunk: int
    id: int
    entries: dict[int, list[tuple[list[Tensor], list[Tensor]]]] = field(default_factory=dict)


@dataclass
class Answer:
    logits: Tensor  # (T, V)
    loops_used: list[int]
    weights: list[list[float]]  # by token and loop
    states: list[list[Tensor]]  # by token and loop, (D,) or (streams, D)


def oracle(
    model: RecurrentDepthTransformer,
    tokens: Tensor,
    *,
    n_loops: Sequence[int],
    exit: ExitRule | None = None,
    documents: Sequence[int] | None = None,
    chunks: Sequence[int] | None = None,
    policy: str = "per_loop",
) -> Answer:
    """tokens (T,) or (T, C); n_loops: the budget of each. `chunks`: the pass that brought each token in, which matters
    to the cache policy `last` alone."""
    return _Oracle(model, exit, policy).run(
        tokens, n_loops, documents or [0] * len(tokens), chunks or [0] * len(tokens)
    )


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return x / (x.square().mean() + norm.eps).sqrt() * norm.weight


def linear(module: nn.Module, x: Tensor, table: int) -> Tensor:
    y = module.weight @ x
    if getattr(module, "bias", None) is not None:
        y = y + module.bias
    if getattr(module, "loop_A", None) is not None:
        y = y + module.loop_B[table] @ (module.loop_A[table] @ x)
    return y


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary embedding: channel i and channel i + half are one complex number."""
    half = len(x) // 2
    angle = torch.tensor([position * theta ** (-2 * i / len(x)) for i in range(half)], dtype=x.dtype)
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


class _Oracle:
    def __init__(self, model: RecurrentDepthTransformer, exit: ExitRule | None, policy: str) -> None:
        self.model, self.config, self.exit = model, model.config, exit
        self.policy = "first" if model.config.kv_sharing == "first" else policy
        self.tokens: list[Token] = []

    @torch.no_grad()
    def run(self, ids: Tensor, n_loops: Sequence[int], documents: Sequence[int], chunks: Sequence[int]) -> Answer:
        rows = []
        for i, budget in enumerate(n_loops):
            starts = [s for s in range(i + 1) if documents[s] == documents[i]]
            self.tokens.append(Token(i - starts[0], documents[i], chunks[i], int(ids[i].flatten()[0])))
            rows.append(self.token(ids[i], budget))
        logits, used, weights, states = zip(*rows, strict=True)
        return Answer(torch.stack(logits), list(used), list(weights), list(states))

    def token(self, ids: Tensor, budget: int) -> tuple[Tensor, int, list[float], list[Tensor]]:
        m = self.model
        x = sum(table.weight[i] for table, i in zip(m.embed_tokens, ids.reshape(-1), strict=True))
        x = x * self.config.embedding_scale
        for layer in m.prelude_layers:
            x = self.layer(layer, x, 0, 0, None)
        used, weights, states = 0, [], []
        if not self.config.is_plain:
            e = rms_norm(m.input_norm, x) if self.config.normalize_input else x
            x, used, weights, states = self.recur(e, budget)
        x = rms_norm(m.norm, x) if self.config.state_norm == "read" else x
        x = m.read_matrix.weight @ x if self.config.read_matrix else x
        for layer in m.coda_layers:
            x = self.layer(layer, x, 0, 0, None)
        done = self.config.state_norm == "loop" and not m.coda_layers
        return m.head_weight @ (x if done else rms_norm(m.norm, x)), used, weights, states

    def recur(self, e: Tensor, budget: int) -> tuple[Tensor, int, list[float], list[Tensor]]:
        c = self.config
        start = self.start(e)
        before = start
        h = start.expand(c.carry_streams, -1).clone()
        survival, weights, states = 1.0, [], []
        for loop in range(budget):
            h = self.loop(h, e, loop)
            now = h.mean(0)
            p = self.stopping(now, before, survival)
            stops = loop == budget - 1 or self.leaves(now, before, p, survival, loop)
            weights.append(survival if stops else p)
            survival -= weights[-1]
            states.append(now)
            before = now
            if stops:
                break
        mixture = sum(w * state for w, state in zip(weights, states, strict=True))
        return (mixture if c.read_out == "mixture" else before), len(states), weights, states

    def start(self, e: Tensor) -> Tensor:
        c = self.config
        if c.initial_state == "zeros":
            return torch.zeros_like(e)
        if c.initial_state == "e":
            return e
        key = torch.zeros((), dtype=torch.int64)
        for counter in (0, self.tokens[-1].position, 0):  # step, position, purpose
            key = fold(key, counter)
        keys = torch.stack([fold(key, channel) for channel in range(c.dim)])
        return c.noise_std * normal(keys).clamp(-3, 3).double()

    def loop(self, h: Tensor, e: Tensor, loop: int) -> Tensor:
        """h (streams, D)."""
        c, m = self.config, self.model
        table = min(loop, c.n_loops - 1)
        u = torch.stack([self.inject(stream, e) for stream in h])
        read = (
            u[0] if c.carry_streams == 1 else sum(r * stream for r, stream in zip(m.carry.read_weight, u, strict=True))
        )
        shift = m.loop_embedding_scale * m.loop_embedding.weight[table] if c.loop_embedding else None
        x = read
        for layer in m.recurrent:
            x = self.layer(layer, x, loop, table, shift)
        x = read + c.loop_scale[min(loop, 1)] * (x - read)
        if c.carry_streams == 1:
            h = x[None]
        else:
            mixing = m.carry.mixing.exp() / m.carry.mixing.exp().sum(1, keepdim=True)
            h = mixing @ u + torch.stack([w * (x - read) for w in m.carry.write_weight])
        if c.state_norm == "loop":
            h = torch.stack([rms_norm(m.norm, stream) for stream in h])
        if c.anchored:
            scores = (m.head_weight @ rms_norm(m.norm, h[0])).exp()
            h = rms_norm(m.anchor_norm, m.embed_tokens[0].weight.T @ (scores / scores.sum()))[None]
        return h

    def inject(self, h: Tensor, e: Tensor) -> Tensor:
        i, kind = self.model.injection, self.config.injection
        if kind == "none":
            return h
        if kind == "add":
            return h + e
        if kind == "linear":
            return i.weight @ torch.cat((h, e))
        step = (1 + i.dt.exp()).log()
        decay = self.config.rho_max * (-step * i.A_log.clamp(max=20).exp()).exp()
        return decay * h + step * (i.B @ e if self.config.injection_matrix else i.B * e)

    def layer(self, layer: nn.Module, x: Tensor, loop: int, table: int, shift: Tensor | None) -> Tensor:
        kind = self.config.norm
        for branch in ("attention", "ffn"):
            first = branch == "attention"
            y = rms_norm(layer.input_layernorm if first else layer.post_attention_layernorm, x)
            y = y if shift is None else y + shift
            y = self.attention(layer, y, loop, table) if first else self.ffn(layer.mlp, y, table)
            out = None if kind == "pre" else layer.attn_out_layernorm if first else layer.mlp_out_layernorm
            x = x + (rms_norm(out, y) if kind == "pre_post" else y)
            x = rms_norm(out, x) if kind == "sandwich" else x
        return x

    def attention(self, layer: nn.Module, x: Tensor, loop: int, table: int) -> Tensor:
        c, me = self.config, self.tokens[-1]
        make = self.gqa if c.attention == "gqa" else self.mla
        queries, keys, values = make(layer.self_attn, x, table)
        me.entries.setdefault(layer.layer, []).append((keys, values))
        seen = [self.entry(token, layer.layer, loop) for token in self.tokens if token.document == me.document]
        outputs = []
        for head, q in enumerate(queries):
            scores = torch.stack([q @ k[head] for k, _ in seen]) / math.sqrt(len(q))
            p = scores.exp() / scores.exp().sum()
            outputs.append(sum(w * v[head] for w, (_, v) in zip(p, seen, strict=True)))
        return linear(layer.self_attn.o_proj, torch.cat(outputs), table)

    def entry(self, token: Token, layer: int, loop: int) -> tuple[list[Tensor], list[Tensor]]:
        entries = token.entries[layer]
        if self.policy == "first":
            return entries[0]
        if self.policy == "last" and token.chunk != self.tokens[-1].chunk:
            return entries[-1]
        return entries[min(loop, len(entries) - 1)]

    def rotated(self, x: Tensor) -> Tensor:
        c = self.config
        return turned(x, self.tokens[-1].position, c.rope_theta) if c.positions == "rope" else x

    def gqa(self, a: nn.Module, x: Tensor, table: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        c = self.config
        queries = [self.rotated(q) for q in linear(a.q_proj, x, table).split(c.head_dim)]
        keys = [self.rotated(k) for k in linear(a.k_proj, x, table).split(c.head_dim)]
        if c.qk_norm:
            queries, keys = ([y / y.square().mean().sqrt() for y in heads] for heads in (queries, keys))
        values = list(linear(a.v_proj, x, table).split(c.head_dim))
        if a.layer in c.value_embeddings:
            rows = a.value_table.weight[self.tokens[-1].id].split(c.head_dim)
            for head, row in enumerate(rows):
                gate = 2 / (1 + (-(a.value_gate.weight[head] @ x[:32])).exp())
                values[head] = values[head] + gate * row
        group = c.n_heads // c.n_kv_heads
        return queries, [keys[h // group] for h in range(c.n_heads)], [values[h // group] for h in range(c.n_heads)]

    def mla(self, a: nn.Module, x: Tensor, table: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        c, nope = self.config, self.config.qk_nope_head_dim
        q = (
            linear(a.q_b_proj, rms_norm(a.q_a_layernorm, a.q_a_proj.weight @ x), table)
            if c.q_lora_rank
            else linear(a.q_proj, x, table)
        )
        queries = [torch.cat((h[:nope], self.rotated(h[nope:]))) for h in q.split(nope + c.qk_rope_head_dim)]
        latent = a.kv_a_proj_with_mqa.weight @ x
        shared = self.rotated(latent[c.kv_lora_rank :])
        heads = (a.kv_b_proj.weight @ rms_norm(a.kv_a_layernorm, latent[: c.kv_lora_rank])).split(nope + c.v_head_dim)
        return queries, [torch.cat((h[:nope], shared)) for h in heads], [h[nope:] for h in heads]

    def ffn(self, mlp: nn.Module, x: Tensor, table: int) -> Tensor:
        if not hasattr(mlp, "router"):
            up = linear(mlp.up_proj, x, table)
            relu2 = self.config.activation == "relu2"
            hidden = up.clamp(min=0) ** 2 / 2 if relu2 else swiglu(linear(mlp.gate_proj, x, table), up)
            return linear(mlp.down_proj, hidden, table)
        y = torch.zeros_like(x) if mlp.shared_experts is None else self.ffn(mlp.shared_experts, x, table)
        for expert, weight in self.choices(mlp.router, x, table):
            gate, up = mlp.experts.gate_up_proj[expert].chunk(2)
            y = y + weight * (mlp.experts.down_proj[expert] @ swiglu(gate @ x, up @ x))
        return y

    def choices(self, router: nn.Module, x: Tensor, table: int) -> list[tuple[int, Tensor]]:
        """The k experts of a token and their weights."""
        c = self.config
        logits = router.weight @ x
        bias = router.e_score_correction_bias
        bias = bias[table] if c.router_bias_per_loop else bias
        sigmoid = c.router_score == "sigmoid"
        scores = 1 / (1 + (-logits).exp()) if sigmoid else logits.exp() / logits.exp().sum()
        preference = ((scores if sigmoid else logits) + bias).tolist()
        size = c.n_experts // c.n_expert_groups
        groups = [list(range(g * size, (g + 1) * size)) for g in range(c.n_expert_groups)]
        groups.sort(key=lambda group: -sum(sorted((preference[i] for i in group), reverse=True)[:2]))
        allowed = [i for group in groups[: c.n_active_groups] for i in group]
        chosen = sorted(allowed, key=lambda i: -preference[i])[: c.n_active_experts]
        total = sum(scores[i] for i in chosen) if c.normalize_expert_weights else 1.0
        return [(i, scores[i] / total * c.router_scale) for i in chosen]

    def prediction(self, h: Tensor) -> Tensor:
        """The probe's log-probabilities."""
        probe = self.model.probe
        return (self.model.head_weight @ rms_norm(probe.norm, probe.translator.weight @ h)).log_softmax(0)

    def kl(self, now: Tensor, before: Tensor) -> float:
        p, q = self.prediction(now), self.prediction(before)
        return float((p.exp() * (p - q)).sum())

    def entropy(self, now: Tensor) -> float:
        p = self.prediction(now)
        return -float((p.exp() * p).sum())

    def stopping(self, now: Tensor, before: Tensor, survival: float) -> float:
        """The probability of stopping at this loop."""
        c, head = self.config, self.model.halting.head
        if self.exit is not None and self.exit.rule in ("delta", "kl", "entropy"):
            return 0.0  # a training-free rule leaves the head out
        if c.halting in ("act", "state_gate"):
            p = float((head.linear.weight[0] @ now + head.linear.bias[0]).sigmoid())
            return min(p, survival) if c.halting == "act" else p * survival
        if c.halting == "gate":
            cosine = float(now @ before / max(float(now.norm() * before.norm()), 1e-16))
            features = [math.log(max(self.kl(now, before), 1e-8)), self.entropy(now), 1 - cosine]
            x = head.hidden.weight @ torch.tensor(features, dtype=now.dtype) + head.hidden.bias
            x = x * (1 + (x / math.sqrt(2)).erf()) / 2
            return survival * float((head.out.weight[0] @ x + head.out.bias[0]).sigmoid())
        return 0.0

    def leaves(self, now: Tensor, before: Tensor, p: float, survival: float, loop: int) -> bool:
        if self.exit is None or loop + 1 < self.exit.min_loops:
            return False
        threshold = self.exit.threshold
        match self.exit.rule:
            case "hazard":
                return p / survival >= threshold
            case "cumulative":
                return 1 - survival + p >= threshold
            case "delta":
                return float((now - before).norm() / now.norm()) < threshold
            case "kl":
                return self.kl(now, before) < threshold
            case "entropy":
                return self.entropy(now) < threshold
            case unknown:
                pytest.skip(f"the oracle does not define exit rule {unknown!r} yet")
