"""The 1B configuration under the whole trainer, against a bare torch script and the card's peak, on one GPU.

The bare script is what one writes in an afternoon: the same model with its weights in bf16, torch.compile, cuDNN
attention on whole rows, torch's fused AdamW, random tokens, no data, no metrics. The trainer keeps fp32 master weights,
fp32 gradients and exact clipping, and reads real rows: of one document each, as the script does, and packed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from record import record
from torch import Tensor, nn
from training import one_document, train

PLAIN = "trainer, packed, 8 a step, without the kernels"
WIDTH, HIDDEN, DEPTH, HEADS, KV_HEADS, VOCABULARY, LENGTH = 2048, 8192, 16, 32, 8, 128256, 8192
PEAK = 989.5e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--only", nargs="*", help="names of settings; default: all")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.bare:
        print(json.dumps(bare(parsed.steps)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, overrides in settings(folder).items():
            if parsed.only and name not in parsed.only:
                continue
            try:
                rows.append({"setting": name, **measure(name, overrides, folder, parsed.steps)})
            except (subprocess.CalledProcessError, RuntimeError) as error:
                print(f"{name} failed: {error} {(getattr(error, 'stdout', '') or '')[-1500:]}")
            print(rows[-1:], flush=True)
    record("train_1b", rows, shapes="Llama-3.2-1B, sequence 8192, bf16 products")


def settings(folder: Path) -> dict[str, list[str] | None]:
    """Overrides of configs/llama_1b.yaml by name; None: the bare script."""
    whole = [one_document(folder), "data.held_out=0"]
    return {
        "bare script, 2 rows a step": None,
        "trainer, whole rows, 2 a step": [*whole, "train.batch=2"],
        "trainer, whole rows, 8 a step": whole,
        "trainer, packed, 8 a step": [],
        PLAIN: [],
        "trainer, packed, keep 1": ["train.recompute=selective", "train.keep=1"],
        "trainer, packed, block": ["train.recompute=block"],
        "trainer, packed, selective": ["train.recompute=selective"],
        "trainer, packed, offload": ["train.recompute=offload"],
    }


def measure(name: str, overrides: list[str] | None, folder: Path, steps: int) -> dict[str, float | str]:
    """Medians over the later steps; MFU as the trainer counts it."""
    if overrides is None:
        command = [sys.executable, __file__, "--bare", "--steps", str(steps)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found: dict[str, float | str] = json.loads(said.stdout.strip().splitlines()[-1])
        return found
    lines = train(folder, name, steps, overrides, plain=name == PLAIN)
    later = lines[len(lines) // 3 :]
    speed = median(line["tokens_per_second"] for line in later)
    return {
        "tokens/s": speed,
        "MFU %": 100 * median(line["mfu"] for line in later),
        "GB": max(line["memory_gb"] for line in lines),
        "ms/16k tokens": 16384 / speed * 1e3,
        "loss": lines[-1]["loss"],
    }


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        key_dim = WIDTH // HEADS
        self.norm_a, self.norm_b = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * key_dim, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        key_dim = WIDTH // HEADS
        q, k, v = self.qkv(self.norm_a(x)).unflatten(-1, (-1, key_dim)).split([HEADS, KV_HEADS, KV_HEADS], dim=2)
        q, k = (self._turn(y, cos, sin).transpose(1, 2) for y in (q, k))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, up = self.up(self.norm_b(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)

    @staticmethod
    def _turn(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = y.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(y.dtype)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, tokens: Tensor, labels: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.cross_entropy((self.norm(x) @ self.embed.weight.T).flatten(0, 1), labels.flatten())


def bare(steps: int) -> dict[str, float | str]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Bare().to(torch.bfloat16)
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.02) if weight.dim() > 1 else nn.init.ones_(weight)
        pairs = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
        angles = (torch.arange(LENGTH)[:, None] * pairs)[None, :, None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    compiled = torch.compile(model)
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        tokens = torch.randint(VOCABULARY, (2, LENGTH + 1), device="cuda")  # learnt by heart, a batch costs less power
        loss = compiled(tokens[:, :-1], tokens[:, 1:], angles.cos(), angles.sin())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    seconds = median(times[len(times) // 3 :])
    weights = sum(w.numel() for w in model.parameters())
    forward = 2 * 2 * LENGTH * weights + DEPTH * 2 * 4 * LENGTH * (LENGTH + 1) // 2 * WIDTH
    memory = torch.cuda.max_memory_allocated() / 1e9
    speed = 2 * LENGTH / seconds
    used = 100 * 3 * forward / seconds / PEAK
    return {"tokens/s": speed, "MFU %": used, "GB": memory, "ms/16k tokens": 1e3 * seconds, "loss": loss.item()}


if __name__ == "__main__":
    main()
