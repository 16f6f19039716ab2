"""Hosts, kernels and a loop for the tests of Kasmina."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

from esper.config import KasminaConfig
from esper.kasmina import wrap
from esper.leyline import (
    Action,
    BlendStrategy,
    BlueprintIR,
    Check,
    Evidence,
    EvidenceKind,
    KasminaControlCommand,
    Node,
    NotFoundError,
    Pipeline,
    SeedStage,
    SiteKind,
    SiteSignature,
    ValidationReport,
    compile_key,
)
from esper.leyline.canonical import canonical_hash
from esper.leyline.container import KernelManifest, kernel_id_of, pack
from esper.leyline.lower import lower
from esper.leyline.ops import count_flops, count_parameters, memory_bytes, needs_neighbour
from esper.urza.library import load_library

torch.set_num_threads(1)  # several threads on tiny tensors only wait for each other

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
SHADOW_GAIN = Evidence(kind=EvidenceKind.SHADOW, gain=0.5, stderr=0.1, baseline=1.0, candidate=0.5, num_pairs=100)

# ---------------------------------------------------------------- hosts


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        x = self.drop(F.relu(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.2, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.2))

    def forward(self, x, *, scale: float = 1.0):
        n = self.norm1(x)
        x = x + scale * self.attention(n, n, n, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight  # tied

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(self.norm(x))


def class_loss(out, target):
    return F.cross_entropy(out.flatten(0, -2), target.flatten())


HOSTS = {
    "mlp": (mlp, lambda g: (torch.randn(16, 6, generator=g), torch.randint(3, (16,), generator=g))),
    "cnn": (Cnn, lambda g: (torch.randn(8, 1, 6, 6, generator=g), torch.randint(3, (8,), generator=g))),
    "transformer": (Transformer, lambda g: (torch.randint(11, (4, 5), generator=g),) * 2),
}
SITES = {"mlp": "1", "cnn": "stem.2", "transformer": "blocks.0"}
DESIGNS = {"mlp": "mlp_adapter", "cnn": "residual_conv", "transformer": "mlp_adapter"}


def batches(name, count, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return [HOSTS[name][1](generator) for _ in range(count)]


def build(name, seed=0):
    torch.manual_seed(seed)
    return HOSTS[name][0]()


def wrapped(name, *, config=None, hub=None, wait=True, sites="auto", seed=0):
    model = build(name, seed)
    host = wrap(model, example=(batches(name, 1)[0][0],), sites=sites, config=config or KasminaConfig())
    if hub is not None:
        host.attach(hub, PUBLIC, wait=wait)
    return host


# ---------------------------------------------------------------- kernels


class Shelf:
    """An asset hub of which only `fetch` is there."""

    def __init__(self):
        self.containers: dict[str, bytes] = {}
        self.fetched: list[str] = []

    def fetch(self, kernel_id):
        self.fetched.append(kernel_id)
        if kernel_id not in self.containers:
            raise NotFoundError(f"no kernel {kernel_id[:12]}")
        return memoryview(self.containers[kernel_id])

    def put(self, design, signature, *, seed=0, key=KEY):
        ir = load_library()[design].ir if isinstance(design, str) else design
        data = container(ir, signature, seed=seed, key=key, name=design if isinstance(design, str) else "own")
        self.containers[kernel_id_of(data)] = data
        return kernel_id_of(data)


def random_ir(kind=SiteKind.VECTOR):
    """A linear layer that is not zero at birth."""
    return BlueprintIR(fit=(kind,), nodes=(Node(id="lin", op="linear", params={"out": "C"}),), output="lin")


def container(ir, signature, *, seed=0, key=KEY, name="own"):
    from esper.leyline.lower import initialise

    module = lower(ir, signature)
    initialise(module, ir, seed)
    ir_hash = canonical_hash(ir)
    manifest = KernelManifest(
        ir=ir,
        ir_hash=ir_hash,
        compile_key=compile_key(ir_hash, signature, Pipeline.FAST, "here"),
        signature=signature,
        pipeline=Pipeline.FAST,
        fingerprint="here",
        blueprint_id=f"id-{name}",
        blueprint_name=name,
        num_parameters=count_parameters(ir, signature),
        flops_per_sample=count_flops(ir, signature),
        memory_bytes=memory_bytes(ir, signature),
        zero_at_birth=ir.zero_at_birth,
        replaces=ir.replaces,
        needs_neighbour=needs_neighbour(ir),
        report=ValidationReport(checks=(Check(name="shape", passed=True),)),
    )
    return pack(manifest, {k: t.numpy() for k, t in module.state_dict().items()}, key)


# ---------------------------------------------------------------- a trainer in small


def order(action, site, seed_id, *, kernel_id=None, strategy=BlendStrategy.RAMP):
    return KasminaControlCommand(
        command_id=f"{action}-{seed_id}", action=action, site=site, seed_id=seed_id, kernel_id=kernel_id,
        strategy=strategy, reason="a test asks",
    )  # fmt: skip


class Driver:
    """Trains a host and commands its seeds; what the trainer does, without its optimizer surgery's refinements."""

    def __init__(self, name, host, *, steps_per_epoch=4, lr=1e-2, observe_every=0):
        self.name = name
        self.host = host
        self.batches = batches(name, 64)
        self.steps_per_epoch = steps_per_epoch
        self.observe_every = observe_every
        self.optimizer = torch.optim.AdamW([p for _, p in host.live_parameters()], lr=lr)
        self.step = 0
        self.epoch = 0
        self.events = []
        self.changes = []
        self.reports = []

    def take(self, change):
        self.changes.append(change)
        self.events.extend(change.events)
        gone = {id(p) for p in change.left}
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        for p in change.left:
            self.optimizer.state.pop(p, None)
        for _, parameters in change.joined:
            if parameters:
                self.optimizer.add_param_group({"params": list(parameters)})
        return change

    def train(self, steps=1):
        for _ in range(steps):
            x, y = self.batches[self.step % len(self.batches)]
            observe = bool(self.observe_every) and self.step % self.observe_every == 0
            self.take(
                self.host.prepare(self.step, epoch=self.epoch, steps_per_epoch=self.steps_per_epoch, observe=observe)
            )
            self.optimizer.zero_grad()
            class_loss(self.host(x), y).backward()
            self.optimizer.step()
            self.host.train_shadows((x,), lambda out, y=y: class_loss(out, y))
            self.step += 1
        return self

    def close(self, val_loss=1.0):
        self.reports = self.host.close_epoch(run_id="run", epoch=self.epoch, step=self.step, val_loss=val_loss)
        self.epoch += 1
        return self

    def run_epoch(self, val_loss=1.0):
        return self.train(self.steps_per_epoch).close(val_loss)

    def command(self, action, site, seed_id, **kwargs):
        command = order(action, site, seed_id, **kwargs)
        return self.take(self.host.apply(command, run_id="run", epoch=self.epoch, step=self.step))

    def stage(self, seed_id="s0"):
        return next(v.stage for v in self.host.seeds() if v.seed_id == seed_id)

    def seed(self, seed_id="s0"):
        return next(v for v in self.host.seeds() if v.seed_id == seed_id)

    def to_training(self, site, kernel_id, seed_id="s0"):
        self.command(Action.GERMINATE, site, seed_id, kernel_id=kernel_id)
        self.command(Action.ADVANCE, site, seed_id)
        assert self.stage(seed_id) is SeedStage.TRAINING
        return self

    def to_grafting(self, site, kernel_id, seed_id="s0"):
        self.to_training(site, kernel_id, seed_id)
        for _ in range(2):
            self.train(self.steps_per_epoch)
            self.host.record_evidence(seed_id, SHADOW_GAIN)
            self.close()
        self.command(Action.ADVANCE, site, seed_id)
        assert self.stage(seed_id) is SeedStage.GRAFTING
        return self

    def to_fossil(self, site, kernel_id, seed_id="s0"):
        self.to_grafting(site, kernel_id, seed_id)
        for _ in range(4):
            self.run_epoch()
            self.command(Action.ADVANCE, site, seed_id)
        assert self.stage(seed_id) is SeedStage.FOSSILIZED
        return self

    def signature(self, site) -> SiteSignature:
        return self.host.sites[site]


def fingerprint(driver):
    """Everything of a host that a shadow must not touch, as tensors by name."""
    module = driver.host.module if hasattr(driver.host, "module") else driver.host
    found = {n: t.clone() for n, t in module.state_dict().items() if not n.startswith("_esper.")}
    found |= {f"grad {n}": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    for index, state in enumerate(driver.optimizer.state_dict()["state"].values()):
        found |= {f"optimizer {index} {k}": t.clone() for k, t in state.items()}
    return found | {"rng": torch.get_rng_state()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


def grown(name):
    """A driver whose host has one fossilised seed, that site, and that seed's id."""
    shelf = Shelf()
    host = wrapped(name, hub=shelf)
    driver = Driver(name, host)
    site = SITES[name]
    seed_id = next(v.seed_id for v in host.seeds() if v.site == site)
    driver.to_fossil(site, shelf.put(DESIGNS[name], host.sites[site]), seed_id)
    return driver, site, seed_id
