"""Training on a CPU, in small: what the resumed run does equals what the uninterrupted one does."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from jobs.tiny.data import LONGEST, Pool, build_pool
from jobs.tiny.pipeline import DIRECTORY, POOLED_WIDTH, TEXT_WIDTH, build
from jobs.tiny.reading import facts, layout, readers
from jobs.tiny.scenes import COLOURS, SHAPES, Item, Spec, place
from jobs.tiny.train import (
    Run,
    Trainer,
    eligible,
    encode,
    fixed_inputs,
    flow_loss,
    flow_networks,
    lengths_of_steps,
    main,
    once_a_length,
    parse,
    rotate,
    text_loss,
    text_networks,
    text_score,
)
from jobs.tiny.vocabulary import CLIP_LENGTH

MATH = torch.nn.attention.SDPBackend.MATH


def test_the_order_of_text_lengths_survives_an_interruption() -> None:
    whole, rest = lengths_of_steps(0, 0), lengths_of_steps(0, 7)
    first = [next(whole) for _ in range(20)]
    assert first[7:] == [next(rest) for _ in range(13)]


def test_rotary_embedding_equals_diffusers() -> None:
    from diffusers.models.embeddings import apply_rotary_emb

    x, angles = torch.randn(2, 9, 3, 8), torch.randn(9, 4)
    freqs = (angles.cos().repeat_interleave(2, 1), angles.sin().repeat_interleave(2, 1))
    torch.testing.assert_close(rotate(x, freqs), apply_rotary_emb(x, freqs, sequence_dim=1))


def test_an_untrained_t5_tells_whose_colour_is_whose(tmp_path: Path) -> None:
    """It is below 0.01 with T5's own first biases, from which two objects were not told apart after 8,774 steps."""
    pipeline = build(tmp_path)
    prompts = [f"a {a} square to the left of a {b} circle" for a, b in (("red", "blue"), ("blue", "red"))]
    ids = pipeline.tokenizer_2(prompts, padding="max_length", max_length=64, return_tensors="pt").input_ids
    with torch.no_grad():
        one, other = pipeline.text_encoder_2.eval()(ids)[0][:, 2]  # at "square"
    assert (one - other).norm() > 0.3 * one.norm()


def test_pool_is_the_same_in_any_number_of_parts() -> None:
    one, other = (build_pool(DIRECTORY, 40, 0, None) for _ in range(2))
    assert torch.equal(one.t5_ids, other.t5_ids) and torch.equal(one.rows, other.rows)
    assert all(0 < length <= 256 for length in one.lengths.tolist())


def test_a_step_is_adamw_on_the_parameters_one_by_one() -> None:
    torch.manual_seed(0)
    networks = nn.ModuleDict({"one": nn.Linear(5, 3), "two": nn.Linear(3, 7)})
    plain = [parameter.detach().clone().requires_grad_() for parameter in networks.parameters()]
    trainer = Trainer(networks, 100, 0.1, torch.device("cpu"), capture=False)
    optimizer = torch.optim.AdamW(plain, lr=0.1, betas=(0.9, 0.98), weight_decay=0.01)
    x, mean = torch.randn(4, 5), [parameter.detach().clone() for parameter in plain]
    step = trainer.stepper(lambda: (100 * networks["two"](networks["one"](x))).square().mean())  # enough to be clipped
    for _ in range(3):
        trainer.schedule()
        optimizer.param_groups[0]["lr"] = trainer.rate.item()
        first, bias, second, offset = plain
        loss = (100 * (((x @ first.T + bias) @ second.T) + offset)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain, 1.0)
        optimizer.step()
        mean = [old.lerp(new.detach(), trainer.forgetting.item()) for old, new in zip(mean, plain, strict=True)]
        assert step().item() == pytest.approx(loss.item(), rel=1e-4)
        trainer.done += 1
    for got, wanted in zip(networks.parameters(), plain, strict=True):
        torch.testing.assert_close(got, wanted)
    for got, wanted in zip(trainer.average.parameters(), mean, strict=True):
        torch.testing.assert_close(got, wanted)


def test_facts_and_layout_are_what_a_caption_says() -> None:
    red, white, yellow = (COLOURS.index(colour) for colour in ("red", "white", "yellow"))
    star, ring = SHAPES.index("star"), SHAPES.index("ring")
    pair = Spec("white", (Item("star", "red", "small"), Item("ring", "yellow", "large")), "below")
    alone = Spec("yellow", (Item("ring", "white", place="top right corner"),))
    rows = torch.tensor([place(spec, random.Random(seed)) for spec in (pair, alone) for seed in range(50)])
    one = [white, star + 1, red, 1, 2, 0, ring + 1, yellow, 1, 0, 2]
    other = [yellow, ring + 1, white, 2, 0, 1, 0, 0, 0, 0, 0]
    assert facts(rows).tolist() == [one] * 50 + [other] * 50
    seen = layout(rows).unflatten(1, (8, 8))
    upper, lower = (len(COLOURS) * (1 + shape) + colour for shape, colour in ((ring, yellow), (star, red)))
    assert (seen[:50, 1:3, 3:5] == upper).all() and (seen[:50, 5:7, 3:5] == lower).all()
    corner = len(COLOURS) * (1 + ring) + white
    assert (
        (seen[50:, 1:3, 5:7] == corner).all() and (seen[50:, 4:] == yellow).all() and (seen[50:, :, :4] == yellow).all()
    )


def reading_networks(pipeline: FluxPipeline) -> nn.ModuleDict:
    return nn.ModuleDict({**text_networks(pipeline), **readers(TEXT_WIDTH, POOLED_WIDTH)})


def test_reading_is_learned(tmp_path: Path) -> None:
    device = torch.device("cpu")
    pool = build_pool(DIRECTORY, 64, 0, None)
    torch.manual_seed(0)
    trainer = Trainer(reading_networks(build(tmp_path)), 1000, 0.1, device, capture=False)  # the warm-up is long
    among, fixed = eligible(pool)[64], fixed_inputs(64, device, torch.float32)
    step = trainer.stepper(lambda: text_loss(trainer.networks, pool, among, 8, fixed))
    losses = []
    for _ in range(20):
        trainer.schedule()
        losses.append(step().item())
        trainer.done += 1
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses
    scores = text_score(trainer.average, pool, 64)
    assert all(0 <= scores[name] <= 1 for name in ("t5_pairs", "t5_all", "clip_pairs", "clip_all", "layout")), scores


def run_in(directory: Path, monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    """Have `parse` find these options."""
    small = ("--scenes", 64, "--workers", 1, "--device", "cpu", "--cases", 2)
    monkeypatch.setattr(sys, "argv", ["train", "--out", *map(str, (directory, *small, *options))])


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == again and torch.equal(value, copy) for (name, value), (again, copy) in pairs)


def test_the_flow_can_start_from_trained_text_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in(tmp_path, monkeypatch, "--vae", DIRECTORY / "vae", "--text", DIRECTORY)
    pipeline, fresh = Run(parse(), None).pipeline, build(tmp_path)
    shipped = FluxPipeline.from_pretrained(DIRECTORY, torch_dtype=torch.float32)
    assert all(same(getattr(pipeline, name), getattr(shipped, name)) for name in ("text_encoder", "text_encoder_2"))
    assert not same(pipeline.text_encoder_2, fresh.text_encoder_2) and same(pipeline.transformer, fresh.transformer)


def test_the_vae_can_be_trained_without_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run_in(tmp_path, monkeypatch, "--stages", "vae", "--cases", 0, "--vae-steps", 1, "--vae-batch", 4)
    main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["finished"] and "read" not in last and (tmp_path / "pipeline" / "vae" / "config.json").exists()


def test_what_asks_for_no_gradient_stays_as_it_is() -> None:
    networks = nn.ModuleDict({"frozen": nn.Linear(3, 3).requires_grad_(False), "learning": nn.Linear(3, 3)})
    before = {name: value.clone() for name, value in networks.state_dict().items()}
    trainer = Trainer(networks, 10, 0.1, torch.device("cpu"), capture=False)
    trainer.schedule()
    x = torch.randn(4, 3)
    trainer.stepper(lambda: networks["learning"](networks["frozen"](x)).square().mean())()
    for trained in (trainer.networks, trainer.average):
        moved = {name for name, value in trained.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == {"learning.weight", "learning.bias"}


class FromHost(TorchFunctionMode):
    """Finds calls that bring values from Python to the device, or back: a CUDA graph cannot capture those."""

    CALLS = ("tensor", "as_tensor", "from_numpy", "item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.CALLS:
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


class OnHost(TorchDispatchMode):
    """Finds operations on tensors that lie on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        if any(leaf.device.type == "cpu" for leaf in leaves):
            self.found.append(str(function))
        return out


@pytest.mark.parametrize("stage", ["text", "flow", "flow and text"])
@pytest.mark.parametrize("length", [64, 512])
def test_a_step_never_meets_the_host(stage: str, length: int) -> None:
    """What a CUDA graph asks for, on the "meta" device, which stands for any that is not the host."""
    device, count = torch.device("meta"), 8
    pipeline = FluxPipeline.from_pretrained(DIRECTORY, torch_dtype=torch.bfloat16)
    learn_text = stage == "flow and text"
    networks = reading_networks(pipeline) if stage == "text" else flow_networks(pipeline, False, learn_text)
    networks.to(device, torch.bfloat16)
    ids = [torch.zeros(count, width, dtype=torch.int16, device=device) for width in (LONGEST, CLIP_LENGTH)]
    pool = Pool(torch.zeros(count, 11, device=device), *ids, torch.ones(count, dtype=torch.int32, device=device))
    latents, among = torch.zeros(count, 64, 64, device=device), torch.arange(count, device=device)
    fixed = fixed_inputs(length, device, torch.bfloat16)
    if stage != "text":
        networks["transformer"].pos_embed.forward = once_a_length(networks["transformer"].pos_embed.forward)

    def loss() -> torch.Tensor:
        if stage == "text":
            return text_loss(networks, pool, among, 4, fixed)
        return flow_loss(networks, pool, latents, among, 4, fixed, MATH)

    loss().backward()  # a warm-up may meet it
    with FromHost() as calls, OnHost() as operations:
        loss().backward()
    assert not calls.found and not operations.found, (calls.found, operations.found)
    with FromHost() as calls:  # and it would be found
        torch.tensor(1.0, device=device)
    assert calls.found == ["tensor"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_a_captured_step_keeps_what_it_reads() -> None:
    """Replays read the memory of the capture: were the inputs freed, the next tensors would take their place."""
    device = torch.device("cuda")

    def losses(capture: bool) -> list[float]:
        torch.manual_seed(0)
        trainer = Trainer(nn.ModuleDict({"one": nn.Linear(512, 512)}), 100, 0.01, device, capture)
        trainer.schedule()

        def make(x: torch.Tensor) -> Callable[[], torch.Tensor]:
            return trainer.stepper(lambda: trainer.networks["one"](x).square().mean())

        step = make(torch.randn(512, 512, device=device))
        for _ in range(0 if capture else 3):  # a capture begins with as many
            step()
        others = [torch.full((512, 512), 1e3, device=device) for _ in range(16)]
        found = []
        for _ in range(5):
            trainer.schedule()
            found.append(step().item())
            trainer.done += 1
        assert len(others) == 16  # alive until here
        return found

    assert losses(capture=True) == pytest.approx(losses(capture=False), rel=1e-3)


@pytest.mark.slow
def test_resuming_repeats_the_uninterrupted_run() -> None:
    device = torch.device("cpu")
    pool = build_pool(DIRECTORY, 64, 0, None)
    among, fixed = eligible(pool)[64], fixed_inputs(64, device, torch.float32)

    def begin() -> tuple[Trainer, torch.Tensor]:
        pipeline = FluxPipeline.from_pretrained(DIRECTORY, torch_dtype=torch.float32)
        trainer = Trainer(flow_networks(pipeline, fresh=False, learn_text=True), 10, 1e-4, device, capture=False)
        return trainer, encode(pipeline.vae.eval(), pool.rows)

    def losses(trainer: Trainer, latents: torch.Tensor, count: int) -> list[float]:
        step = trainer.stepper(lambda: flow_loss(trainer.networks, pool, latents, among, 4, fixed, MATH))
        found = []
        for _ in range(count):
            trainer.schedule()
            found.append(step().item())
            trainer.done += 1
        return found

    torch.manual_seed(random.Random(0).randrange(2**31))
    trainer, latents = begin()
    losses(trainer, latents, 2)
    state = {
        key: value
        for key, value in torch.utils._pytree.tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, trainer.state()
        ).items()
    }
    uninterrupted = losses(trainer, latents, 3)
    resumed, latents = begin()
    resumed.load(state)
    assert losses(resumed, latents, 3) == pytest.approx(uninterrupted, rel=1e-5)


@pytest.mark.slow
def test_all_stages_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--vae-steps", 2, "--vae-batch", 2, "--text-steps", 2, "--text-batch", 8, "--flow-steps", 2)
    options = (*small, "--flow-scale", 0.02, "--no-compile", "--attention", "math")
    run_in(tmp_path, monkeypatch, *options)
    main()
    once = FluxPipeline.from_pretrained(tmp_path / "pipeline")
    run_in(tmp_path, monkeypatch, *options, "--resume")
    main()  # nothing is left to do
    again = FluxPipeline.from_pretrained(tmp_path / "pipeline")
    for name in ("vae", "text_encoder", "text_encoder_2", "transformer"):
        assert same(getattr(once, name), getattr(again, name)), name
